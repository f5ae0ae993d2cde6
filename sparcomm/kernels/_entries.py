"""The specification's loops over positions: reading and changing a few elements of a vector, in plain torch.

Entries that must not be stored are masked, not removed, so that on an accelerator the host does not wait.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.layout import Layout


def gather(x: Tensor, index: Tensor, layout: Layout, block: int) -> Tensor:
    """Values at local positions."""
    if not layout.numel:
        return x.new_zeros(index.shape)
    j, stored, _ = place(index, layout, block)
    return torch.where(stored, x[j], 0)


def subtract(x: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int) -> None:
    """x[index] -= value."""
    if layout.numel:
        j, stored, _ = place(index, layout, block)
        store(x, j, stored, x[j] - value)


def add(x: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int, flags: Tensor) -> None:
    """x[index] += value."""
    add_to(x, index, value, layout, block, flags, saturating=False)


def add_to(
    x: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int, flags: Tensor, *, saturating: bool
) -> None:
    """x[index] += value; if ``saturating``, sums of finite numbers stay finite."""
    if not layout.numel:
        raise_flag(flags, wire.DAMAGED, torch.ones_like(index, dtype=torch.bool))
        return
    j, stored, inside = place(index, layout, block)
    raise_flag(flags, wire.DAMAGED, ~inside)
    new = x[j] + value
    if saturating:
        new = saturate(new, x[j].isfinite() & value.isfinite())
    raise_flag(flags, wire.NONFINITE, stored & ~new.isfinite())
    store(x, j, stored, new)


def scatter(out: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int) -> None:
    """out[index] = value."""
    if layout.numel:
        j, stored, _ = place(index, layout, block)
        store(out, j, stored, value)


def place(index: Tensor, layout: Layout, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Global positions that are safe to read, whether each is stored (no padding), whether each is in the block."""
    inside = (index >= 0) & (index < layout.length)
    j = layout.to_global(torch.where(inside, index, 0), block)
    return j.clamp(max=layout.numel - 1), inside & (j < layout.numel), inside


def store(x: Tensor, j: Tensor, stored: Tensor, value: Tensor) -> None:
    """x[j] = value where stored. The others repeat a stored entry, or write x[0] to itself if there is none."""
    if not j.numel():
        return
    first = stored.to(torch.uint8).argmax().view(1)
    source = torch.where(stored, torch.arange(j.numel(), device=j.device), first)
    some = stored[first]
    x[torch.where(some, j[source], 0)] = torch.where(some, value[source], x[:1])


def magnitude(x: Tensor) -> Tensor:
    """IEEE bits without the sign: int32 of float32, int64 of float64."""
    if x.dtype == torch.float64:
        return x.view(torch.int64) & 0x7FFFFFFFFFFFFFFF
    return x.view(torch.int32) & 0x7FFFFFFF


def raise_flag(flags: Tensor, bit: int, where: Tensor) -> None:
    """ORs ``bit`` into the flags if anything is true."""
    flags.bitwise_or_(where.any().to(torch.uint8) * bit)


def saturate(cast: Tensor, finite: Tensor) -> Tensor:
    """Replaces infinities that rounding made of finite values by the largest finite value of the dtype."""
    return torch.where(finite, cast.nan_to_num(), cast)
