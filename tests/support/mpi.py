"""Real ranks under mpirun: where it is, and one job from start to end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Open MPI: as root, with more ranks than cores, which yield to each other. MPICH asks for none of it.
ENV = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
}
LAUNCHER = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")
MISSING = (
    "mpi4py is not installed"
    if importlib.util.find_spec("mpi4py") is None
    else ""
    if LAUNCHER
    else "there is no mpirun"
)


@dataclass
class Ended:
    """What a job came to.

    Attributes:
        code: mpirun's exit status; -9: it did not end within the time limit, and was killed.
        output: of all ranks and of mpirun, both streams.
    """

    code: int
    output: str


def mpirun(size: int, *command: str | Path, timeout: float = 100, **env: str) -> Ended:
    """``python *command`` on so many ranks."""
    assert LAUNCHER is not None
    path = os.pathsep.join(p for p in sys.path if p)
    process = subprocess.Popen(
        [LAUNCHER, "-n", str(size), sys.executable, *map(str, command)], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | ENV | {"PYTHONPATH": path} | env,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return Ended(process.returncode, output)


def check(size: int, script: Path, folder: Path, least: int) -> None:
    """Runs a script of checks on so many ranks, each of which leaves in ``folder`` what came of every check."""
    ended = mpirun(size, script, folder)
    reports = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
    assert list(reports) == [str(r) for r in range(size)], ended.output
    wrong = [f"--- rank {r}, {name}\n{text}" for r, checks in reports.items() for name, text in checks.items() if text]
    assert not wrong, "\n".join(wrong)
    assert all(len(checks) >= least for checks in reports.values())
    assert ended.code == 0, ended.output
