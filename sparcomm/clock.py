"""Where a step's time goes: seconds per phase, and ranges in PyTorch's profiler.

What a profile shows, from the outside in: ``sparcomm::bucket 2`` where DDP hands a bucket over; then, where the work is
done, ``sparcomm::step 12`` around each of the step's jobs, ``sparcomm::unit 3 spardl`` around one unit, in it
``sparcomm::select``, ``sparcomm::code`` and ``sparcomm::wire``, and in these what is done, by the field's names:
``compensate``, ``encode``, ``exchange``, ``all_to_all``, ``all_gather``, ``all_reduce``, ``decode``, ``merge``,
``settle``, ``vote``, ``mean``; and ``sparcomm::commit``. On Gloo that work is done by a thread of its own, which
PyTorch's profiler records only with ``profile_all_threads``: see docs/watching.md.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import torch
from torch.profiler import record_function

PHASES = ("select", "code", "wire")


class Clock:
    """Adds up host seconds per phase (on CUDA: the time to enqueue, since nothing here waits for the device)."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def span(self, phase: str) -> AbstractContextManager[None]:
        """Times the body under ``phase``, one of PHASES; a range ``sparcomm::<phase>`` while a profiler runs."""
        return _Span(self.seconds, phase)


def added(clocks: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Seconds by phase, of all of them."""
    known = list(clocks)
    return {phase: sum(seconds.get(phase, 0.0) for seconds in known) for phase in PHASES}


class Range(AbstractContextManager[None]):
    """A range ``sparcomm::<name>`` in PyTorch's profile while a profiler runs; else nothing.

    A class and no generator, and a profiler's range only if there is a profiler: a step has dozens of them.
    """

    __slots__ = ("_name", "_range")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        # One flag for all threads, unlike torch.autograd._profiler_enabled(): most ranges are on the hook's worker.
        if getattr(torch.autograd.profiler, "_is_profiler_enabled", True):
            self._range = record_function(f"sparcomm::{self._name}")
            self._range.__enter__()
        else:
            self._range = None

    def __exit__(self, *error: object) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)


class _Span(Range):
    """A range that is timed."""

    __slots__ = ("_seconds", "_start")

    def __init__(self, seconds: defaultdict[str, float], phase: str) -> None:
        super().__init__(phase)
        self._seconds = seconds

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._seconds[self._name] += time.perf_counter() - self._start
