"""A whole step of SparDL on the device: the ranks of a simulation take turns on it, and phases are timed apart.

Two measurements, since phases cannot be told apart on a device without waiting for it at each of their ends: first
the time of all ranks' steps with no wait but where the algorithm itself has one, then once more with waits. A rank's
step is the time of all of them over their number; what is neither selection nor coding is the simulator's copying of
messages and Python.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparcomm.algorithms import State, registry
from sparcomm.clock import Clock
from sparcomm.ddp.mean import write_mean
from sparcomm.transport import sim
from sparcomm.transport.base import Transport

PATIENCE = 600.0  # seconds that a simulated step may take


class Phases(NamedTuple):
    """Median seconds of one rank's step, and how they fall into phases where the host waits for each of them.

    ``rest`` is that of ``waiting``, the step with waits, which ``select`` and ``code`` are parts of, too.
    """

    step: float
    waiting: float
    select: float
    code: float
    rest: float


class _WaitingClock(Clock):
    """A clock whose phases end when the device has done what was enqueued in them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def span(self, phase: str) -> AbstractContextManager[None]:
        """Times the body, and all that it has enqueued."""
        return self._waiting(phase)

    @contextmanager
    def _waiting(self, phase: str) -> Iterator[None]:
        _wait(self.device)
        with super().span(phase):
            yield
            _wait(self.device)


class Steps:
    """Steps of p ranks on one device: each with normal gradients of its own, residuals from the second step on."""

    def __init__(self, n: int, density: float, ranks: int, device: torch.device) -> None:
        random = torch.Generator(device).manual_seed(0)
        spardl: Any = registry()["spardl"]
        self.algorithm = spardl(density=density, values="bfloat16")
        self.device, self.ranks, self.number = device, ranks, 0
        self.grads = [torch.randn(n, device=device, generator=random) for _ in range(ranks)]
        self.mean = torch.empty_like(self.grads[0])  # of each rank in its turn: all write the same
        self.residuals: list[Tensor | None] = [None] * ranks
        self.states = [self.algorithm.init(n, torch.float32, device, ranks) for _ in range(ranks)]
        for state in self.states:
            state.wants_sent = state.wants_total = False

    def step(self) -> float:
        """All ranks' next step; seconds until the device has done it."""
        _wait(self.device)
        start = time.perf_counter()
        sim.run(self.ranks, self._rank, timeout=PATIENCE)
        _wait(self.device)
        self.number += 1
        return time.perf_counter() - start

    def _rank(self, transport: Transport) -> None:
        rank = transport.rank
        residual, state = self.residuals[rank], self.states[rank]
        reduced = self.algorithm.reduce(self.grads[rank], residual, state, self.number, transport)
        with state.clock.span("code"):
            write_mean(reduced, self.mean, self.ranks)
        state.workspace.give(reduced.total, None if residual is reduced.residual else residual)
        self.residuals[rank], self.states[rank] = reduced.residual, reduced.state

    def seconds(self, phase: str) -> float:
        """Spent by all ranks together so far."""
        states: list[State] = self.states
        return sum(state.clock.seconds[phase] for state in states)


def room(ranks: int) -> int:
    """Bytes of memory for each of n elements: gradient, residual and the next one of each rank, and lists."""
    return 16 * ranks + 8


def phases(n: int, density: float, ranks: int, repeat: int, device: torch.device) -> Phases:
    """Medians of ``repeat`` steps each, after two that are not counted."""
    steps = Steps(n, density, ranks, device)
    for _ in range(2):
        steps.step()
    free = statistics.median(steps.step() for _ in range(repeat))
    for state in steps.states:
        state.clock = _WaitingClock(device)
    found: list[tuple[float, float, float]] = []
    for _ in range(repeat):
        before = [steps.seconds(phase) for phase in ("select", "code")]
        whole = steps.step()
        select, code = (steps.seconds(phase) - b for phase, b in zip(("select", "code"), before, strict=True))
        found.append((whole, select, code))
    waiting, select, code = (statistics.median(column) / ranks for column in zip(*found, strict=True))
    return Phases(free / ranks, waiting, select, code, waiting - select - code)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
