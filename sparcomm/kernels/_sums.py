"""The specification of a step's sums, in plain torch: a second full vector, and a stable sort of every block."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.dtypes import working_dtype
from sparcomm.errors import SparcommError
from sparcomm.kernels._entries import add_to, gather, magnitude, raise_flag, scatter, subtract
from sparcomm.kernels.checks_sums import check_floor, check_k, check_pair, check_sample, check_working, key_of
from sparcomm.kernels.interface import Working
from sparcomm.layout import Layout


@dataclass(eq=False)
class Dense(Working):
    """What ``compensate`` returns: beside ``out`` a full vector of the sums.

    Attributes:
        writable: whether ``settle`` may write to ``out``.
        chosen: by block, what was selected; None once something was merged after that.
        deducted: blocks of which what was selected has been deducted.
    """

    out: Tensor
    layout: Layout
    sums: Tensor
    flags: Tensor
    writable: bool
    chosen: dict[int, Tensor | None] = field(default_factory=dict[int, "Tensor | None"])
    deducted: set[int] = field(default_factory=set[int])


def compensate(
    grad: Tensor,
    residual: Tensor | None,
    out: Tensor,
    layout: Layout,
    k: int,  # noqa: ARG001
    flags: Tensor,
    floor: Tensor | None = None,
) -> Working:
    """Writes grad + residual, twice."""
    check_floor(floor, out, layout)
    out.copy_(grad)
    if residual is not None:
        out.add_(residual)
    raise_flag(flags, wire.NONFINITE, ~out.isfinite())
    return Dense(out, layout, out.clone(), flags, writable=True)


def survey(
    x: Tensor,
    layout: Layout,
    k: int,  # noqa: ARG001
    flags: Tensor,
    floor: Tensor | None = None,
) -> Working:
    """Writes a copy of x, for the sums."""
    check_working(x, layout)
    check_floor(floor, x, layout)
    raise_flag(flags, wire.NONFINITE, ~x.isfinite())
    return Dense(x, layout, x.clone(), flags, writable=False)


def select(work: Working, block: int, k: int) -> tuple[Tensor, Tensor]:
    """Positions and sums of the k largest magnitudes."""
    dense, sums = _open(work, block)
    check_k("select", k, dense.layout.length)
    index = dense.chosen[block] = magnitude(sums).sort(descending=True, stable=True).indices[:k].sort().values
    return index, sums[index]


def count_above(work: Working, block: int, threshold: float) -> int:
    """How many magnitudes exceed the threshold."""
    _, sums = _open(work, block)
    return int((magnitude(sums) > key_of(threshold, sums.dtype)).sum())


def above(work: Working, block: int, threshold: float, k: int) -> tuple[Tensor, Tensor]:
    """The first k above the threshold, then the first others, in order."""
    dense, sums = _open(work, block)
    check_k("above", k, dense.layout.length)
    over = magnitude(sums) > key_of(threshold, sums.dtype)
    index = dense.chosen[block] = over.to(torch.uint8).sort(descending=True, stable=True).indices[:k].sort().values
    return index, torch.where(over, sums, 0)[index]


def merge(work: Working, block: int, index: Tensor, value: Tensor) -> None:
    """Adds to the sums."""
    dense = _dense(work)
    if block not in dense.chosen:
        add_to(dense.sums, index, value, dense.layout, block, dense.flags, saturating=False)
        return
    if block not in dense.deducted:
        raise SparcommError(f"block {block} has been selected from, but nothing deducted: nothing can be merged yet")
    dense.chosen[block] = None
    add_to(dense.sums, index, value, dense.layout, block, dense.flags, saturating=True)


def deduct(work: Working, block: int, value: Tensor) -> None:
    """Takes what was sent from the sums."""
    dense = _dense(work)
    chosen = dense.chosen.get(block)
    if chosen is None or value.shape != chosen.shape:
        raise SparcommError(f"block {block}: {value.numel()} values to deduct, but as many must have been selected")
    subtract(dense.sums, chosen, value, dense.layout, block)
    dense.deducted.add(block)


def settle(work: Working, block: int, index: Tensor) -> None:
    """Writes sums to out."""
    dense = _dense(work)
    if not dense.writable:
        raise SparcommError("the sums of a survey cannot be settled: its vector is only read")
    scatter(dense.out, index, gather(dense.sums, index, dense.layout, block), dense.layout, block)


def top(index: Tensor, value: Tensor, k: int) -> Tensor:
    """Places of the k largest magnitudes."""
    check_pair(index, value)
    check_k("top", k, value.numel())
    return magnitude(value).sort(descending=True, stable=True).indices[:k].sort().values


def sample(grad: Tensor, residual: Tensor | None, count: int) -> Tensor:
    """One element of each share."""
    n = grad.numel()
    check_sample(grad, residual, count)
    place = torch.arange(min(count, n), device=grad.device)
    if n > count:
        chance = ((place * -0x61C8864680B583EB) >> 40) & 0xFFFFFF  # 0x9E3779B97F4A7C15, as int64 has it
        within = place * (n % count) + ((chance * n) >> 24)  # i n / count in parts, which do not overflow
        place = place * (n // count) + torch.div(within, count, rounding_mode="floor")
    drawn = grad[place].to(working_dtype(grad.dtype))
    return drawn if residual is None else drawn + residual[place]


def _dense(work: Working) -> Dense:
    if not isinstance(work, Dense):
        raise SparcommError(f"{type(work).__name__} was not made by this implementation's compensate")
    return work


def _open(work: Working, block: int) -> tuple[Dense, Tensor]:
    """The sums of a block that has not been selected from, padding included."""
    dense = _dense(work)
    if block in dense.chosen:
        raise SparcommError(f"block {block} has been selected from already: nothing can be merged or selected again")
    everywhere = torch.arange(dense.layout.length, device=dense.sums.device)
    return dense, gather(dense.sums, everywhere, dense.layout, block)
