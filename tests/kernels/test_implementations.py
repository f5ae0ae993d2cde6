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
from sparcomm.kernels import Kernels, cpu, cuda, folder, kernels_for, reference
from sparcomm.kernels.cpu import (
    _bitmaps,
    _code,
    _compensate,
    _count,
    _quantize,
    _rice,
    _round,
    _select,
    _sketch,
    _sparse,
    warm,
)
from sparcomm.layout import contiguous, dealt, whole
from sparcomm.sparse import Sparse
from support import emulator
from support.everything import everything
from support.kernels import GRADIENTS, data, increasing, same
from support.sketches import every_sketch

NAMES = sorted(name for name, _ in inspect.getmembers(Kernels, inspect.isfunction) if not name.startswith("_"))


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_those_of_the_interface(kernels: Any, name: str) -> None:
    stated = inspect.signature(getattr(Kernels, name))
    without_self = stated.replace(parameters=list(stated.parameters.values())[1:])
    assert inspect.signature(getattr(kernels, name)) == without_self


def test_implementations_offer_nothing_beyond_the_interface(kernels: Any) -> None:
    offered = inspect.getmembers(kernels, inspect.isfunction)
    modules = {n: f.__module__ for n, f in offered if not n.startswith("_")}
    ours = [n for n, m in modules.items() if m.startswith("sparcomm.kernels") and "checks" not in m]
    assert sorted(ours) == NAMES


def test_the_device_decides() -> None:
    assert kernels_for(torch.empty(0)) is cpu
    assert kernels_for(torch.empty(0, device="meta")) is reference


def test_importing_kernels_does_not_import_numba() -> None:
    code = "import sys, sparcomm.kernels; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=100).returncode == 0


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(sparcomm.__file__).parent.parent), **more}


@pytest.mark.parametrize("dtype", GRADIENTS)
def test_implementations_agree_bit_for_bit(kernels: Any, dtype: torch.dtype) -> None:
    for ours, specified in zip(everything(kernels, dtype), everything(reference, dtype), strict=True):
        assert same(ours, specified)


@pytest.mark.skipif(not emulator.available(), reason="the CUDA text needs g++ to run on a CPU")
@pytest.mark.parametrize("seed", [0, 2, 3])
def test_who_comes_first_changes_no_bit(seed: int) -> None:
    with emulator.schedule(seed):
        found = everything(cuda, torch.float32)
    for ours, specified in zip(found, everything(reference, torch.float32), strict=True):
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


def test_the_reference_never_waits_for_a_device() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")  # has no data: whoever looks at any gets an error

    k, layout, n = reference, dealt(1000, 3, "meta"), 1000
    x, flags = meta(n), meta(1, dtype=torch.uint8)
    work = k.compensate(meta(n, dtype=torch.bfloat16), meta(n), x, layout, 20, flags)
    k.merge(work, 1, meta(20, dtype=torch.int64), meta(20))
    index, value = k.select(work, 1, 20)
    decoded = k.narrow(value, meta(20, dtype=torch.bfloat16))
    k.deduct(work, 1, decoded)
    k.settle(work, 1, index)
    k.merge(work, 1, index, value)
    k.above(k.survey(x, layout, 20, flags), 0, 1.0, 20)
    k.sample(x, None, 64)
    k.top(index, value, 5)
    k.subtract(x, index, k.gather(x, index, layout, 1), layout, 1)
    k.add(x, index, value, layout, 1, flags)
    k.scatter(x, index, value, layout, 1)
    k.expand(x, [index] * 3, [value] * 3, layout)
    words = meta(wire.elias_fano_words(20, n), dtype=torch.int32)
    k.elias_fano_encode(index, n, words)
    assert k.elias_fano_decode(words, 20, n, flags).shape == (20,)
    words = meta(wire.bitmap_words(n), dtype=torch.int32)
    k.bitmap_encode(index, n, words)
    assert k.bitmap_decode(words, 20, n, flags).shape == (20,)
    assert k.checksum(words).device.type == "meta"
    scale, code = meta(1, dtype=torch.uint8), meta(20, dtype=torch.int8)
    for seed in (None, 3):
        assert k.quantize(value, scale, code, seed).shape == (20,)
    assert k.dequantize(scale, code, torch.float32, flags).shape == (20,)
    k.round_stochastic(x, meta(n, dtype=torch.bfloat16), 7)
    counts = meta(3, 50, dtype=torch.int32)
    k.occupancy(index, 7, 50, counts)
    for dtype in (torch.float32, torch.int32):
        k.sketch(index, meta(40, dtype=dtype), 2, 7, meta(3, 100, dtype=dtype))
    for how in ("median", "mean", "projection"):
        assert k.estimate(meta(3, 100), index, 2, 7, counts if how == "projection" else None, how).shape == (40,)
    assert k.to_fixed(value, -9, 100, meta(20, dtype=torch.int32)).shape == ()
    assert k.from_fixed(meta(20, dtype=torch.int32), -9, torch.float32).shape == (20,)


