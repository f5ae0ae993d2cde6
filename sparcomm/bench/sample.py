"""What one rank's process measures, and the clock it measures with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from sparcomm.transport.base import Traffic

Progress = Callable[[int], None]


@dataclass
class Sample:
    """One rank's measurement of one row; plain numbers only, since it travels as JSON.

    Attributes:
        seconds, cpu: of every timed step; cpu is user and system time of all threads of the process.
        bytes_sent, rounds, messages: of one step.
        kept: non-zero entries of the first step's mean.
        energy: of the first step, see gradient.captured; on rank 0 only.
        cost: rounds, messages and bytes as ``cost()`` says; None for what is not ours.
        bound: whether that is a bound only.
        link_bytes: that left this host's interface in one step, headers included; None where it serves others, too.
        extra: further entries of the row.
    """

    seconds: list[float]
    cpu: list[float]
    bytes_sent: int
    rounds: int
    messages: int
    kept: int | None = None
    energy: float | None = None
    cost: list[int] | None = None
    bound: bool = False
    link_bytes: float | None = None
    extra: dict[str, Any] = field(default_factory=dict[str, Any])


class Stopwatch:
    """Times steps that follow one another without a gap: each lasts from the end of the one before to its own.

    Args:
        progress: told the number of every step that ends.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress, self._number = progress, 0
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def start(self) -> None:
        """The first timed step begins."""
        self.wall, self.cpu = [time.perf_counter()], [time.process_time()]

    def tick(self) -> None:
        """A step, timed or not, has ended."""
        if self.wall:
            self.wall.append(time.perf_counter())
            self.cpu.append(time.process_time())
        self._number += 1
        self._progress(self._number)

    @property
    def seconds(self) -> list[float]:
        """Of every timed step."""
        return _differences(self.wall)

    @property
    def cpu_seconds(self) -> list[float]:
        """Of every timed step."""
        return _differences(self.cpu)


class Counted:
    """What a rank's traffic, and its link, grow by over some steps."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._before = vars(traffic).copy()
        self._link = link_bytes()

    def per_step(self, steps: int) -> dict[str, Any]:
        """Sample's counters, divided by ``steps``."""
        grown = {name: round((after - self._before[name]) / steps) for name, after in vars(self._traffic).items()}
        now = link_bytes()
        link = None if now is None or self._link is None else (now - self._link) / steps
        return {name: grown[name] for name in ("bytes_sent", "rounds", "messages")} | {"link_bytes": link}


def link_bytes() -> int | None:
    """Bytes that have left the interface Gloo was told to use, if this rank has a network namespace of its own."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if name in ("", "lo") or os.environ.get("LOCAL_WORLD_SIZE") != "1":
        return None
    try:
        lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        interface, colon, numbers = line.partition(":")
        if colon and interface.strip() == name:
            return int(numbers.split()[8])
    return None


def _differences(marks: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(marks)]
