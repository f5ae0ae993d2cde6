"""Compiling ahead: one process per host compiles, the others wait for its cache."""

from __future__ import annotations

import fcntl
import zlib
from pathlib import Path

import torch

from sparcomm import wire
from sparcomm.dtypes import GRADIENT_DTYPES, WIRE_DTYPES, working_dtype
from sparcomm.kernels import cpu
from sparcomm.kernels.folder import fallback_folder
from sparcomm.layout import dealt
from sparcomm.sparse import Sparse


def lock_file() -> Path:
    """Held by the process that compiles: one for each installation, as each has a disk cache of its own."""
    return fallback_folder() / f"warm-up-{zlib.crc32(str(Path(__file__).resolve()).encode()):08x}.lock"


def warm_up() -> None:
    """Calls every kernel once per dtype, under a file lock: whoever comes second finds them in the disk cache."""
    with lock_file().open("w") as lock, torch.device("cpu"):  # whatever PyTorch's default device is
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, or its process dies
        for dtype in GRADIENT_DTYPES:
            _gradient_kernels(dtype)
            _sign_kernels(dtype)
        for dtype in (torch.float32, torch.float64):
            _value_kernels(dtype)
        _code_kernels()
        _bitmap_kernels()
        _sketch_kernels()
        cpu.round_stochastic(torch.ones(3), torch.empty(3, dtype=torch.bfloat16), 0)


def _gradient_kernels(dtype: torch.dtype) -> None:
    n, layout = 1 << 15, dealt(1 << 15, 1)
    flags = torch.zeros(1, dtype=torch.uint8)
    some = torch.linspace(1, 1.01, n).to(dtype)
    out = torch.empty(n, dtype=working_dtype(dtype))
    index = torch.arange(3)
    for grad in (some, torch.ones_like(some)):  # few and many candidates take different ways
        for residual in (None, torch.zeros_like(out)):
            for k in (1, n // 2):
                work = cpu.compensate(grad, residual, out, layout, k, flags)
                cpu.merge(work, 0, index, torch.ones(3, dtype=out.dtype))
                cpu.deduct(work, 0, cpu.select(work, 0, n // 2)[1])
                cpu.settle(work, 0, index)
            cpu.sample(grad, residual, 4)
    cpu.expand(grad, [index], [out[:3]], layout)


def _value_kernels(dtype: torch.dtype) -> None:
    n, layout = 96, dealt(96, 1)
    x, flags = torch.linspace(-1, 1, n, dtype=dtype), torch.zeros(1, dtype=torch.uint8)
    index = torch.arange(3)
    value = cpu.gather(x, index, layout, 0)
    cpu.subtract(x, index, value, layout, 0)
    cpu.scatter(x, index, value, layout, 0)
    cpu.add(x, index, value, layout, 0, flags)
    cpu.top(index, value, 2)
    for threshold in (0.0, 2.0):  # below the floor and above it
        work = cpu.survey(x, layout, 3, flags, torch.ones(1, dtype=dtype))
        cpu.count_above(work, 0, threshold)
        cpu.above(work, 0, threshold, 50)
    cpu.merge_sum(Sparse(index, value, n), Sparse(index, value, n))
    for wire_dtype in WIRE_DTYPES.values():
        cpu.narrow(value, torch.empty(3, dtype=wire_dtype))
    scale, code = torch.empty(1, dtype=torch.uint8), torch.empty(3, dtype=torch.int8)
    cpu.quantize(value, scale, code, None)
    cpu.dequantize(scale, code, dtype, flags)


def _code_kernels() -> None:
    index, flags = torch.arange(3), torch.zeros(1, dtype=torch.uint8)
    words = torch.empty(wire.elias_fano_words(3, 100), dtype=torch.int32)
    cpu.elias_fano_encode(index, 100, words)
    cpu.elias_fano_decode(words, 3, 100, flags)
    words = torch.empty(wire.bitmap_words(100), dtype=torch.int32)
    cpu.bitmap_encode(index, 100, words)
    cpu.bitmap_decode(words, 3, 100, flags)
    cpu.checksum(words)
    words = torch.empty(wire.rice_words(3, 100), dtype=torch.int32)
    cpu.rice_decode(words[: cpu.rice_encode(index, 100, words)], 3, 100, flags)


def _sketch_kernels() -> None:
    key, counts = torch.arange(3), torch.empty((1, 2), dtype=torch.int32)
    cpu.occupancy(key, 0, 2, counts)
    fixed, exact = torch.empty(3, dtype=torch.int32), torch.empty((1, 2), dtype=torch.int32)
    for dtype in (torch.float32, torch.float64):
        value, table = torch.ones(3, dtype=dtype), torch.empty((1, 2), dtype=dtype)
        cpu.sketch(key, value, 1, 0, table)
        cpu.estimate(table, key, 1, 0, None, "median")
        cpu.estimate(table, key, 1, 0, None, "mean")
        cpu.estimate(table, key, 1, 0, counts, "projection")
        cpu.to_fixed(value, 0, 1, fixed)
        cpu.from_fixed(fixed, 0, dtype)
    cpu.sketch(key, fixed, 1, 0, exact)
    cpu.peel(exact, key, 1, 0, counts)


def _sign_kernels(dtype: torch.dtype) -> None:
    x, flags = torch.ones(3, dtype=dtype), torch.zeros(1, dtype=torch.uint8)
    words, present = torch.empty(1, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    for width in (1, 2, 3):  # each its own way
        cpu.support(x, width, words)
    out, scale = x.to(working_dtype(dtype)), torch.ones((), dtype=working_dtype(dtype))
    for other in (None, present):
        cpu.pack_signs(x, "alternate", 0, 0, words, other, flags)
        cpu.spread_signs(words, other, scale, out)
    cpu.absolute_sum(x)


def _bitmap_kernels() -> None:
    rows, words = torch.ones(2, 3, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
    cpu.unite(rows, words)
    cpu.vote(rows, None, "alternate", 0, 0, words, None)
    cpu.vote(rows, rows, "alternate", 0, 0, words, words.clone())
    cpu.pack(cpu.unpack(words, 96), words)
    cpu.popcount(words)
    cpu.rank(words, cpu.prefix(words), cpu.ones(words))
