"""What the ranks of a hook tell each other through the store: configurations, the committed step, the first error.

The store works when the process group does not: before it exists, and after it has failed. Every hook has a prefix of
its own, counted in the store itself, so that the number does not depend on what else a process has done.
"""

from __future__ import annotations

import concurrent.futures
import json
import sys
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from sparcomm.ddp import rollcall
from sparcomm.ddp.rollcall import Pulse, Standing
from sparcomm.ddp.stores import Host, root_of
from sparcomm.errors import CommunicationError, ConfigError, PeerError, RemoteError

_ERROR = "error"
_GRACE = 2.0  # seconds, beyond a roll call, within which a rank that has claimed the error has written it
_STORE_GRACE = 5.0  # seconds after which a store that does not answer is given up
_NO_PATIENCE = 0.2  # seconds for a thread that waits for a store which has been given up
T = TypeVar("T")


class Board:
    """A rank's access to the hook's part of the group's store. Usable from several threads.

    Args:
        standing: where this rank stands, for the others' error messages; must not keep the hook alive.

    Attributes:
        meeting: whether this rank is inside ``exchange``.
        token: text that no other hook of this job has, the same on all ranks; known after the first ``exchange``.

    Raises:
        ConfigError: the store is a HashStore, which only this process sees, and there is more than one rank.
        PeerError: the store does not answer.
    """

    def __init__(
        self, group: dist.ProcessGroup, timeout: float, standing: Callable[[], Standing | None] | None = None
    ) -> None:
        self.rank, self.size, self.timeout = dist.get_rank(group), dist.get_world_size(group), timeout
        # Not a clone of it: a TCPStore's clone() takes 5 s every dozen times (torch 2.13). The price: a call here
        # waits while another thread of this process waits for a key, which no thread does during backward().
        store = c10d._get_process_group_store(group)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        self._where = Host(store)
        hidden = isinstance(root_of(store), dist.HashStore)  # pyright: ignore[reportPrivateImportUsage]
        if hidden and self.size > 1:
            raise ConfigError(
                f"the process group of {self.size} ranks was made with a HashStore, which other processes cannot see: "
                'use init_method="env://", or a TCPStore or FileStore'
            )
        self._mute = False  # whether the store has been given up
        self.meeting, self.token = False, ""
        self._pace = rollcall.pace_of(timeout)
        self._host: int | None = None  # the rank whose process the store lives in, if it is one's
        self._patience = min(_STORE_GRACE, max(1.0, timeout / 3))  # with a store that does not answer
        try:
            number = self._ask(self.timeout, lambda: store.add(f"sparcomm/count/{self.rank}", 1))
        except RuntimeError as error:
            raise self._without_store(f"start: the store of the process group does not answer: {error}") from error
        self._store = c10d.PrefixStore(f"sparcomm/{number}", store)
        self._standing = standing or (lambda: None)
        self._pulse: Pulse | None = None
        if self.size > 1:
            self._pulse = Pulse(self._store, self.rank, self._standing, self._pace.period, self._where)

    @property
    def wait(self) -> float:
        """How many seconds a single wait for others may take, so that finding out who it was fits into the timeout."""
        return self.timeout - self._pace.limit

    # ---- agreeing ------------------------------------------------------------------------------------------------

    def exchange(self, topic: str, value: Any) -> list[Any]:
        """Publishes ``value`` (as JSON) and returns all ranks' values, by rank.

        Raises:
            RemoteError: a rank reported an error meanwhile.
            PeerError: not all ranks came within the timeout, or one has left; names them. Or the store does not answer.
        """
        self.meeting = True
        try:
            return self._ask(self.timeout + self._patience, lambda: self._exchange(topic, value))
        except CommunicationError:
            raise
        except RuntimeError as error:
            raise self._without_store(f"{topic}: the store of the process group does not answer: {error}") from error
        finally:
            self.meeting = False

    def _exchange(self, topic: str, value: Any) -> list[Any]:
        mine = {"value": value, "hosts": self._where.here, "token": uuid.uuid4().hex}
        self._store.set(f"{topic}/{self.rank}", json.dumps(mine))
        keys = [f"{topic}/{r}" for r in range(self.size)]
        deadline, pause = time.monotonic() + self.timeout, 1e-3
        while True:
            over = time.monotonic() > deadline  # before looking: on a busy machine a look may take its time
            complete = self._store.check(keys)
            # Even then: a rank may have published, and given up since.
            error = self.first_error()
            if error is not None:
                raise error
            if complete:
                return self._learn([json.loads(self._store.get(key)) for key in keys])
            late = [r for r, key in enumerate(keys) if not self._store.check([key])]
            left = {r: s.left for r in late if (s := rollcall.look_up(self._store, r)) is not None and s.left}
            if left:
                told = "; ".join(f"rank {r} has left: {what}" for r, what in left.items())
                raise PeerError(f"{topic}: {told}", tuple(left))
            if late and over:
                raise PeerError(
                    f"{topic}: rank {', '.join(map(str, late))} did not come within {self.timeout:g} s; every rank of "
                    "the group must attach the same hooks, and load checkpoints, in the same order",
                    tuple(late),
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def _learn(self, answers: list[dict[str, Any]]) -> list[Any]:
        self.token = self.token or answers[0]["token"]
        self._host = next((r for r, answer in enumerate(answers) if answer["hosts"]), None)
        return [answer["value"] for answer in answers]

    # ---- failing -------------------------------------------------------------------------------------------------

    def report(self, error: BaseException) -> BaseException:
        """Publishes ``error`` unless a rank has reported one before; returns what this rank is to raise.

        If it is the first, that is ``error`` itself, or, if that is a wait that has failed, a PeerError that says
        which ranks are to blame, as far as their answers tell (which takes a moment, see ``rollcall.pace_of``). Else
        the same PeerError, or the RemoteError of the first. If the store does not answer, ``error`` with a remark.
        """
        if isinstance(error, RemoteError):
            return error
        try:
            # In two parts, since one that stands still is noticed sooner than a roll call takes.
            self._ask(self._patience, lambda: self._store.check([_ERROR]))
            first = self._ask(_GRACE + self._pace.limit + self._patience, lambda: self._report(error))
        except RuntimeError:
            if not isinstance(error, PeerError) or error.ranks:
                return error
            shown = self._without_store(f"{error}; the store of the process group does not answer either")
            shown.__cause__ = error
            return shown
        if first is None or first is error:
            return error
        first.__cause__ = error
        return first

    def _report(self, error: BaseException) -> BaseException | None:
        if self._store.add("error-claims", 1) == 1:
            shown = self._blame(error) if isinstance(error, PeerError) and not error.ranks else error
            ranks = shown.ranks if isinstance(shown, PeerError) else ()
            self._store.set(_ERROR, json.dumps([self.rank, type(error).__name__, str(shown), ranks]))
            return shown
        deadline = time.monotonic() + self._pace.limit + _GRACE
        while (first := self.first_error()) is None and time.monotonic() < deadline:
            time.sleep(1e-2)
        return first

    def blame(self) -> str:
        """Which ranks do not answer, have left or are late, and what was reported; "" if nothing is known.

        For errors that are not the hook's. Takes a moment, as ``report`` does.
        """
        try:
            return self._ask(_GRACE + self._pace.limit + self._patience, self._find_out)
        except RuntimeError as error:
            return str(self._without_store(f"the store of the process group does not answer: {error}"))

    def _find_out(self) -> str:
        first = self.first_error()
        if first is not None or self.size == 1:
            return "" if first is None else str(first)
        mine = self._standing() or Standing(0)
        return rollcall.verdict(self.rank, mine.step, rollcall.call(self._store, self.rank, self.size, self._pace))[1]

    def _blame(self, error: PeerError) -> PeerError:
        """``error``, or one that also names the ranks that caused it."""
        mine = self._standing() or Standing(0)
        answers = rollcall.call(self._store, self.rank, self.size, self._pace)
        ranks, text = rollcall.verdict(self.rank, mine.step, answers)
        return PeerError(f"{text}. Noticed by rank {self.rank} at {error}", ranks) if ranks else error

    def _ask(self, seconds: float, call: Callable[[], T]) -> T:
        """``call()`` of the store. Raises RuntimeError if it does not answer in time, or has not before."""
        if self._mute or not self._where.is_up():
            raise RuntimeError("its host is gone" if not self._mute else "it did not before")
        try:
            return _within(seconds, call)
        except concurrent.futures.TimeoutError:
            self._mute = True
            raise RuntimeError(f"not within {seconds:g} s") from None

    def _without_store(self, text: str) -> PeerError:
        if self._host is not None and self._host != self.rank:
            return PeerError(f"{text}; its host, rank {self._host}, is gone or stopped", (self._host,))
        if not self.token and self.rank != 0:
            return PeerError(f"{text}; rank 0 hosts it, unless a launcher does")
        return PeerError(text)

    def first_error(self) -> PeerError | RemoteError | None:
        """The error that was reported first, if any."""
        if not self._store.check([_ERROR]):
            return None
        rank, kind, text, ranks = json.loads(self._store.get(_ERROR))
        if not ranks or self.rank in ranks:
            return RemoteError(rank, kind, text)
        return PeerError(text, tuple(ranks))

    # ---- leaving -------------------------------------------------------------------------------------------------

    def close(self, left: Standing | None = None) -> None:
        """Ends the thread that answers for this rank. With ``left``, others learn that it takes part no longer."""
        if self._pulse is not None:
            self._pulse.stop(left, _NO_PATIENCE if self._mute else _STORE_GRACE)


def ending() -> str:
    """How this process ends, as its exit handlers see it: with the exception that nobody caught, if any."""
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    if error is None or hasattr(sys, "ps1"):  # a prompt keeps the last one for ever
        return "its process ended"
    return f"its process ended with {type(error).__name__}: {error}"


def _within(seconds: float, call: Callable[[], T]) -> T:
    """``call()``, or concurrent.futures.TimeoutError after ``seconds``.

    On a thread of its own: a TCPStore whose host stands still (stopped, swapping, its machine cut off) keeps every
    call waiting, without any timeout of its own.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  (raised again in the caller)
            future.set_exception(error)

    try:
        threading.Thread(target=run, name="sparcomm-store", daemon=True).start()
    except RuntimeError:  # Python 3.12 starts no thread while the interpreter exits
        run()
    return future.result(seconds)
