"""Algorithms that fail on rank 1 in every way a row of the bench can, and one that cannot be made."""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparcomm.algorithms.base import Reduced, State
from sparcomm.algorithms.topk import TopKAllGather
from sparcomm.transport.base import Transport


@dataclass(frozen=True)
class Faulty(TopKAllGather):
    """Works until ``step`` on all ranks, and fails there on rank 1."""

    name: ClassVar[str] = "faulty"
    step: int = 2

    def _reduce(self, grad: Tensor, residual: Tensor | None, state: State, step: int, transport: Transport) -> Reduced:
        if step == self.step and transport.rank == 1:
            self.fail()
        return super()._reduce(grad, residual, state, step, transport)

    def fail(self) -> None:
        raise ValueError("this rank\nhas had enough")


@dataclass(frozen=True)
class Aborting(Faulty):
    """As Gloo ends a process when sizes differ."""

    def fail(self) -> None:
        print("terminate called after nothing in particular", file=sys.stderr, flush=True)
        os.abort()


@dataclass(frozen=True)
class Late(Faulty):
    """Its connections break long before it says why, so that its peers complain first."""

    name: ClassVar[str] = "late"
    step: int = 1

    def _reduce(self, grad: Tensor, residual: Tensor | None, state: State, step: int, transport: Transport) -> Reduced:
        if step == self.step and transport.rank == 1:
            transport.close()
            time.sleep(1.2)
        return super()._reduce(grad, residual, state, step, transport)


@dataclass(frozen=True)
class Hanging(Faulty):
    def fail(self) -> None:
        threading.Event().wait()


@dataclass(frozen=True)
class Leaving(Faulty):
    """Ends without a word."""

    def fail(self) -> None:
        os._exit(7)
