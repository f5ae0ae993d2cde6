"""``flush``: what all ranks owe, delivered at once, densely, outside of any step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparcomm.algorithms.dense import Dense
from sparcomm.ddp.mean import write_mean
from sparcomm.ddp.options import rates
from sparcomm.ddp.reduction import Reducer
from sparcomm.ddp.units import Unit
from sparcomm.dtypes import working_dtype


def deliver(unit: Unit, reducer: Reducer, number: int) -> Tensor | None:
    """(n,) working dtype: the mean over ranks of what is owed for ``unit``; None if any is not finite. Collective.

    It is still owed: a rank may yet fail in the next unit's exchange.
    """
    transport, space = reducer.transport, unit.state.workspace
    transport.context = f"flush after step {number}, unit {unit.number}"
    dtype = working_dtype(unit.dtype)
    optimizer, follows = reducer.options.optimizer, reducer.options.lr_clamp is not None
    owed = reducer.owed(unit, rates(optimizer, unit.params) if follows and optimizer is not None else {}, space)
    if owed is None:
        owed = torch.zeros(unit.numel, dtype=dtype, device=unit.device)
    reduced = Dense().reduce(owed, None, unit.state, number, transport)
    mean = torch.empty(unit.numel, dtype=dtype, device=unit.device)
    ok, _ = write_mean(reduced, mean, transport.size)
    space.give(reduced.total, None if owed is unit.residual else owed)
    return mean if bool(ok) else None


def settle(units: Sequence[Unit], means: Sequence[Tensor | None]) -> None:
    """Nothing is owed any more for the units that have a mean: all have been delivered."""
    for unit, mean in zip(units, means, strict=True):
        if mean is not None:
            unit.state.workspace.give(unit.residual)
            unit.residual = None


@torch.no_grad()
def add_to_gradients(unit: Unit, mean: Tensor, scale: Tensor | None) -> None:
    """Adds the mean to ``.grad`` of the unit's parameters, which is made where there is none."""
    for p, span in unit.spans():
        part = mean[span].view(p.shape)
        if scale is not None:
            part = part * scale.to(part.device)
        if p.grad is None:
            p.grad = part.to(p.dtype, copy=True)
        else:
            p.grad.add_(part)
