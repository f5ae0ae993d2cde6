"""The kernels on CPUs, compiled by Numba: tensors in, NumPy views inside, nothing copied.

``sparcomm/kernels/interface.py`` holds the contracts. Loops are serial and release the GIL; call them from as many
threads as there are ranks in the process. Passes over large vectors are cut into one part per thread of torch's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.dtypes import working_dtype
from sparcomm.errors import SparcommError
from sparcomm.kernels.checks import check_code, check_rice, check_rounding, check_scales
from sparcomm.kernels.checks_sums import check_block, check_floor, check_k, check_length, check_pair, check_sample
from sparcomm.kernels.cpu import _code, _compensate, _parts, _quantize, _rice, _round, _select, _sparse, working
from sparcomm.kernels.cpu._arrays import array as _array
from sparcomm.kernels.cpu._arrays import bits as _bits
from sparcomm.kernels.cpu._arrays import words as _words
from sparcomm.kernels.cpu.bitmaps import (
    absolute_sum,
    add_signs,
    ones,
    pack,
    pack_signs,
    popcount,
    prefix,
    rank,
    spread_signs,
    support,
    unite,
    unpack,
    vote,
)
from sparcomm.kernels.cpu.sketches import estimate, from_fixed, occupancy, peel, sketch, to_fixed
from sparcomm.kernels.cpu.working import CHANGED, SIGNED, Lists
from sparcomm.kernels.gauss import gaussian
from sparcomm.kernels.interface import Working
from sparcomm.layout import Layout
from sparcomm.sparse import Sparse

__all__ = [
    "above", "absolute_sum", "add", "add_signs", "bitmap_decode", "bitmap_encode", "checksum", "compensate",
    "count_above", "deduct", "dequantize", "elias_fano_decode", "elias_fano_encode", "estimate", "expand", "from_fixed",
    "gather", "gaussian", "merge", "merge_sum", "narrow", "occupancy", "ones", "pack", "pack_signs", "peel", "popcount",
    "prefix", "quantize", "rank", "rice_decode", "rice_encode", "round_stochastic", "sample", "scatter", "select",
    "settle", "sketch", "spread_signs", "subtract", "support", "survey", "to_fixed", "top", "unite", "unpack", "vote",
    "widen",
]  # fmt: skip
ONE = np.zeros((1, 1), np.int64)  # the slots of a vector that is one block
_NARROW = {
    torch.float32: _code.narrow_float32,
    torch.bfloat16: _code.narrow_bfloat16,
    torch.float16: _code.narrow_float16,
}


def compensate(
    grad: Tensor,
    residual: Tensor | None,
    out: Tensor,
    layout: Layout,
    k: int,
    flags: Tensor,
    floor: Tensor | None = None,
) -> Working:
    """Writes grad + residual, and lists what is likely to be selected."""
    check_length(layout, grad, residual, out)
    work = _work(out, layout, flags, floor, writable=True)
    work.fill(_array(grad), None if residual is None else _array(residual), layout.owner.numpy(), k)
    return work


def survey(x: Tensor, layout: Layout, k: int, flags: Tensor, floor: Tensor | None = None) -> Working:
    """Lists what is likely to be selected."""
    check_length(layout, x)
    work = _work(x, layout, flags, floor, writable=False)
    work.fill(work.x, None, layout.owner.numpy(), k)
    return work


def select(work: Working, block: int, k: int) -> tuple[Tensor, Tensor]:
    """Positions and sums of the k largest magnitudes."""
    lists = _lists(work, block)
    check_k("select", k, work.layout.length)
    index, value = lists.select(block, k)
    return torch.from_numpy(index), torch.from_numpy(value)


def count_above(work: Working, block: int, threshold: float) -> int:
    """How many magnitudes exceed the threshold."""
    return _lists(work, block).count_above(block, threshold)


def above(work: Working, block: int, threshold: float, k: int) -> tuple[Tensor, Tensor]:
    """The first k above the threshold, then the first others."""
    lists = _lists(work, block)
    check_k("above", k, work.layout.length)
    index, value = lists.above(block, threshold, k)
    return torch.from_numpy(index), torch.from_numpy(value)


def merge(work: Working, block: int, index: Tensor, value: Tensor) -> None:
    """Adds to the sums."""
    check_pair(index, value)
    _lists(work, block).merge(block, _array(index), _array(value))


def deduct(work: Working, block: int, value: Tensor) -> None:
    """Takes what was sent from the sums."""
    _lists(work, block).deduct(block, _array(value))


def settle(work: Working, block: int, index: Tensor) -> None:
    """Writes sums to out."""
    _lists(work, block).settle(block, _array(index))


def top(index: Tensor, value: Tensor, k: int) -> Tensor:
    """Places of the k largest magnitudes."""
    check_pair(index, value)
    check_k("top", k, value.numel())
    out = np.empty(k, np.int64)
    if not _select.top_places(_bits(value), out):
        raise SparcommError(CHANGED)
    return torch.from_numpy(out)


def sample(grad: Tensor, residual: Tensor | None, count: int) -> Tensor:
    """One element of each share."""
    check_sample(grad, residual, count)
    n = grad.numel()
    if n <= count:
        widened = grad.to(working_dtype(grad.dtype), copy=True)
        return widened if residual is None else widened.add_(residual)
    out = torch.empty(count, dtype=working_dtype(grad.dtype), device="cpu")
    _compensate.sample(_array(grad), None if residual is None else _array(residual), ONE, 0, n, n, _array(out))
    return out


def gather(x: Tensor, index: Tensor, layout: Layout, block: int) -> Tensor:
    """Values at local positions."""
    out = x.new_empty(index.numel())
    _sparse.gather(_array(x), _place(x, index, layout, block), _array(out))
    return out


def subtract(x: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int) -> None:
    """x[index] -= value."""
    check_pair(index, value)
    _sparse.subtract(_array(x), _place(x, index, layout, block), _array(value))


def add(x: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int, flags: Tensor) -> None:
    """x[index] += value."""
    check_pair(index, value)
    _sparse.add(_array(x), _place(x, index, layout, block), _array(value), _array(flags))


def scatter(out: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int) -> None:
    """out[index] = value."""
    check_pair(index, value)
    _sparse.scatter(_array(out), _place(out, index, layout, block), _array(value))


def expand(out: Tensor, index: Sequence[Tensor], value: Sequence[Tensor], layout: Layout) -> None:
    """Writes all of out."""
    check_length(layout, out)
    if not len(index) == len(value) == layout.blocks:
        raise SparcommError(f"{len(index)} and {len(value)} lists for {layout.blocks} blocks")
    for i, v in zip(index, value, strict=True):
        check_pair(i, v)
    bounds = np.array([0, *itertools.accumulate(i.numel() for i in index)])
    joined = [t[0] if len(t) == 1 else torch.cat(list(t)) for t in (index, value)]
    target, owner = _bits(out), layout.owner.numpy()
    lists = _array(joined[0]), _bits(joined[1].to(out.dtype)), bounds, owner, layout.tile
    streaming = working.streams(target, owner.size, layout.tile)
    parts = _parts.cut(layout.numel, layout.tile)
    _parts.run([functools.partial(_sparse.expand, target, *lists, *part, streaming) for part in parts])


def merge_sum(a: Sparse, b: Sparse) -> Sparse:
    """The sum of two sparse vectors."""
    check_pair(a.index, a.value)
    check_pair(b.index, b.value)
    room = a.index.numel() + b.index.numel()
    index, value = a.index.new_empty(room), a.value.new_empty(room)
    lists = (_array(t) for t in (a.index, a.value, b.index, b.value, index, value))
    found = _sparse.merge_sum(*lists)
    return Sparse(index[:found], value[:found], a.numel)


def elias_fano_encode(index: Tensor, m: int, out: Tensor) -> None:
    """Low bits verbatim, then a unary bitmap of the high parts."""
    k = index.numel()
    check_code(out, k, m, wire.elias_fano_words(k, m))
    if not _code.elias_fano_encode(_array(index), m, wire.low_bits(k, m), _words(out)):
        raise _disorder(m)


def elias_fano_decode(words: Tensor, k: int, m: int, flags: Tensor) -> Tensor:
    """The inverse of elias_fano_encode, on any bits."""
    check_code(words, k, m, wire.elias_fano_words(k, m))
    out = torch.empty(k, dtype=torch.int64, device="cpu")
    _code.elias_fano_decode(_words(words), k, m, wire.low_bits(k, m), _array(out), _array(flags))
    return out


def bitmap_encode(index: Tensor, m: int, out: Tensor) -> None:
    """Bit i % 32 of word i // 32."""
    check_code(out, index.numel(), m, wire.bitmap_words(m))
    if not _code.bitmap_encode(_array(index), m, _words(out)):
        raise _disorder(m)


