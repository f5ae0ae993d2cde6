"""What holds between implementations, and what only the compiled one can get wrong: cache, locks, threads, misuse."""

from __future__ import annotations

import fcntl
import inspect
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import sparcomm
from sparcomm import wire
from sparcomm.errors import SparcommError
from sparcomm.kernels import Kernels, cpu, kernels_for, reference
from sparcomm.kernels.cpu import _code, _count, _jit, _select, _sparse, warm
from sparcomm.layout import contiguous, dealt, whole
from sparcomm.sparse import Sparse
from support.kernels import GRADIENTS, WORKING, blank, data, increasing, same

NAMES = sorted(name for name, _ in inspect.getmembers(Kernels, inspect.isfunction) if not name.startswith("_"))


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_the_interface(kernels: Any, name: str) -> None:
    stated = inspect.signature(getattr(Kernels, name))
    without_self = stated.replace(parameters=list(stated.parameters.values())[1:])
    assert inspect.signature(getattr(kernels, name)) == without_self


def test_implementations_offer_nothing_beyond_the_interface(kernels: Any) -> None:
    offered = inspect.getmembers(kernels, inspect.isfunction)
    assert sorted(n for n, f in offered if f.__module__ == kernels.__name__ and not n.startswith("_")) == NAMES


def test_the_device_decides() -> None:
    assert kernels_for(torch.empty(0)) is cpu
    assert kernels_for(torch.empty(0, device="meta")) is reference


def test_importing_kernels_does_not_import_numba() -> None:
    code = "import sys, sparcomm.kernels; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=100).returncode == 0


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(sparcomm.__file__).parent.parent), **more}


