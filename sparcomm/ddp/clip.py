"""Gradient clipping that knows the dense norm.

The mean that error feedback delivers comes in bursts: its norm is up to sqrt(1 / density) times that of the dense mean,
so a limit meant for the dense mean would cut what is no outlier, and what it cut would be lost for good. The dense
norm itself would take a dense all-reduce, but it is at most the mean over ranks of the local gradients' norms.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sparcomm.ddp.numbers import gather_numbers
from sparcomm.ddp.reduction import Reducer, keeper
from sparcomm.ddp.units import Partition, Unit
from sparcomm.dtypes import working_dtype
from sparcomm.errors import ConfigError

UNUSED = 8  # steps after which norms are measured no longer, unless somebody has asked for them by then
_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_ has it


class NormBound:
    """The bound of every step, once ``ask`` has been called: gathered by the step itself, behind its last unit."""

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = reducer
        self._asked = False
        self._local: Tensor | None = None
        self._bound: Tensor | None = None

    def after_step(self, completed: int) -> None:
        """Called by the worker when a step's units are reduced; collective once asked for."""
        squares = list(self._reducer.norms.values())
        self._local = self._bound = None
        if squares:
            self._local = torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt()
        if self._asked and self._local is not None:
            everyone = gather_numbers(self._reducer.transport, self._local, self._local.device)
            self._bound = everyone.mean()
        if completed >= UNUSED and not self._asked:
            self._reducer.records_norms = False

    def ask(self, exchange: Callable[[Any], list[Any]]) -> Tensor | None:
        """() float64: mean over ranks of the norms of what this step's algorithm was fed; None if they are unknown.

        The first call is collective by ``exchange`` (through the store), which also finds a rank that does not call.
        """
        if self._asked:
            return self._bound
        told: list[float | None] = exchange(None if self._local is None else float(self._local))
        self._asked = self._reducer.records_norms = True
        known = [t for t in told if t is not None]
        if len(known) == len(told):
            self._bound = torch.tensor(sum(known) / len(known), dtype=torch.float64, device="cpu")
        return self._bound


def check_limit(max_norm: Any) -> float:
    """Raises ConfigError unless ``max_norm`` is a positive number."""
    if isinstance(max_norm, Tensor):
        max_norm = float(max_norm)
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or not max_norm > 0:
        raise ConfigError(f"max_norm={max_norm!r}: must be a positive number")
    return float(max_norm)


@torch.no_grad()
def clip_(
    params: Iterable[Tensor], bound: Tensor | None, max_norm: float, put_back: Callable[[Tensor, Tensor], None] | None
) -> Tensor:
    """Scales the gradients of ``params`` by min(1, max_norm / bound), in place; returns the bound, ().

    Args:
        bound: on the norm of the dense mean; None: the norm of the gradients themselves is taken, with a warning.
        put_back: gets (parameter, what was cut off its gradient), if given.
    """
    with_grad = [p for p in params if p.grad is not None]
    grads = [p.grad for p in with_grad if p.grad is not None]
    if bound is None:
        warnings.warn(
            "clip_grad_norm_ was first called after norms were no longer measured: this once it goes by the norm of "
            "the compressed mean",
            RuntimeWarning,
            stacklevel=3,
        )
        flat = [g.coalesce().values() if g.is_sparse else g for g in grads]
        norms = [torch.linalg.vector_norm(g, dtype=working_dtype(g.dtype)) for g in flat]
        norms = norms or [torch.zeros((), device="cpu")]
        bound = torch.stack([n.to(norms[0].device) for n in norms]).double().norm()
    factor = torch.where(bound.isfinite(), (max_norm / (bound + _EPSILON)).clamp(max=1.0), 1.0)
    if bound.device.type == "cpu" and float(factor) == 1.0:  # within the limit, or not finite: left as it is
        return bound
    for p, g in zip(with_grad, grads, strict=True):
        if put_back is not None:
            whole = g.clone()
            g.mul_(factor.to(g.device, g.dtype))
            put_back(p, whole.sub_(g))
        else:
            g.mul_(factor.to(g.device, g.dtype))
    return bound


class PutBack:
    """Gives what clipping cut off the mean back to error feedback: whole, to one rank's residual of each unit."""

    def __init__(self, partition: Partition, reducer: Reducer, step: int) -> None:
        self._partition, self._reducer, self._step = partition, reducer, step
        self._open: dict[Unit, Tensor] = {}

    def __call__(self, param: Tensor, cut: Tensor) -> None:
        """``cut``: of a mean, so size times as much is owed in sum."""
        unit = self._partition.unit_of(param)
        size, rank = self._reducer.transport.size, self._reducer.transport.rank
        if unit is None or keeper(self._step, unit.number, size) != rank:
            return
        if unit not in self._open:
            dtype = working_dtype(unit.dtype)
            owed = torch.zeros(unit.numel, dtype=dtype, device=unit.device)
            if unit.residual is not None:
                owed.copy_(unit.residual)
            self._open[unit] = owed
        span = next(span for p, span in unit.spans() if p is param)
        self._open[unit][span].add_(cut.reshape(-1), alpha=size)

    def close(self) -> None:
        """Stores the residuals."""
        for unit, owed in self._open.items():
            rank, space = self._reducer.transport.rank, unit.state.workspace
            unit.residual = self._reducer.storage.keep(owed, self._step, unit.number, rank, space)
