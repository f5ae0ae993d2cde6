"""The specification of every kernel, in plain torch: slow, obvious, on any device.

``interface.py`` holds the contracts. Shapes never depend on data where that can be avoided, so that on an
accelerator the host does not wait: entries that must not be stored are masked, not removed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.errors import SparcommError
from sparcomm.kernels import bits
from sparcomm.kernels._bitmaps import (
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
from sparcomm.kernels._entries import add, gather, scatter, subtract
from sparcomm.kernels._entries import raise_flag as _raise_flag
from sparcomm.kernels._entries import saturate as _saturate
from sparcomm.kernels._sketch import estimate, from_fixed, occupancy, peel, sketch, to_fixed
from sparcomm.kernels._sums import above, compensate, count_above, deduct, merge, sample, select, settle, survey, top
from sparcomm.kernels.checks import check_code, check_rice, check_rounding, check_scales
from sparcomm.kernels.gauss import gaussian
from sparcomm.layout import Layout
from sparcomm.sparse import Sparse

__all__ = [
    "above",
    "absolute_sum",
    "add",
    "add_signs",
    "bitmap_decode",
    "bitmap_encode",
    "checksum",
    "compensate",
    "count_above",
    "deduct",
    "dequantize",
    "elias_fano_decode",
    "elias_fano_encode",
    "estimate",
    "expand",
    "from_fixed",
    "gather",
    "gaussian",
    "merge",
    "merge_sum",
    "narrow",
    "occupancy",
    "ones",
    "pack",
    "pack_signs",
    "peel",
    "popcount",
    "prefix",
    "quantize",
    "rank",
    "rice_decode",
    "rice_encode",
    "round_stochastic",
    "sample",
    "scatter",
    "select",
    "settle",
    "sketch",
    "spread_signs",
    "subtract",
    "support",
    "survey",
    "to_fixed",
    "top",
    "unite",
    "unpack",
    "vote",
    "widen",
]


def expand(out: Tensor, index: Sequence[Tensor], value: Sequence[Tensor], layout: Layout) -> None:
    """Writes all of out."""
    if not len(index) == len(value) == layout.blocks:
        raise SparcommError(f"{len(index)} and {len(value)} lists for {layout.blocks} blocks")
    out.zero_()
    for block, (i, v) in enumerate(zip(index, value, strict=True)):
        scatter(out, i, v.to(out.dtype), layout, block)


def merge_sum(a: Sparse, b: Sparse) -> Sparse:
    """The sum of two sparse vectors."""
    index = torch.cat([a.index, b.index]).unique()
    value = a.value.new_full(index.shape, -0.0)  # -0.0 + v is v for every v, 0.0 + v is not
    value.index_add_(0, torch.searchsorted(index, a.index), a.value)
    value.index_add_(0, torch.searchsorted(index, b.index), b.value)
    return Sparse(index, value, a.numel)


def elias_fano_encode(index: Tensor, m: int, out: Tensor) -> None:
    """Low bits verbatim, then a unary bitmap of the high parts."""
    k = index.numel()
    check_code(out, k, m, wire.elias_fano_words(k, m))
    low = wire.low_bits(k, m)
    split = wire.words(k * low)
    bits.pack(bits.fields(index, low), out[:split])
    ones = (index >> low) + torch.arange(k, device=index.device)
    bits.pack(bits.mark(ones, 32 * (out.numel() - split)), out[split:])


def elias_fano_decode(words: Tensor, k: int, m: int, flags: Tensor) -> Tensor:
    """The inverse of elias_fano_encode, on any bits."""
    check_code(words, k, m, wire.elias_fano_words(k, m))
    low = wire.low_bits(k, m)
    split = wire.words(k * low)
    verbatim, unary = bits.unpack(words[:split]), bits.unpack(words[split:])
    lows = bits.numbers(verbatim, k, low)
    highs = bits.ones(unary, k) - torch.arange(k, device=words.device)
    unused = [verbatim[k * low :], unary[max(0, k + ((m - 1) >> low)) :]]
    return _harmless((highs << low) | lows, m, flags, (unary.sum() != k) | torch.cat(unused).any())


def bitmap_encode(index: Tensor, m: int, out: Tensor) -> None:
    """Bit i % 32 of word i // 32."""
    check_code(out, index.numel(), m, wire.bitmap_words(m))
    bits.pack(bits.mark(index, 32 * out.numel()), out)


def bitmap_decode(words: Tensor, k: int, m: int, flags: Tensor) -> Tensor:
    """The inverse of bitmap_encode, on any bits."""
    check_code(words, k, m, wire.bitmap_words(m))
    unpacked = bits.unpack(words)
    return _harmless(bits.ones(unpacked, k), m, flags, (unpacked.sum() != k) | unpacked[m:].any())


def rice_encode(index: Tensor, m: int, out: Tensor) -> int:
    """Low bits of the gaps, then their unary parts."""
    k = index.numel()
    check_rice(k, m, out)
    if k in (0, m):
        return 0
    gaps = index.diff(prepend=index.new_tensor([-1])) - 1
    low, used = bits.shortest_rice(gaps, m)
    high = gaps >> low
    unary = bits.mark(high.cumsum(0) + torch.arange(k, device=index.device), int(high.sum()) + k)
    header = bits.fields(index.new_tensor([low]), wire.RICE_HEADER)
    bits.pack(torch.cat([header, bits.fields(gaps, low), unary]), out[:used])
    return used