def everything(k: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """One call of each kernel on data of some size; all results."""
    n, layout = 3000, dealt(3000, 2)
    grad = data("normal", n, dtype)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    residual, out = data("spread", n, working), torch.empty(n, dtype=working)
    stats, flags = blank(layout)
    k.compensate(grad, residual, out, stats, layout, flags)
    index = k.select(out, 100, stats, layout, 1)
    value = k.gather(out, index, layout, 1)
    sparse = Sparse(index, value, layout.length)
    message = torch.empty(100, dtype=torch.bfloat16)
    decoded = k.narrow(value, message)
    k.subtract(out, index, decoded, layout, 1)
    k.merge(out, index, value, layout, 0, stats, flags)
    k.restore(out, grad, residual, index, index[:50], layout, 1)
    k.scatter(out, index, value, layout, 0)
    k.histogram(out, stats, layout, flags)
    words = torch.empty(wire.elias_fano_words(100, 1500), dtype=torch.int32)
    k.elias_fano_encode(index, 1500, words)
    bitmap = torch.empty(wire.bitmap_words(1500), dtype=torch.int32)
    k.bitmap_encode(index, 1500, bitmap)
    both = k.merge_sum(sparse, Sparse(index + 1, value, layout.length))
    lists = [k.elias_fano_decode(words, 100, 1500, flags), k.bitmap_decode(bitmap, 100, 1500, flags)]
    checks = [k.checksum(words), k.widen(message, working)]
    return [out, stats, flags, index, value, decoded, words, bitmap, both.index, both.value, *lists, *checks]


@pytest.mark.parametrize("dtype", GRADIENTS)
def test_implementations_agree_bit_for_bit(dtype: torch.dtype) -> None:
    for ours, specified in zip(everything(cpu, dtype), everything(reference, dtype), strict=True):
        assert same(ours, specified)


def test_threads_do_not_disturb_each_other() -> None:
    expected = everything(cpu, torch.float32)
    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(lambda _: [everything(cpu, torch.float32) for _ in range(5)], range(8)):
            assert all(same(a, b) for one in results for a, b in zip(one, expected, strict=True))


def test_positions_beyond_two_to_the_33() -> None:
    numel = (1 << 33) + 12_345
    for layout in (whole(numel), contiguous(numel, 3)):
        index = torch.cat([increasing(500, layout.length), torch.tensor([layout.length - 1])])
        for b in range(layout.blocks):
            expected = layout.to_global(index, b)
            found = _sparse.place(index.numpy(), layout.slot.numpy(), b, layout.tile, numel).tolist()
            assert found == torch.where(expected < numel, expected, _sparse.PADDING).tolist()


@pytest.mark.parametrize("dtype", WORKING)
def test_statistics_of_something_else_are_an_error(dtype: torch.dtype) -> None:
    n, layout = 10_000, whole(10_000)
    x, other = data("normal", n, dtype), data("normal", n, dtype) * 1e-3
    stats, flags = blank(layout)
    cpu.histogram(other, stats, layout, flags)
    with pytest.raises(SparcommError, match="row 0 of the statistics is not the histogram of block 0"):
        cpu.select(x, 100, stats, layout, 0)
    cpu.histogram(x, stats, layout, flags)
    with pytest.raises(SparcommError, match="row 0"):
        cpu.select(other, 100, stats, layout, 0)


@pytest.mark.parametrize("rubbish", [-5, 1 << 40, 0])
def test_statistics_of_nothing_are_an_error(rubbish: int) -> None:
    x, layout = data("normal", 1000, torch.float32), whole(1000)
    stats, flags = blank(layout)
    cpu.histogram(x, stats, layout, flags)
    for bins in (slice(None), slice(1000, 1040)):
        wrong = stats.clone()
        wrong[0, bins] = rubbish
        with pytest.raises(SparcommError, match="row 0"):
            cpu.select(x, 10, wrong, layout, 0)
    stats[0, 2030], stats[0, 2020] = 1 << 40, -(1 << 40)  # the sum is right
    with pytest.raises(SparcommError, match="row 0"):
        cpu.select(x, 10, stats, layout, 0)


def test_the_reference_never_waits_for_a_device() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")  # has no data: whoever looks at any gets an error

    k, layout, n = reference, dealt(1000, 3, "meta"), 1000
    x, stats, flags = meta(n), meta(3, wire.BINS, dtype=torch.int64), meta(1, dtype=torch.uint8)
    k.compensate(meta(n, dtype=torch.bfloat16), meta(n), x, stats, layout, flags)
    index = k.select(x, 20, stats, layout, 1)
    value = k.gather(x, index, layout, 1)
    decoded = k.narrow(value, meta(20, dtype=torch.bfloat16))
    k.subtract(x, index, decoded, layout, 1)
    k.merge(x, index, value, layout, 1, stats, flags)
    k.restore(x, meta(n), meta(n), index, index, layout, 1)
    k.scatter(x, index, value, layout, 1)
    words = meta(wire.elias_fano_words(20, n), dtype=torch.int32)
    k.elias_fano_encode(index, n, words)
    assert k.elias_fano_decode(words, 20, n, flags).shape == (20,)
    words = meta(wire.bitmap_words(n), dtype=torch.int32)
    k.bitmap_encode(index, n, words)
    assert k.bitmap_decode(words, 20, n, flags).shape == (20,)
    assert k.checksum(words).device.type == "meta"


def test_misuse_is_an_error_not_an_access_out_of_bounds() -> None:
    layout, short = whole(100), torch.ones(99)
    stats, flags = blank(layout)
    with pytest.raises(SparcommError, match=r"shape \(99,\), stride \(1,\) in a layout of 100"):
        cpu.histogram(short, stats, layout, flags)
    with pytest.raises(SparcommError, match="of just that length"):
        cpu.compensate(torch.ones(100), short, torch.ones(100), stats, layout, flags)
    with pytest.raises(SparcommError, match="flat and contiguous"):
        cpu.histogram(torch.ones(200)[::2], stats, layout, flags)
    with pytest.raises(SparcommError, match="must be equal"):
        cpu.subtract(torch.ones(100), torch.arange(5), torch.ones(4), layout, 0)
    for bad in (-1, 1, 1 << 40):
        with pytest.raises(SparcommError, match=rf"block={bad} must be in \[0, 1\)"):
            cpu.gather(torch.ones(100), torch.arange(5), layout, bad)
        with pytest.raises(SparcommError, match=f"block={bad}"):
            cpu.select(torch.ones(100), 5, stats, layout, bad)
    for wrong_stats in (stats[:, :-1], stats[:0]):
        with pytest.raises(SparcommError, match=r"must be \(1, 2048\)"):
            cpu.histogram(torch.ones(100), wrong_stats, layout, flags)
        with pytest.raises(SparcommError, match=r"must be \(1, 2048\)"):
            cpu.compensate(torch.ones(100), None, torch.ones(100), wrong_stats, layout, flags)
        with pytest.raises(SparcommError, match=r"must be \(1, 2048\)"):
            cpu.merge(torch.ones(100), torch.arange(5), torch.ones(5), layout, 0, wrong_stats, flags)
    whole_list, cut_list = (Sparse(torch.arange(5), torch.ones(k), 9) for k in (5, 4))
    for pair in ((whole_list, cut_list), (cut_list, whole_list)):
        with pytest.raises(SparcommError, match="must be equal"):
            cpu.merge_sum(*pair)
    with pytest.raises(SparcommError, match="checksum of 3 words"):
        cpu.checksum(torch.ones(3, dtype=torch.int32))
    for wrong in ([0, 0], [1, 0], [-1, 3], [3, 100]):
        for encode, size in ((cpu.elias_fano_encode, wire.elias_fano_words(2, 100)), (cpu.bitmap_encode, 4)):
            with pytest.raises(SparcommError, match="strictly increasing, from 0 to below m=100"):
                encode(torch.tensor(wrong), 100, torch.empty(size, dtype=torch.int32))


def test_results_lie_on_the_cpu_whatever_the_default_device_is() -> None:
    layout, x = whole(100), data("normal", 100, torch.float32)
    stats, flags = blank(layout)
    words = torch.zeros(wire.elias_fano_words(3, 100), dtype=torch.int32)
    bitmap = torch.zeros(wire.bitmap_words(100), dtype=torch.int32)
    with torch.device("meta"):
        cpu.histogram(x, stats, layout, flags)
        results = [cpu.select(x, 100, stats, layout, 0), cpu.select(x, 5, stats, layout, 0)]
        results += [cpu.elias_fano_decode(words, 3, 100, flags), cpu.bitmap_decode(bitmap, 3, 100, flags)]
        results += [cpu.gather(x, results[1], layout, 0), cpu.checksum(x.view(torch.int32))]
    assert {r.device.type for r in results} == {"cpu"}


def test_compiled_kernels_go_to_a_temporary_folder_if_no_other_can_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    package = tmp_path / "copy" / "sparcomm"
    shutil.copytree(Path(sparcomm.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "kernels" / "cpu" / "__pycache__").write_text("not a folder")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    code = (
        "import torch; from sparcomm.kernels import kernels_for\n"
        "words = torch.arange(8, dtype=torch.int32); print(kernels_for(words).checksum(words).item())"
    )
    places = {name: str(blocked / "x") for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME")}
    env = environment(**places, PYTHONPATH=str(package.parent), TMPDIR=str(temporary))
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, timeout=100, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) == reference.checksum(torch.arange(8, dtype=torch.int32)).item()
    assert list((temporary / f"sparcomm-kernels-{os.getuid()}").rglob("*.nbi"))


def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    find = _jit.fallback_folder.__wrapped__
    ours = find()
    assert ours == tmp_path / f"sparcomm-kernels-{os.getuid()}"
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    ours.chmod(0o777)
    assert find() != ours
    ours.rmdir()
    ours.symlink_to(tmp_path)
    assert find() != ours
    ours.unlink()
    ours.write_text("")
    assert find() != ours


def compiled() -> dict[str, int]:
    """Compiled variants per kernel."""
    functions = [f for module in (_code, _count, _select, _sparse) for f in vars(module).values()]
    return {f.__name__: len(f.signatures) for f in functions if hasattr(f, "signatures")}


def test_after_warm_up_nothing_is_left_to_compile() -> None:
    code = (
        "from sparcomm.kernels import cpu, warm_up; import test_implementations as t\n"
        "warm_up(); before = t.compiled()\n"
        "for dtype in t.GRADIENTS: t.everything(cpu, dtype)\n"
        "assert sum(before.values()) > 40, before\n"
        "assert t.compiled() == before, (before, t.compiled())"
    )
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent, Path(sparcomm.__file__).parent.parent)))
    env = environment(PYTHONPATH=paths)
    done = subprocess.run([sys.executable, "-c", code], env=env, timeout=100, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_warm_up_waits_for_whoever_is_compiling() -> None:
    with (_jit.fallback_folder() / "warm-up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=warm.warm_up, daemon=True)
        second.start()
        second.join(0.3)
        waited = second.is_alive()
    second.join(100)
    assert waited
    assert not second.is_alive()
