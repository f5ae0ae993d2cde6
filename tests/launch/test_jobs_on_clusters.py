"""The training job under Slurm and under mpirun, by the scripts in launch/: the same weights whatever starts it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import report
from sparcomm.doctor import step
from sparcomm.doctor.facts import without_launcher
from support import mpi
from support.jobs_run import check_sums

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "setpriv")
WHERE = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
NO_SLURM = (
    "only root can start slurmd" if os.geteuid() != 0
    else "" if all(shutil.which(name, path=WHERE) for name in PROGRAMS)
    else "Slurm is missing: apt-get install slurm-wlm munge"
)  # fmt: skip
TINY = """
task: {name: digits, width: 24, dropout: 0.2}
optimizer: {name: sgd, lr: 0.05, momentum: 0.5}
algorithm: {name: spardl, density: 0.01}
steps: 4
batch: 48
"""
# Under Slurm the other rank waits, and is to be ended. mpirun's MPI knows what ends only if it has been started.
FAILING = """
import os, sys, time
names = [name for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK") if name in os.environ]
if os.environ[names[0]] == "1":
    sys.exit("rank 1 has had enough")
time.sleep(100 if names[0] == "SLURM_PROCID" else 0)
"""

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("clusters"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clusters")
    (path / "tiny.yaml").write_text(TINY)
    (path / "failing.py").write_text(FAILING)
    return path


def start(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end. One that takes too long is asked to end, so that it can clean up."""
    environ = {**without_launcher(), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **env}
    process = subprocess.Popen(
        list(map(str, command)), cwd=LAUNCH.parent, env=environ, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def summary(output: Path) -> dict[str, Any]:
    found = report.read(output)["summary"]
    assert (found["size"], found["steps"], found["identical"]) == (2, 4, True)
    return found


@pytest.fixture(scope="module")
def under_mpirun(folder: Path) -> dict[str, Any]:
    assert mpi.LAUNCHER is not None
    output = folder / "mpirun"
    done = start(LAUNCH / "mpirun.sh", 2, "--config", folder / "tiny.yaml", f"output={output}", MPIRUN=mpi.LAUNCHER)
    assert done.returncode == 0, done.stdout + done.stderr
    said = r"sparcomm: \[rank 0/2\] launcher (openmpi|mpich): 2 ranks, backend mpi4py, device cpu, "
    assert re.search(said, done.stdout + done.stderr), done.stdout + done.stderr
    return summary(output)


@pytest.mark.skipif(bool(NO_SLURM), reason=NO_SLURM)
def test_both_forms_of_the_batch_script(folder: Path, request: pytest.FixtureRequest) -> None:
    """In a Slurm of one node, brought up for it: ranks started by srun, and by torchrun. Then one that fails."""
    batch = f"sbatch --ntasks-per-node 2 --output {folder}/%j.log --export ALL"
    script = f"{LAUNCH}/slurm.sbatch"
    lines = [
        f"{batch},LAUNCHER=srun {script} --config {folder}/tiny.yaml output={folder}/srun",
        f"{batch},LAUNCHER=torchrun,SCRIPT={step.__file__} {script} gloo",
        f"{batch},SCRIPT={folder}/failing.py {script}",
        # Looks more often than sbatch --wait does.
        "while [[ -n $(squeue --noheader) ]]; do sleep 0.3; done",
        "for job in 1 2 3; do scontrol show job $job | grep -o ' ExitCode=[0-9]*'; done",
    ]
    # Ends with this process, however that ends.
    done = start("setpriv", "--pdeathsig", "TERM", LAUNCH / "slurm-here.sh", "bash", "-c", " && ".join(lines))
    logs = [path.read_text() for path in sorted(folder.glob("*.log"))]
    assert done.returncode == 0, done.stdout + done.stderr + "".join(logs)
    # srun ends with the highest code of its tasks, the one that it has terminated among them.
    assert re.findall("ExitCode=([0-9]+)", done.stdout) == ["0", "0", "143"], done.stdout + "".join(logs)
    assert "[rank 0/2] launcher slurm: 2 ranks, backend gloo, device cpu, at " in logs[0]
    check_sums(logs[1], 2, "torchrun")
    assert "rank 1 has had enough" in logs[2]
    by_srun = summary(folder / "srun")
    if not mpi.MISSING:
        assert by_srun["sha256"] == request.getfixturevalue("under_mpirun")["sha256"]


@pytest.mark.skipif(bool(NO_SLURM), reason=NO_SLURM)
def test_the_slurm_of_one_node_leaves_nothing_when_it_is_ended(tmp_path: Path) -> None:
    """By a signal, while a job runs in it."""
    ask = 'srun sleep 100 & until squeue --noheader --states R | grep -q .; do sleep 0.2; done; kill "$PPID"; wait'
    done = start(LAUNCH / "slurm-here.sh", "bash", "-c", ask, SLURM_HERE=str(tmp_path))
    assert done.returncode == -signal.SIGTERM, done.stdout + done.stderr
    end = time.monotonic() + 10
    while (left := started_with(str(tmp_path))) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == []


def started_with(text: str) -> list[str]:
    """Commands of the processes that have it in their environment."""
    found: list[str] = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text.encode() in (path / "environ").read_bytes():
                found.append((path / "comm").read_text())
    return found


@pytest.mark.mpi
@pytest.mark.skipif(bool(mpi.MISSING), reason=mpi.MISSING)
def test_the_script_for_mpirun(folder: Path, under_mpirun: dict[str, Any]) -> None:
    """It trains, by MPI; and ends with the code of a rank that fails."""
    assert under_mpirun["bytes_sent"] > 0
    assert mpi.LAUNCHER is not None
    done = start(LAUNCH / "mpirun.sh", 2, SCRIPT=str(folder / "failing.py"), MPIRUN=mpi.LAUNCHER)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "rank 1 has had enough" in done.stderr