def bitmap_decode(words: Tensor, k: int, m: int, flags: Tensor) -> Tensor:
    """The inverse of bitmap_encode, on any bits."""
    check_code(words, k, m, wire.bitmap_words(m))
    out = torch.empty(k, dtype=torch.int64, device="cpu")
    _code.bitmap_decode(_words(words), m, _array(out), _array(flags))
    return out


def rice_encode(index: Tensor, m: int, out: Tensor) -> int:
    """Low bits of the gaps, then their unary parts."""
    k = index.numel()
    check_rice(k, m, out)
    if k in (0, m):
        if not _code.increasing(_array(index), m):
            raise _disorder(m)
        return 0
    used = _rice.encode(_array(index), m, wire.low_bits(k, m), _words(out))
    if used < 0:
        raise _disorder(m)
    return used


def rice_decode(words: Tensor, k: int, m: int, flags: Tensor) -> Tensor:
    """The inverse of rice_encode, on any number of any bits."""
    check_rice(k, m)
    if k not in (0, m):
        out = torch.empty(k, dtype=torch.int64, device="cpu")
        _rice.decode(_words(words), m, _array(out), _array(flags))
        return out
    if words.numel():
        flags |= wire.DAMAGED
    return torch.arange(k, device="cpu")


def quantize(value: Tensor, scale: Tensor, code: Tensor, seed: int | None) -> Tensor:
    """Codes of 8 bits in units of a power of two per group; returns what a receiver reads."""
    check_scales(scale, code, value)
    decoded = torch.empty_like(value)
    word = np.uint32((seed or 0) & 0xFFFFFFFF)
    _quantize.quantize(_array(value), _array(scale), _array(code), seed is not None, word, _array(decoded))
    return decoded


