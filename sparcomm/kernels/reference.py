"""The specification of every kernel, in plain torch: slow, obvious, on any device.

``interface.py`` holds the contracts. Shapes never depend on data where that can be avoided, so that on an
accelerator the host does not wait: entries that must not be stored are masked, not removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.errors import SparcommError
from sparcomm.kernels._entries import add, gather, scatter, subtract
from sparcomm.kernels._entries import raise_flag as _raise_flag
from sparcomm.kernels._entries import saturate as _saturate
from sparcomm.kernels._sums import above, compensate, count_above, deduct, merge, sample, select, settle, survey, top
from sparcomm.layout import Layout
from sparcomm.sparse import Sparse

__all__ = [
    "above",
    "add",
    "bitmap_decode",
    "bitmap_encode",
    "checksum",
    "compensate",
    "count_above",
    "deduct",
    "elias_fano_decode",
    "elias_fano_encode",
    "expand",
    "gather",
    "merge",
    "merge_sum",
    "narrow",
    "round_stochastic",
    "sample",
    "scatter",
    "select",
    "settle",
    "subtract",
    "survey",
    "top",
    "widen",
]

MASK32 = 0xFFFFFFFF


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
    _check_code(out, k, m, wire.elias_fano_words(k, m))
    low = wire.low_bits(k, m)
    split = wire.words(k * low)
    fields = (index.view(-1, 1) >> torch.arange(low, device=index.device)) & 1
    _pack(fields.view(-1), out[:split])
    ones = (index >> low) + torch.arange(k, device=index.device)
    _pack(_mark(ones, 32 * (out.numel() - split)), out[split:])


def elias_fano_decode(words: Tensor, k: int, m: int, flags: Tensor) -> Tensor:
    """The inverse of elias_fano_encode, on any bits."""
    _check_code(words, k, m, wire.elias_fano_words(k, m))
    low = wire.low_bits(k, m)
    split = wire.words(k * low)
    verbatim, unary = _unpack(words[:split]), _unpack(words[split:])
    weight = 1 << torch.arange(low, device=words.device)
    lows = (verbatim[: k * low].view(k, low) * weight).sum(1)
    highs = _ones(unary, k) - torch.arange(k, device=words.device)
    unused = [verbatim[k * low :], unary[max(0, k + ((m - 1) >> low)) :]]
    return _settle((highs << low) | lows, m, flags, unary.sum() != k, torch.cat(unused).any())


def bitmap_encode(index: Tensor, m: int, out: Tensor) -> None:
    """Bit i % 32 of word i // 32."""
    _check_code(out, index.numel(), m, wire.bitmap_words(m))
    _pack(_mark(index, 32 * out.numel()), out)


def bitmap_decode(words: Tensor, k: int, m: int, flags: Tensor) -> Tensor:
    """The inverse of bitmap_encode, on any bits."""
    _check_code(words, k, m, wire.bitmap_words(m))
    bits = _unpack(words)
    return _settle(_ones(bits, k), m, flags, bits.sum() != k, bits[m:].any())


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
    _check_rounding(x, out)
    key, words = _mix(seed & MASK32), out.view(torch.int16)
    for start in range(0, x.numel(), 1 << 22):  # int64 copies of all of x at once may not fit on a device
        bits = x[start : start + (1 << 22)].view(torch.int32).to(torch.int64)
        place = torch.arange(start, start + bits.numel(), device=x.device) & MASK32
        noise = _mix((_mix(place ^ key) + key) & MASK32) >> 16
        magnitude = bits & 0x7FFFFFFF
        short = ((magnitude + noise) >> 16).clamp(max=0x7F7F)
        short = torch.where(magnitude >= 0x7F800000, 0x7F80, short)
        short = torch.where(magnitude > 0x7F800000, 0x7FC0, short)
        words[start : start + (1 << 22)] = short | ((bits >> 16) & 0x8000)  # the low 16 bits are stored


def checksum(words: Tensor) -> Tensor:
    """Sum of mixed words; 32-bit arithmetic in int64, of which the low half never sees the high."""
    place = torch.arange(words.numel(), device=words.device)
    w = torch.where(place == 3, 0, words.to(torch.int64))
    return _mix((w ^ (place * 0x9E3779B9)) & MASK32).sum().to(torch.int32)


def _mix(w: Any) -> Any:
    """A bijection of 32-bit words (tensors of int64, or an int) in which every input bit reaches every output bit."""
    w = ((w ^ (w >> 16)) * 0x7FEB352D) & MASK32
    w = ((w ^ (w >> 15)) * 0x846CA68B) & MASK32
    return w ^ (w >> 16)


def _mark(places: Tensor, bits: int) -> Tensor:
    """(bits,) int64: 1 at places, else 0."""
    out = torch.zeros(bits, dtype=torch.int64, device=places.device)
    return out.index_fill_(0, places, 1)


def _pack(bits: Tensor, out: Tensor) -> None:
    """Bits (int64, 0 or 1), least significant first, into int32 words; the rest is zero."""
    padded = torch.zeros(32 * out.numel(), dtype=torch.int64, device=bits.device)
    padded[: bits.numel()] = bits
    weight = 1 << torch.arange(32, device=bits.device)
    out.copy_((padded.view(-1, 32) * weight).sum(1).to(torch.int32))


def _unpack(words: Tensor) -> Tensor:
    return ((words.to(torch.int64).view(-1, 1) >> torch.arange(32, device=words.device)) & 1).view(-1)


def _ones(bits: Tensor, k: int) -> Tensor:
    """(k,) places of the first k ones, in order; past the end where there are fewer."""
    return torch.searchsorted(bits.cumsum(0), torch.arange(1, k + 1, device=bits.device))


def _settle(index: Tensor, m: int, flags: Tensor, *damage: Tensor) -> Tensor:
    """Flags what no encoder writes, and makes any such index harmless."""
    for found in damage:
        _raise_flag(flags, wire.DAMAGED, found)
    if not index.numel():
        return index
    _raise_flag(flags, wire.DAMAGED, (index < 0) | (index >= m))
    _raise_flag(flags, wire.DAMAGED, index[1:] <= index[:-1])
    return index.clamp(0, m - 1).cummax(0).values


def _check_code(words: Tensor, k: int, m: int, expected: int) -> None:
    if words.numel() != expected or not 0 <= k <= m:
        raise SparcommError(
            f"code of k={k} indices below m={m} in {words.numel()} words: needs 0 <= k <= m and {expected} words"
        )


def _check_rounding(x: Tensor, out: Tensor) -> None:
    if x.dtype != torch.float32 or out.dtype != torch.bfloat16 or x.shape != out.shape:
        raise SparcommError(
            f"stochastic rounding of {x.dtype}{list(x.shape)} to {out.dtype}{list(out.shape)}: "
            "must be float32 to bfloat16, of one shape"
        )
