"""Dense all-reduce: every element of every gradient, as PyTorch does it, or in rank order with checked bags.

The ordered form costs what a ring all-reduce costs, 2n(p-1)/p elements a rank, in 1 + ceil(log2 p) rounds, and gives
the same bits on every backend; 16-bit gradients are summed and sent as float32. ``native=True`` is the backend's own
all-reduce in the gradient's own dtype: the baseline that everything is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparcomm.algorithms.base import Algorithm, Cost, Reduced, State
from sparcomm.collectives.bags import Bags, all_finite
from sparcomm.collectives.dense import dense_traffic, ordered_all_reduce
from sparcomm.dtypes import working_dtype
from sparcomm.errors import ConfigError
from sparcomm.kernels import kernels_for
from sparcomm.memory import compensated
from sparcomm.transport.base import Transport


@dataclass(frozen=True)
class Dense(Algorithm):
    """The exact sum of all gradients.

    Args:
        native: use the backend's own all_reduce. Its last bit may differ between backends, its bytes are booked by
            formula, and damaged bytes are the backend's to find.
    """

    name: ClassVar[str] = "dense"
    native: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.native, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"native={self.native!r}: must be True or False")

    @property
    def conserves(self) -> bool:
        """True, but for ``native``: what rounding in a 16-bit sum loses is then gone."""
        return not self.native

    @property
    def ordered(self) -> bool:
        """Unless ``native``."""
        return not self.native

    @property
    def checked(self) -> bool:
        """Whether bytes travel in bags: not with ``native``."""
        return not self.native

    @classmethod
    def cases(cls, size: int) -> list[Algorithm]:
        """Both forms."""
        return [cls(), cls(native=True)]

    def _reduce(self, grad: Tensor, residual: Tensor | None, state: State, step: int, transport: Transport) -> Reduced:
        n, working, space = grad.numel(), working_dtype(grad.dtype), state.workspace
        if self.native:
            sent = space.take(n, grad.dtype, grad.device)
            sent.copy_(grad if residual is None else compensated(grad, residual))
            with state.clock.span("wire"):
                transport.all_reduce(sent, native=True)
            total = sent
            if grad.dtype != working:
                total = space.take(n, working, grad.device).copy_(sent)
                space.give(sent)
            return Reduced(total, None, None, state, all_finite(total))
        bags = Bags(kernels_for(grad), state.unit, step, grad.device, state.damage)
        total = space.take(n, working, grad.device)
        ordered_all_reduce(compensated(grad, residual), total, bags, transport, state.clock, space)
        state.damage = bags.damage()
        return Reduced(total, None, None, state, bags.ok())

    def delivers_all(self, n: int, dtype: torch.dtype, size: int) -> bool:
        """Always."""
        return True

    def cost(self, n: int, dtype: torch.dtype, size: int, state: State | None = None) -> Cost:
        """Exact."""
        if not self.native:
            return Cost(*dense_traffic(n, working_dtype(dtype).itemsize, size))
        if n == 0:
            return Cost(0, 0, 0)
        return Cost(2 * (size - 1), 2 * (size - 1), 2 * (size - 1) * n * dtype.itemsize // size)

    def kept(self, n: int, size: int) -> int:
        """All n."""
        return n