def dequantize(scale: Tensor, code: Tensor, dtype: torch.dtype, flags: Tensor) -> Tensor:
    """The inverse of quantize, on any bytes."""
    check_scales(scale, code)
    out = torch.empty(code.numel(), dtype=dtype, device="cpu")
    _quantize.dequantize(_array(scale), _array(code), _array(out), _array(flags))
    return out


def narrow(value: Tensor, out: Tensor) -> Tensor:
    """Casts to the wire dtype, saturating; returns what a receiver reads."""
    check_pair(value, out)
    decoded = torch.empty_like(value)
    _NARROW[out.dtype](_array(value), _array(out), _array(decoded))
    return decoded


def widen(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Wire values in the working dtype; torch's own cast is already one pass."""
    return value.to(dtype, copy=True)


def round_stochastic(x: Tensor, out: Tensor, seed: int) -> None:
    """Adds 16 random bits below those that bfloat16 keeps, then cuts."""
    check_rounding(x, out)
    _round.round_stochastic(_array(x).view(np.uint32), _array(out), np.uint32(seed & 0xFFFFFFFF))


def checksum(words: Tensor) -> Tensor:
    """Sum of mixed words."""
    if words.numel() < wire.HEADER_WORDS:
        raise SparcommError(f"checksum of {words.numel()} words: needs at least the {wire.HEADER_WORDS} of a header")
    return torch.from_numpy(np.array(_code.checksum(_words(words)), np.uint32).view(np.int32))


def _work(out: Tensor, layout: Layout, flags: Tensor, floor: Tensor | None, *, writable: bool) -> Lists:
    """Sums whose lists are still to be filled."""
    if out.dtype not in (torch.float32, torch.float64):
        raise SparcommError(f"sums in {out.dtype}: must be float32 or float64")
    x = _array(out)
    bits = x.view(SIGNED[x.dtype])
    check_floor(floor, out, layout)
    floors = np.full(layout.blocks, -1, bits.dtype) if floor is None else _array(floor).copy().view(bits.dtype)
    return Lists(out, layout, x, _array(flags), layout.slot.numpy(), floors, writable, bits)


def _lists(work: Working, block: int) -> Lists:
    check_block(work.layout, block)
    if not isinstance(work, Lists):
        raise SparcommError(f"{type(work).__name__} was not made by this implementation's compensate")
    return work


def _place(x: Tensor, index: Tensor, layout: Layout, block: int) -> Any:
    check_length(layout, x)
    check_block(layout, block)
    return _sparse.place(_array(index), layout.slot.numpy(), block, layout.tile, layout.numel)


def _disorder(m: int) -> SparcommError:
    return SparcommError(f"indices to be coded must be strictly increasing, from 0 to below m={m}")
