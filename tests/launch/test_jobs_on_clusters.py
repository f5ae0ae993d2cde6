"""The training job under Slurm and under mpirun, by the scripts in launch/: the same weights whatever starts it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import report
from sparcomm.doctor.facts import without_launcher
from support import mpi

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
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

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("clusters"), pytest.mark.timeout(240)]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def start(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    environ = {**without_launcher(), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        list(map(str, command)), cwd=LAUNCH.parent, env=environ, capture_output=True, text=True, timeout=200
    )


def summary(output: Path) -> dict[str, Any]:
    found = report.read(output)["summary"]
    assert (found["size"], found["steps"], found["identical"]) == (2, 4, True)
    return found


@pytest.mark.skipif(bool(NO_SLURM), reason=NO_SLURM)
def test_both_forms_of_the_batch_script(config: Path, tmp_path: Path) -> None:
    """In a Slurm of one node, brought up for it: ranks started by srun, and by torchrun. Then one that fails."""
    batch = f"sbatch --ntasks-per-node 2 --output {tmp_path}/%j.log --export ALL"
    run = f"{LAUNCH}/slurm.sbatch --config {config}"
    lines = [
        f"{batch},LAUNCHER=srun {run} output={tmp_path}/srun",
        f"{batch},LAUNCHER=torchrun {run} output={tmp_path}/torchrun",
        f"{batch},LAUNCHER=srun {run} batchh=3 output={tmp_path}/wrong",
        # Looks more often than sbatch --wait does.
        "while [[ -n $(squeue --noheader) ]]; do sleep 0.3; done",
        "for job in 1 2 3; do scontrol show job $job | grep -o ' ExitCode=[0-9]*'; done",
    ]
    done = start(LAUNCH / "slurm-here.sh", "bash", "-c", " && ".join(lines))
    logs = "".join(path.read_text() for path in sorted(tmp_path.glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    by_srun, by_torchrun = summary(tmp_path / "srun"), summary(tmp_path / "torchrun")
    assert by_srun["sha256"] == by_torchrun["sha256"]
    codes = [int(line.partition("=")[2]) for line in done.stdout.splitlines() if "ExitCode=" in line]
    assert codes[:2] == [0, 0]
    assert codes[2] > 0
    assert "did you mean 'batch'?" in logs


@pytest.mark.mpi
@pytest.mark.skipif(bool(mpi.MISSING), reason=mpi.MISSING)
def test_the_script_for_mpirun(config: Path, tmp_path: Path) -> None:
    """The gradients' way is MPI's in one run and Gloo's in the other; the weights are the same."""
    script = tmp_path / "place.py"
    script.write_text(
        "import json\nfrom sparcomm import launch\nhere = launch.init()\n"
        "print(json.dumps([here.rank, here.backend, here.size]), flush=True)\n"
    )
    assert mpi.LAUNCHER is not None
    env = {"MPIRUN": mpi.LAUNCHER}
    done = start(LAUNCH / "mpirun.sh", "2", SCRIPT=str(script), **env)
    assert done.returncode == 0, done.stdout + done.stderr
    found = sorted(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert found == [[0, "mpi4py", 2], [1, "mpi4py", 2]]
    done = start(LAUNCH / "mpirun.sh", "2", "--config", config, f"output={tmp_path}/mpirun", **env)
    assert done.returncode == 0, done.stdout + done.stderr
    torchrun = start(LAUNCH / "torchrun.sh", "2", "--config", config, f"output={tmp_path}/torchrun")
    assert torchrun.returncode == 0, torchrun.stdout + torchrun.stderr
    assert summary(tmp_path / "mpirun")["sha256"] == summary(tmp_path / "torchrun")["sha256"]
    done = start(LAUNCH / "mpirun.sh", "2", "--config", config, "batchh=3", f"output={tmp_path}/wrong", **env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "did you mean 'batch'?" in done.stderr
