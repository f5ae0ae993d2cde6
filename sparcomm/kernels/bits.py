"""Bits in plain torch, on any device: what the reference's codes are made of.

Bits are int64 tensors of zeros and ones, the least significant of each word first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparcomm import wire

MASK32 = 0xFFFFFFFF


def mix(w: Any) -> Any:
    """A bijection of 32-bit words (tensors of int64, or an int) in which every input bit reaches every output bit."""
    w = ((w ^ (w >> 16)) * 0x7FEB352D) & MASK32
    w = ((w ^ (w >> 15)) * 0x846CA68B) & MASK32
    return w ^ (w >> 16)


def noise(place: Tensor, seed: int) -> Tensor:
    """Random words of positions ``place`` (int64), which depend on nothing but (seed, place modulo 2^32)."""
    key = mix(seed & MASK32)
    return mix((mix((place & MASK32) ^ key) + key) & MASK32)


def mark(places: Tensor, bits: int) -> Tensor:
    """(bits,): 1 at places, else 0."""
    out = torch.zeros(bits, dtype=torch.int64, device=places.device)
    return out.index_fill_(0, places, 1)


def fields(values: Tensor, width: int) -> Tensor:
    """The ``width`` lowest bits of each value, one after the other."""
    return ((values.view(-1, 1) >> torch.arange(width, device=values.device)) & 1).view(-1)


def numbers(bits: Tensor, count: int, width: int) -> Tensor:
    """The first ``count`` numbers of ``width`` bits each."""
    weight = 1 << torch.arange(width, device=bits.device)
    return (bits[: count * width].view(count, width) * weight).sum(1)


def pack(bits: Tensor, out: Tensor) -> None:
    """Writes bits into int32 words; the rest is zero."""
    padded = torch.zeros(32 * out.numel(), dtype=torch.int64, device=bits.device)
    padded[: bits.numel()] = bits
    out.copy_(numbers(padded, out.numel(), 32).to(torch.int32))


def unpack(words: Tensor) -> Tensor:
    """The bits of int32 words."""
    return fields(words.to(torch.int64), 32)


def ones(bits: Tensor, k: int) -> Tensor:
    """(k,) places of the first k ones, in order; past the end where there are fewer."""
    return torch.searchsorted(bits.cumsum(0), torch.arange(1, k + 1, device=bits.device))


def shortest_rice(gaps: Tensor, m: int) -> tuple[int, int]:
    """(low, words): the number of low bits that makes the Golomb-Rice code of ``gaps`` shortest, and its length."""
    sizes = [wire.rice_bits(gaps.numel(), int((gaps >> low).sum()), low) for low in range(m.bit_length())]
    return sizes.index(min(sizes)), wire.words(min(sizes))


def rice_gaps(words: Tensor, k: int, m: int) -> Tensor | None:
    """(k,) gaps that ``words`` seems to hold, whose sum may be anything; None if there is no room for so many."""
    bits = unpack(words)
    low = int(numbers(bits, 1, wire.RICE_HEADER))
    start = wire.RICE_HEADER + k * low
    places = ones(bits[start:], k)
    if low >= m.bit_length() or start + k > bits.numel() or int(places[-1]) >= bits.numel() - start:
        return None
    unary = places.diff(prepend=places.new_tensor([-1])) - 1
    if int(unary.max()) > m >> low:  # the shift below must not overflow
        return None
    return unary << low | numbers(bits[wire.RICE_HEADER :], k, low)


def group_scale(single: Tensor) -> Tensor:
    """(groups,) uint8: the scale byte of each row of ``single`` (groups, wire.GROUP) float32."""
    magnitude = single.view(torch.int32) & 0x7FFFFFFF
    largest = torch.where(magnitude < 0x7F800000, magnitude, 0).amax(1)
    exponent = largest >> 23
    return torch.where(exponent > 0, exponent + 1, largest >> 22).to(torch.uint8)


def power(exponent: Tensor) -> Tensor:
    """float64: two to the power of ``exponent`` (int64), exactly."""
    return ((exponent + 1023) << 52).view(torch.float64)
