"""A time limit for MPI's blocking calls, which know none and cannot be left: when it has passed, all ranks are ended.

One thread of the process, which sleeps until the earliest limit. Entering a call wakes it only if that is earlier than
what it sleeps for, so that of many calls with the same limit one does, and the others cost a microsecond.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType

from sparcomm.transport.mpi.ending import end_job


class Guard:
    """A context in which a blocking call has to end, or the job does.

    Args:
        limit: seconds.
        where: says what the call is, and for whom it waits.
    """

    __slots__ = ("deadline", "limit", "thread", "where")

    def __init__(self, limit: float, where: Callable[[], str]) -> None:
        self.limit, self.where = limit, where
        self.deadline, self.thread = math.inf, 0

    def __enter__(self) -> None:
        self.deadline, self.thread = time.monotonic() + self.limit, threading.get_ident()
        _WATCHDOG.watch(self)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        _WATCHDOG.calls.discard(self)


class _Watchdog:
    """The thread, and the calls it watches.

    Attributes:
        calls: under way. Entered and left without the lock.
    """

    def __init__(self) -> None:
        self.calls: set[Guard] = set()
        self._changed = threading.Condition()
        self._until = math.inf  # when it will look again; inf: it has to be woken
        self._thread: threading.Thread | None = None

    def watch(self, call: Guard) -> None:
        """From now on. A call that is entered while the thread looks is seen, or finds ``_until`` to be inf."""
        self.calls.add(call)
        if call.deadline < self._until:
            with self._changed:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="sparcomm-mpi-watchdog", daemon=True)
                    self._thread.start()
                self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._until = math.inf
                calls = self.calls.copy()
                self._until = min((call.deadline for call in calls), default=math.inf)
                left = self._until - time.monotonic()
                if left > 0:
                    self._changed.wait(None if left == math.inf else left)
                    continue
            for call in calls:
                if call.deadline <= time.monotonic() and call in self.calls:
                    _give_up(call)


def _give_up(call: Guard) -> None:
    frame = sys._current_frames().get(call.thread)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    stack = "".join(traceback.format_stack(frame)).rstrip()
    text = f"{call.where()}: not through within {call.limit:g} s: a rank is stuck or gone"
    end_job(f"{stack}\nsparcomm.errors.PeerError: {text}", f"PeerError: {text}")


_WATCHDOG = _Watchdog()
