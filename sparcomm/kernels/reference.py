"""The specification of every kernel, in plain torch: slow, obvious, on any device.

``interface.py`` holds the contracts. Shapes never depend on data where that can be avoided, so that on an
accelerator the host does not wait: entries that must not be stored are masked, not removed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.errors import SparcommError
from sparcomm.layout import Layout
from sparcomm.sparse import Sparse

MASK32 = 0xFFFFFFFF


def compensate(
    grad: Tensor, residual: Tensor | None, out: Tensor, stats: Tensor, layout: Layout, flags: Tensor
) -> None:
    """Writes grad + residual and its histogram."""
    out.copy_(grad)
    if residual is not None:
        out.add_(residual)
    histogram(out, stats, layout, flags)


def histogram(x: Tensor, stats: Tensor, layout: Layout, flags: Tensor) -> None:
    """Magnitudes per block and bin."""
    stats.zero_()
    _raise_flag(flags, wire.NONFINITE, ~x.isfinite())
    tile = torch.arange(layout.numel, device=x.device) // layout.tile
    block = layout.owner[tile // layout.blocks, tile % layout.blocks]
    stats.view(-1).index_add_(0, block * wire.BINS + _bin(x), torch.ones_like(block))


def select(x: Tensor, k: int, stats: Tensor, layout: Layout, block: int) -> Tensor:  # noqa: ARG001
    """Local positions of the k largest magnitudes; the statistics are not needed here."""
    if not 0 <= k <= layout.length:
        raise SparcommError(f"select: k={k} must be in [0, {layout.length}], the length of a block")
    everywhere = torch.arange(layout.length, device=x.device)
    key = _magnitude(gather(x, everywhere, layout, block))
    return key.sort(descending=True, stable=True).indices[:k].sort().values


def gather(x: Tensor, index: Tensor, layout: Layout, block: int) -> Tensor:
    """Values at local positions."""
    if not layout.numel:
        return x.new_zeros(index.shape)
    j, stored, _ = _place(index, layout, block)
    return torch.where(stored, x[j], 0)


def subtract(x: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int) -> None:
    """x[index] -= value."""
    if layout.numel:
        j, stored, _ = _place(index, layout, block)
        _store(x, j, stored, x[j] - value)


def merge(
    x: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int, stats: Tensor | None, flags: Tensor
) -> None:
    """x[index] += value; moves the counts from the old bins to the new."""
    if not layout.numel:
        _raise_flag(flags, wire.DAMAGED, torch.ones_like(index, dtype=torch.bool))
        return
    j, stored, inside = _place(index, layout, block)
    _raise_flag(flags, wire.DAMAGED, ~inside)
    old = x[j]
    new = old + value
    _raise_flag(flags, wire.NONFINITE, stored & ~new.isfinite())
    _store(x, j, stored, new)
    if stats is not None:
        moved = stored.to(stats.dtype)
        stats[block].index_add_(0, _bin(old), -moved)
        stats[block].index_add_(0, _bin(new), moved)


def restore(
    x: Tensor, grad: Tensor, residual: Tensor | None, index: Tensor, keep: Tensor, layout: Layout, block: int
) -> None:
    """Writes grad + residual where index is not in keep."""
    if not layout.numel:
        return
    j, stored, _ = _place(index, layout, block)
    original = grad[j].to(x.dtype)
    if residual is not None:
        original = original + residual[j]
    if keep.numel():
        found = keep[torch.searchsorted(keep, index).clamp(max=keep.numel() - 1)] == index
        stored = stored & ~found
    _store(x, j, stored, original)


def scatter(out: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int) -> None:
    """out[index] = value."""
    if layout.numel:
        j, stored, _ = _place(index, layout, block)
        _store(out, j, stored, value)


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


def checksum(words: Tensor) -> Tensor:
    """Sum of mixed words; 32-bit arithmetic in int64, of which the low half never sees the high."""
    place = torch.arange(words.numel(), device=words.device)
    w = torch.where(place == 3, 0, words.to(torch.int64))
    w = (w ^ (place * 0x9E3779B9)) & MASK32
    w = ((w ^ (w >> 16)) * 0x7FEB352D) & MASK32
    w = ((w ^ (w >> 15)) * 0x846CA68B) & MASK32
    return (w ^ (w >> 16)).sum().to(torch.int32)


def _magnitude(x: Tensor) -> Tensor:
    """IEEE bits without the sign: int32 of float32, int64 of float64."""
    if x.dtype == torch.float64:
        return x.view(torch.int64) & 0x7FFFFFFFFFFFFFFF
    return x.view(torch.int32) & 0x7FFFFFFF


def _bin(x: Tensor) -> Tensor:
    return (_magnitude(x) >> (52 if x.dtype == torch.float64 else 20)).to(torch.int64)


def _raise_flag(flags: Tensor, bit: int, where: Tensor) -> None:
    flags.bitwise_or_(where.any().to(torch.uint8) * bit)


def _place(index: Tensor, layout: Layout, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Global positions that are safe to read, whether each is stored (no padding), whether each is in the block."""
    inside = (index >= 0) & (index < layout.length)
    j = layout.to_global(torch.where(inside, index, 0), block)
    return j.clamp(max=layout.numel - 1), inside & (j < layout.numel), inside


def _store(x: Tensor, j: Tensor, stored: Tensor, value: Tensor) -> None:
    """x[j] = value where stored. The others repeat a stored entry, or write x[0] to itself if there is none."""
    if not j.numel():
        return
    first = stored.to(torch.uint8).argmax().view(1)
    source = torch.where(stored, torch.arange(j.numel(), device=j.device), first)
    some = stored[first]
    x[torch.where(some, j[source], 0)] = torch.where(some, value[source], x[:1])


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


def _saturate(cast: Tensor, finite: Tensor) -> Tensor:
    """Replaces infinities that rounding made of finite values by the largest finite value of the dtype."""
    return torch.where(finite, cast.nan_to_num(), cast)
