"""``auto_off``: times the first steps both ways, and leaves compression off where it does not pay.

The rival is the honest one: a bfloat16 all-reduce by the backend itself that overlaps with the backward pass, as
PyTorch's own ``bf16_compress_hook``. What is compared is the time from one step's first bucket to the next one's, so
everything that a step waits for is in it, and what is hidden behind the backward pass is not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparcomm.algorithms.base import Cost, Reduced, State
from sparcomm.algorithms.dense import Dense
from sparcomm.collectives.bags import all_finite
from sparcomm.ddp.log import RankLogger, switched
from sparcomm.ddp.plan import Mode
from sparcomm.dtypes import working_dtype
from sparcomm.memory import compensated
from sparcomm.transport.base import Transport

STEPS = 5  # timed each way, after one untimed


@dataclass(frozen=True)
class HalfDense(Dense):
    """The backend's all-reduce of bfloat16 values (float16 gradients stay float16); rounding errors are lost."""

    name: ClassVar[str] = "dense in bfloat16"
    native: bool = True

    def _reduce(self, grad: Tensor, residual: Tensor | None, state: State, step: int, transport: Transport) -> Reduced:
        n, space = grad.numel(), state.workspace
        sent = space.take(n, _half(grad.dtype), grad.device).copy_(compensated(grad, residual))
        with state.clock.span("wire"):
            transport.all_reduce(sent, native=True)
        total = space.take(n, working_dtype(grad.dtype), grad.device).copy_(sent)
        space.give(sent)
        return Reduced(total, None, None, state, all_finite(total))

    def cost(self, n: int, dtype: torch.dtype, size: int, state: State | None = None) -> Cost:
        """Exact."""
        return super().cost(n, _half(dtype), size, state)


def _half(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize == 2 else torch.bfloat16


class Trial:
    """Alternates between both ways, and settles which one stays. Every rank makes the same calls at the same steps.

    Attributes:
        verdict: "sparse" or "dense" once it is settled.
    """

    def __init__(self, verdict: str | None = None) -> None:
        self.verdict = verdict
        self._times: dict[Mode, list[float]] = {"sparse": [], "dense": []}
        self._mode: Mode = "dense"
        self._began: float | None = None

    def pause(self) -> None:
        """A step of another kind begins: neither it nor the one before is timed."""
        self._began = None

    def begin(self, step: int, gather: Callable[[list[float]], Tensor], log: RankLogger) -> Mode:
        """The mode of the step that begins now, or any once there is a verdict. ``gather``: one row from every rank."""
        now = time.perf_counter()
        if self._began is not None:
            self._times[self._mode].append(now - self._began)
        if all(len(taken) > STEPS for taken in self._times.values()):
            self._settle(step, gather, log)
            return "sparse"
        self._mode = "dense" if self._mode == "sparse" else "sparse"
        self._began = time.perf_counter()
        return self._mode

    def _settle(self, step: int, gather: Callable[[list[float]], Tensor], log: RankLogger) -> None:
        # The first of each is not counted: buffers are new, and DDP may have rebuilt its buckets.
        mine = [statistics.median(self._times["sparse"][1:]), statistics.median(self._times["dense"][1:])]
        sparse, dense = gather(mine).mean(0).tolist()
        self.verdict = "sparse" if sparse < dense else "dense"
        switched(log, step, sparse, dense, off=self.verdict == "dense")
