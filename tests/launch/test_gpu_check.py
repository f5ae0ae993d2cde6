"""What runs on borrowed GPUs, tried as far as can be without one: every kernel is called, a wrong one is found."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_sanitize
import pytest
import torch
from gpu_sanitize import GRADIENTS, PARTS, SIZES, Data, differing, same

from sparcomm.kernels import Kernels, cpu, cuda
from support import emulator

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
NAMES = {name for name, _ in inspect.getmembers(Kernels, inspect.isfunction) if not name.startswith("_")}


class Watched:
    """The CPU kernels, with a list of which were called; one of them may do something else."""

    def __init__(self, **instead: Any) -> None:
        self.called: set[str] = set()
        self.instead = instead

    def __getattr__(self, name: str) -> Any:
        self.called.add(name)
        return self.instead.get(name) or getattr(cpu, name)


@pytest.mark.parametrize("dtype", GRADIENTS)
@pytest.mark.parametrize("n", SIZES)
def test_the_cpu_differs_nowhere(n: int, dtype: torch.dtype) -> None:
    watched: Any = Watched()
    assert differing(watched, n, dtype, CPU) == []
    assert watched.called == NAMES - ({"gaussian"} if n == 0 else set()), "every kernel that takes so many elements"


@pytest.mark.skipif(not emulator.available(), reason="the CUDA text needs g++ to run on a CPU")
@pytest.mark.parametrize("n", [0, 1, 33, 1000])
def test_the_text_differs_nowhere(n: int) -> None:
    assert differing(cuda, n, torch.float32, CPU) == []


def test_a_wrong_kernel_is_named() -> None:
    def unite(rows: torch.Tensor, out: torch.Tensor) -> None:
        cpu.unite(rows, out)
        out[-1:] ^= 1

    def forgetful(x: torch.Tensor, out: torch.Tensor, seed: int) -> None:
        pass  # what was there is NaN

    watched: Any = Watched(unite=unite, round_stochastic=forgetful)
    found = differing(watched, 33, torch.float32, CPU)
    assert found == [
        "round_stochastic of narrowing, n = 33, float32",
        "unite of voting, n = 33, float32",
    ]


def test_bits_are_compared() -> None:
    x = torch.tensor([0.0, float("nan"), 1.0])
    assert same(x, x.clone())
    assert not same(x, torch.tensor([-0.0, float("nan"), 1.0]))
    assert not same(x, torch.tensor([0.0, 2.0, 1.0]))
    assert not same(x, x.double())
    assert not same(x[:1], x[:2])


def test_data_is_the_same_everywhere() -> None:
    first, second = (Data(1000, torch.bfloat16, CPU) for _ in range(2))
    assert torch.equal(first.normal(1000), second.normal(1000))
    assert torch.equal(first.index(1000), second.index(1000))
    assert first.out(3).isnan().all()
    assert len(PARTS) == len({part.__name__ for part in PARTS})


def test_the_script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_sanitize.main(["--device", "cpu", "--sizes", "33", "--dtypes", "float16"]) == 0
    assert capsys.readouterr().out == "0 differences\n"
    monkeypatch.setattr(gpu_sanitize, "kernels_for", lambda x: Watched(gather=lambda x, *rest: x[:5] + 1))
    assert gpu_sanitize.main(["--device", "cpu", "--sizes", "33", "--dtypes", "float16"]) == 1
    assert "differs: gather of adding, n = 33, float16" in capsys.readouterr().err
    monkeypatch.setattr(gpu_sanitize, "kernels_for", lambda x: gpu_sanitize.reference)
    assert gpu_sanitize.main(["--device", "cpu"]) == 2
    assert "CuPy" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_check_says_so_and_fails(tmp_path: Path) -> None:
    assert gpu_sanitize.main(["--device", "cuda"]) == 2
    env = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    script = ROOT / "launch" / "gpu-check.sh"
    done = subprocess.run([script], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "PyTorch finds no CUDA device" in done.stdout
    assert torch.__version__ in (tmp_path / "out" / "versions.log").read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("launch/*.sh")))
def test_scripts_are_clean(script: str) -> None:
    done = subprocess.run(["shellcheck", ROOT / "launch" / script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout


def test_the_stages_fit_into_eight_minutes() -> None:
    text = (ROOT / "launch" / "gpu-check.sh").read_text()
    stages = [line.split() for line in text.splitlines() if line.lstrip().startswith("stage ")]
    seconds = {words[1]: int(words[2]) for words in stages}
    assert {"versions", "tests", "memcheck", "racecheck", "kernels"} <= set(seconds)
    assert sum(seconds.values()) - seconds["sanitize"] <= 8 * 60 + 10  # one of sanitize and the sanitizer's tools runs
