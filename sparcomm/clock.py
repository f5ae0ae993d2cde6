"""Where a step's time goes: seconds per phase, and the same names as ranges in PyTorch's profiler."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import AbstractContextManager

import torch
from torch.profiler import record_function

PHASES = ("select", "code", "wire")


class Clock:
    """Adds up host seconds per phase (on CUDA: the time to enqueue, since nothing here waits for the device)."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def span(self, phase: str) -> AbstractContextManager[None]:
        """Times the body under ``phase``, one of PHASES; a range ``sparcomm.<phase>`` while a profiler runs."""
        return _Span(self.seconds, phase)


class _Span(AbstractContextManager[None]):
    """A class and no generator, and a profiler's range only if there is a profiler: a step has dozens of spans."""

    __slots__ = ("_phase", "_range", "_seconds", "_start")

    def __init__(self, seconds: defaultdict[str, float], phase: str) -> None:
        self._seconds, self._phase = seconds, phase

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        # One flag for all threads, unlike torch.autograd._profiler_enabled(): spans run on the hook's worker.
        profiled: bool = getattr(torch.autograd.profiler, "_is_profiler_enabled", True)
        self._range = record_function(f"sparcomm.{self._phase}") if profiled else None
        if self._range is not None:
            self._range.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
        self._seconds[self._phase] += time.perf_counter() - self._start