def rice_decode(words: Tensor, k: int, m: int, flags: Tensor) -> Tensor:
    """Reads what seems to be there, and believes it if coding it gives the same words."""
    check_rice(k, m)
    found = _rice_index(words, k, m)
    if found is not None:
        again = words.new_empty(wire.rice_words(k, m))
        if torch.equal(again[: rice_encode(found, m, again)], words):
            return found
    flags.bitwise_or_(wire.DAMAGED)
    return torch.arange(k, device=words.device)


def _rice_index(words: Tensor, k: int, m: int) -> Tensor | None:
    """(k,) indices, strictly increasing below m, that ``words`` may be the code of; None if it is none."""
    if k in (0, m):
        return torch.arange(k, device=words.device)
    if not 0 < words.numel() <= wire.rice_words(k, m):
        return None
    gaps = bits.rice_gaps(words, k, m)
    if gaps is None or float(gaps.to(torch.float64).sum()) > m:
        return None
    index = (gaps + 1).cumsum(0) - 1
    return index if int(index[-1]) < m else None


def quantize(value: Tensor, scale: Tensor, code: Tensor, seed: int | None) -> Tensor:
    """Codes of 8 bits in units of a power of two per group; returns what a receiver reads."""
    check_scales(scale, code, value)
    k = value.numel()
    single = _saturate(value.to(torch.float32), value.isfinite())
    padded = single.new_zeros(wire.GROUP * scale.numel())
    padded[:k] = single
    scale.copy_(bits.group_scale(padded.view(-1, wire.GROUP)))
    x = single.to(torch.float64) * bits.power(wire.SCALE_BIAS - _exponents(scale, k))
    if seed is None:
        x = x.round()
    else:
        place = torch.arange(k, device=x.device)
        x = (x + bits.noise(place, seed) * 2.0**-32).floor()
    code.copy_(x.nan_to_num(0).clamp(-127, 127))
    return dequantize(scale, code, value.dtype, torch.zeros(1, dtype=torch.uint8, device=value.device))


def dequantize(scale: Tensor, code: Tensor, dtype: torch.dtype, flags: Tensor) -> Tensor:
    """The inverse of quantize, on any bytes."""
    check_scales(scale, code)
    _raise_flag(flags, wire.DAMAGED, code < -127)
    worth = bits.power(_exponents(scale, code.numel()) - wire.SCALE_BIAS)
    return (code.clamp(min=-127) * worth).to(dtype)


def _exponents(scale: Tensor, k: int) -> Tensor:
    """(k,) int64: each value's scale byte."""
    return scale.to(torch.int64).repeat_interleave(wire.GROUP, output_size=wire.GROUP * scale.numel())[:k]


def narrow(value: Tensor, out: Tensor) -> Tensor:
    """Casts to the wire dtype, saturating; returns what a receiver reads."""
    finite = value.isfinite()
    single = _saturate(value.to(torch.float32), finite)
    out.copy_(_saturate(single.to(out.dtype), finite))
    return widen(out, value.dtype)


def widen(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Wire values in the working dtype."""
    return value.to(dtype, copy=True)


def round_stochastic(x: Tensor, out: Tensor, seed: int) -> None:
    """Adds 16 random bits below those that bfloat16 keeps, then cuts; in int64, so that no sum wraps."""
    check_rounding(x, out)
    words = out.view(torch.int16)
    for start in range(0, x.numel(), 1 << 22):  # int64 copies of all of x at once may not fit on a device
        word = x[start : start + (1 << 22)].view(torch.int32).to(torch.int64)
        noise = bits.noise(torch.arange(start, start + word.numel(), device=x.device), seed) >> 16
        magnitude = word & 0x7FFFFFFF
        short = ((magnitude + noise) >> 16).clamp(max=0x7F7F)
        short = torch.where(magnitude >= 0x7F800000, 0x7F80, short)
        short = torch.where(magnitude > 0x7F800000, 0x7FC0, short)
        words[start : start + (1 << 22)] = short | ((word >> 16) & 0x8000)  # the low 16 bits are stored


def checksum(words: Tensor) -> Tensor:
    """Sum of mixed words; 32-bit arithmetic in int64, of which the low half never sees the high."""
    place = torch.arange(words.numel(), device=words.device)
    w = torch.where(place == 3, 0, words.to(torch.int64))
    return bits.mix((w ^ (place * 0x9E3779B9)) & bits.MASK32).sum().to(torch.int32)


def _harmless(index: Tensor, m: int, flags: Tensor, damaged: Tensor) -> Tensor:
    """``index``; 0, 1, ... and the flag if that is not strictly increasing below m, or ``damaged``."""
    damaged = damaged | ((index < 0) | (index >= m)).any() | (index[1:] <= index[:-1]).any()
    _raise_flag(flags, wire.DAMAGED, damaged)
    return torch.where(damaged, torch.arange(index.numel(), device=index.device), index)
