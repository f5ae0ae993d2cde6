"""Where a step's time goes: seconds per phase, and the same names as ranges in PyTorch's profiler."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import record_function

PHASES = ("select", "code", "wire")


class Clock:
    """Adds up host seconds per phase (on CUDA: the time to enqueue, since nothing here waits for the device)."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """Times the body under ``phase``, one of PHASES."""
        start = time.perf_counter()
        try:
            with record_function(f"sparcomm.{phase}"):
                yield
        finally:
            self.seconds[phase] += time.perf_counter() - start