def test_misuse_is_an_error_not_an_access_out_of_bounds() -> None:
    layout, short, flags = whole(100), torch.ones(99), torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(SparcommError, match=r"shape \(99,\), stride \(1,\) in a layout of 100"):
        cpu.compensate(short, None, torch.ones(100), layout, 5, flags)
    with pytest.raises(SparcommError, match="of just that length"):
        cpu.compensate(torch.ones(100), short, torch.ones(100), layout, 5, flags)
    with pytest.raises(SparcommError, match="flat and contiguous"):
        cpu.compensate(torch.ones(100), None, torch.ones(200)[::2], layout, 5, flags)
    with pytest.raises(SparcommError, match="of just that length"):
        cpu.expand(short, [torch.arange(5)], [torch.ones(5)], layout)
    work = cpu.compensate(torch.ones(100), None, torch.ones(100), layout, 5, flags)
    with pytest.raises(SparcommError, match="must be equal"):
        cpu.subtract(torch.ones(100), torch.arange(5), torch.ones(4), layout, 0)
    for bad in (-1, 1, 1 << 40):
        with pytest.raises(SparcommError, match=rf"block={bad} must be in \[0, 1\)"):
            cpu.gather(torch.ones(100), torch.arange(5), layout, bad)
        pair = torch.arange(5), torch.ones(5)
        for kernel, arguments in (
            (cpu.select, (5,)),
            (cpu.merge, pair),
            (cpu.deduct, pair[1:]),
            (cpu.settle, pair[:1]),
        ):
            with pytest.raises(SparcommError, match=f"block={bad}"):
                kernel(work, bad, *arguments)
    with pytest.raises(SparcommError, match="must be equal"):
        cpu.merge(work, 0, torch.arange(5), torch.ones(4))
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
    flags = torch.zeros(1, dtype=torch.uint8)
    words = torch.zeros(wire.elias_fano_words(3, 100), dtype=torch.int32)
    bitmap = torch.zeros(wire.bitmap_words(100), dtype=torch.int32)
    with torch.device("meta"):
        out = torch.empty(100, device="cpu")
        works = [cpu.compensate(x, None, out, layout, 5, flags) for _ in range(2)]
        results = [*cpu.select(works[0], 0, 100), *cpu.select(works[1], 0, 5)]
        results += [cpu.elias_fano_decode(words, 3, 100, flags), cpu.bitmap_decode(bitmap, 3, 100, flags)]
        rice = torch.zeros(wire.rice_words(3, 100), dtype=torch.int32, device="cpu")
        scale, code = x.new_zeros(1, dtype=torch.uint8), x.new_zeros(3, dtype=torch.int8)
        results += [cpu.rice_decode(rice, 3, 100, flags), cpu.rice_decode(rice, 3, 3, flags)]
        results += [cpu.quantize(x[:3], scale, code, None), cpu.dequantize(scale, code, x.dtype, flags)]
        results += [cpu.gather(x, results[0], layout, 0), cpu.checksum(x.view(torch.int32))]
        results += every_sketch(cpu, results[0], torch.float32)
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
    find = folder.fallback_folder.__wrapped__
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
    modules = (_bitmaps, _code, _compensate, _count, _quantize, _rice, _round, _select, _sketch, _sparse)
    functions = [f for module in modules for f in vars(module).values()]
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
    with warm.lock_file().open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=warm.warm_up, daemon=True)
        second.start()
        second.join(0.3)
        waited = second.is_alive()
    second.join(100)
    assert waited
    assert not second.is_alive()
