"""Which implementation a device gets, and what is said where a GPU has to go without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparcomm import kernels
from sparcomm.kernels import gpu
from support import emulator

ROOT = Path(__file__).resolve().parent.parent.parent


def script(text: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_device_decides() -> None:
    assert kernels.kernels_for(torch.empty(0)).__name__ == "sparcomm.kernels.cpu"  # type: ignore[attr-defined]
    other = kernels.kernels_for(torch.empty(0, device="meta"))
    assert other.__name__ == "sparcomm.kernels.reference"  # type: ignore[attr-defined]


def test_a_gpu_needs_cupy_and_is_told_which() -> None:
    for version, extra in (("12.8", "cuda12"), ("13.0", "cuda13"), ("14.1", "cuda13")):
        assert gpu.obstacle((8, 0), version, "no_such_module") == f"they need CuPy: pip install 'sparcomm[{extra}]'"
    assert gpu.obstacle((8, 0), "13.0", "json") == ""  # any module that is there


def test_a_cupy_that_cannot_be_imported_counts_as_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_cupy.py").write_text("raise ImportError('libnvrtc.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = gpu.obstacle((8, 0), "13.0", "broken_cupy")
    assert "cannot be imported (ImportError: libnvrtc.so: cannot open" in found
    assert found.endswith("pip install 'sparcomm[cuda13]'")


def test_old_and_foreign_gpus_are_not_asked_for_cupy() -> None:
    assert gpu.obstacle((6, 1), "12.8", "no_such_module") == "the GPU has compute capability 6.1, and they need 7.0"
    assert gpu.obstacle((7, 0), "12.8", "json") == ""
    assert "not built for CUDA" in gpu.obstacle((9, 0), None, "no_such_module")


def test_a_device_whose_kernels_cannot_be_compiled_goes_without() -> None:
    nowhere = torch.device("meta")  # no launcher knows it, and there is no CuPy here, or no GPU
    if not torch.cuda.is_available():
        assert gpu.trial(nowhere).startswith("a first one could not be compiled or started (")
    if emulator.available():
        assert gpu.trial(torch.device("cpu")) == ""


def test_the_warning_comes_once_in_a_process() -> None:
    text = (
        "import warnings; from sparcomm.kernels.gpu import warn_once\n"
        "warnings.simplefilter('always')\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    for why in ('they need CuPy', 'they need CuPy', 'something else'): warn_once(why)\n"
        "print(len(seen), seen[0].category.__name__, seen[0].message)"
    )
    assert script(text).startswith("1 RuntimeWarning sparcomm's GPU kernels are not used: they need CuPy")


def test_without_a_gpu_nothing_of_cuda_is_imported() -> None:
    text = (
        "import sys, torch, sparcomm\n"
        "from sparcomm.transport.alone import Alone\n"
        "for a in (sparcomm.SparDL(), sparcomm.MajorityVote()):\n"
        "    x = torch.arange(1000.0); state = a.init(1000, x.dtype, x.device, 1)\n"
        "    assert a.reduce(x, None, state, 0, Alone()).ok\n"
        "names = ('cupy', 'sparcomm.kernels.cuda', 'sparcomm.kernels.gpu')\n"
        "print([m for m in names if m in sys.modules], torch.cuda.is_initialized())"
    )
    assert script(text).split() == ["[]", "False"]
