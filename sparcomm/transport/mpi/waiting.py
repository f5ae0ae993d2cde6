"""Waiting for MPI with a time limit: by looking again and again, first at once, then with growing pauses.

MPI moves data while it is called, and its own waits have no limit and no end when a peer gives up. A look costs about
a microsecond. The pauses follow how long the wait has lasted already, so that they add little to it, and start again
after a look that took long: that one has moved data, and there is more of it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence

from sparcomm.transport.mpi.library import MPI

BRISK = 3e-4  # seconds without a pause; the processor is offered to others, since ranks may outnumber cores
WORKED = 2e-5  # a look that took longer than so many seconds has moved data
SHORTEST, LONGEST = 5e-5, 1e-3  # pauses
LISTEN = 2e-3  # seconds between two looks at the notices

# What MPI may still read or write after a wait was given up: must not be freed.
_stranded: list[object] = []


class Interrupted(Exception):
    """A wait that has ended without its cause: time ran out, or a notice came."""


def wait(done: Callable[[], bool], limit: float, listen: Callable[[], str]) -> None:
    """Returns when ``done()``.

    Args:
        limit: seconds.
        listen: what has made waiting pointless; "" = nothing.

    Raises:
        Interrupted: with what ``listen`` said, or that time ran out.
    """
    if done():
        return
    start = busy = heard = time.monotonic()
    pause = SHORTEST
    while True:
        before = time.monotonic()
        if done():
            return
        now = time.monotonic()
        if now - before > WORKED:
            busy, pause = now, SHORTEST
        if now - heard > LISTEN:
            heard = now
            if (told := listen()) and not done():
                raise Interrupted(told)
            if now - start > limit:
                raise Interrupted(f"nothing within {limit:g} s")
        if now - busy < BRISK:
            os.sched_yield()
        else:
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST)


def pending(requests: Sequence[MPI.Request]) -> list[int]:
    """Numbers of the requests that are not complete."""
    return [i for i, request in enumerate(requests) if not request.Test()]


def strand(requests: Sequence[MPI.Request], *buffers: object) -> None:
    """Gives up requests: receives are cancelled, and what is under way keeps its memory for good."""
    for i in pending(requests):
        with contextlib.suppress(MPI.Exception):  # a collective cannot be cancelled
            requests[i].Cancel()
        if not requests[i].Test():
            _stranded.append((requests[i], buffers))
