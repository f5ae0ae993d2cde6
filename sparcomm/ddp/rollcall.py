"""Who is to blame when a wait on other ranks has failed: a roll call that only those still alive can answer.

A broken wait names the ranks it waited for, which may be innocent: rank 1 waits for rank 0, who waits for rank 3, who
has been stopped. So the first rank that fails raises an alarm in the store, every process that runs answers it with
where it stands, and what is missing or odd in the answers is the cause. Nothing here ever ends a step: a slow answer
can make a message less exact, but cannot stop a healthy run.

A thread per hook looks for the alarm a few times a second. Between failures that one look-up is all there is.
"""

from __future__ import annotations

import json
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from sparcomm.ddp.stores import Host

_ALARM = "alarm"  # counts the roll calls of a hook


class Pace(NamedTuple):
    """Seconds between two looks for the alarm, and seconds that the ranks have to answer it."""

    period: float
    limit: float


def pace_of(timeout: float) -> Pace:
    """A roll call takes at most a third of the hook's timeout, and at most 2.5 s."""
    return Pace(min(0.25, max(0.02, timeout / 12)), min(2.5, timeout / 3))


class Standing(NamedTuple):
    """Where a rank stands.

    Attributes:
        step: the number of steps it has ended, which is the number of the step it is in or about to begin.
        busy: whether it is inside a step, that is, waits for others or is on its way to them.
        seconds: how long it has been outside of steps; 0 if busy.
        left: what it did instead of taking part further; "" = it takes part.
    """

    step: int
    busy: bool = True
    seconds: float = 0.0
    left: str = ""


def verdict(rank: int, step: int, standings: Mapping[int, Standing | None]) -> tuple[tuple[int, ...], str]:
    """The ranks that kept ``rank`` waiting in ``step``, and what each has done; ``()`` and "" if nothing tells.

    Args:
        standings: of all other ranks; None = no answer.
    """
    others = {r: s for r, s in sorted(standings.items()) if r != rank}
    silent = [r for r, s in others.items() if s is None]
    # Whoever has ended this step already owes nothing to it, and may leave or rest.
    behind = {r: s for r, s in others.items() if s is not None and s.step <= step}
    left = {r: f"rank {r} has left: {s.left}" for r, s in behind.items() if s.left}
    sentences = list(left.values())
    if silent:
        do, be = ("does", "is") if len(silent) == 1 else ("do", "are")
        sentences.append(f"{_ranks(silent)} {do} not answer: killed or stopped, or {be} cut off from the store")
    if sentences:
        return tuple(sorted([*left, *silent])), "; ".join(sentences)
    late = {
        r: f"rank {r} has not come to step {step}: it runs, but has been in its own code for {s.seconds:.1f} s"
        for r, s in behind.items()
        if not s.busy
    }
    return tuple(late), "; ".join(late.values())


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def call(store: Any, rank: int, size: int, pace: Pace) -> dict[int, Standing | None]:
    """Raises the alarm and collects what the other ranks say; None = no answer.

    Takes up to ``pace.limit``, and less if all answer or have left.
    """
    found: dict[int, Standing | None] = dict.fromkeys((r for r in range(size) if r != rank), None)
    number = store.add(_ALARM, 1)
    begun = heard = time.monotonic()
    while None in found.values():
        for r in [r for r, s in found.items() if s is None]:
            found[r] = look_up(store, r, number)
            heard = time.monotonic() if found[r] is not None else heard
        now = time.monotonic()
        # All that run answer within one period of each other; who is later than three is not coming.
        if now > begun + min(pace.limit, 4 * pace.period) and now > min(heard + 3 * pace.period, begun + pace.limit):
            break
        time.sleep(min(0.02, pace.period / 4))
    return found


def look_up(store: Any, rank: int, number: int = 0) -> Standing | None:
    """What a rank has said: that it has left, or its answer to that roll call; None = nothing yet."""
    for key in (f"left/{rank}", f"here/{rank}/{number}"):
        if store.check([key]):
            return Standing(*json.loads(store.get(key)))
    return None


class Stands(Protocol):
    """Whatever knows where its rank stands."""

    def standing(self) -> Standing:
        """Where it stands. Any thread may ask, at any time."""
        ...


def standing_of(owner: Stands) -> Callable[[], Standing | None]:
    """Its ``standing``, None once it is gone; does not keep it alive."""
    held = weakref.ref(owner)

    def ask() -> Standing | None:
        owner = held()
        return None if owner is None else owner.standing()

    return ask


class Pulse:
    """Answers the alarm, and says good-bye. Holds a thread until ``stop``.

    Args:
        standing: where this rank stands; None = whoever knew is gone. Must not keep the hook alive.
        period: seconds between two looks.
        host: of the store.
    """

    def __init__(
        self, store: Any, rank: int, standing: Callable[[], Standing | None], period: float, host: Host
    ) -> None:
        self._store, self._rank, self._standing, self._period, self._host = store, rank, standing, period, host
        self._stop, self._farewell = threading.Event(), ""
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name=f"sparcomm-pulse-{rank}", daemon=True)
        self._thread.start()

    def stop(self, left: Standing | None = None, patience: float = 5.0) -> None:
        """Ends the thread, after it has told the others why this rank leaves, if it does. Idempotent.

        Returns after ``patience`` seconds even so: with the thread left behind where the store's host stands still.
        """
        if os.getpid() != self._process:
            return  # a fork, as of a data loader: the thread, and the right to speak for the rank, stayed behind
        if left is not None and not self._stop.is_set():
            self._farewell = json.dumps(left)
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(patience)

    def _run(self) -> None:
        answered = 0
        try:
            while not self._stop.wait(self._period):
                if not self._host.is_up():
                    return
                number = int(self._store.get(_ALARM)) if self._store.check([_ALARM]) else 0
                if number > answered:
                    standing = self._standing()
                    if standing is not None:
                        self._store.set(f"here/{self._rank}/{number}", json.dumps(standing))
                    answered = number
            if self._farewell and self._host.is_up():
                self._store.set(f"left/{self._rank}", self._farewell)
        except RuntimeError:
            return  # the store's host went just now: nobody is left to be told
