"""What the ranks of a hook tell each other through the store: configurations, the committed step, the first error.

The store works when the process group does not: before it exists, and after it has failed. Every hook has a prefix of
its own, counted in the store itself, so that the number does not depend on what else a process has done.
"""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from sparcomm.errors import CommunicationError, ConfigError, PeerError, RemoteError

_ERROR = "error"
_GRACE = 2.0  # seconds within which a rank that has claimed the error has written it
_STORE_GRACE = 5.0  # seconds after which a store that does not answer is given up
T = TypeVar("T")


class Board:
    """A rank's access to the hook's part of the group's store. Usable from several threads.

    Raises:
        ConfigError: the store is a HashStore, which only this process sees, and there is more than one rank.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: float) -> None:
        self.rank, self.size, self.timeout = dist.get_rank(group), dist.get_world_size(group), timeout
        # Not a clone of it: a TCPStore's clone() takes 5 s every dozen times (torch 2.13). The price: a call here
        # waits while another thread of this process waits for a key, which no thread does during backward().
        store = c10d._get_process_group_store(group)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        root = store
        while isinstance(root, c10d.PrefixStore):
            root = root.underlying_store
        hidden = isinstance(root, dist.HashStore)  # pyright: ignore[reportPrivateImportUsage]
        if hidden and self.size > 1:
            raise ConfigError(
                f"the process group of {self.size} ranks was made with a HashStore, which other processes cannot see: "
                'use init_method="env://", or a TCPStore or FileStore'
            )
        number = store.add(f"sparcomm/count/{self.rank}", 1)
        self._store = c10d.PrefixStore(f"sparcomm/{number}", store)

    def exchange(self, topic: str, value: Any) -> list[Any]:
        """Publishes ``value`` (as JSON) and returns all ranks' values, by rank.

        Raises:
            RemoteError: a rank reported an error meanwhile.
            PeerError: not all ranks came within the timeout; names those who did not. Or the store does not answer.
        """
        try:
            return _within(self.timeout + _STORE_GRACE, lambda: self._exchange(topic, value))
        except CommunicationError:
            raise
        except (RuntimeError, concurrent.futures.TimeoutError) as error:
            why = f": {error}" if str(error) else f" within {self.timeout + _STORE_GRACE:g} s"
            raise PeerError(f"{topic}: the store of the process group does not answer{why}") from error

    def _exchange(self, topic: str, value: Any) -> list[Any]:
        self._store.set(f"{topic}/{self.rank}", json.dumps(value))
        keys = [f"{topic}/{r}" for r in range(self.size)]
        deadline, pause = time.monotonic() + self.timeout, 1e-3
        while True:
            complete = self._store.check(keys)
            # Even then: a rank may have published, and given up since.
            error = self.first_error()
            if error is not None:
                raise error
            if complete:
                return [json.loads(self._store.get(key)) for key in keys]
            if time.monotonic() > deadline:
                late = [str(r) for r, key in enumerate(keys) if not self._store.check([key])]
                raise PeerError(
                    f"{topic}: rank {', '.join(late)} did not come within {self.timeout:g} s; every rank of the group "
                    "must attach the same hooks, and load checkpoints, in the same order"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def report(self, error: BaseException) -> BaseException:
        """Publishes ``error`` unless a rank has reported one before; returns what this rank is to raise.

        That is ``error`` itself if it is the first, or if the store does not answer; else the RemoteError of the first.
        """
        if isinstance(error, RemoteError):
            return error
        try:
            first = _within(_STORE_GRACE, lambda: self._report(error))
        except (RuntimeError, concurrent.futures.TimeoutError):
            return error  # the store's host is gone or stands still: what this rank saw itself is all there is
        if first is None or first.rank == self.rank:
            return error
        first.__cause__ = error
        return first

    def _report(self, error: BaseException) -> RemoteError | None:
        if self._store.add("error-claims", 1) == 1:
            self._store.set(_ERROR, json.dumps([self.rank, type(error).__name__, str(error)]))
            return None
        deadline = time.monotonic() + _GRACE
        while (first := self.first_error()) is None and time.monotonic() < deadline:
            time.sleep(1e-2)
        return first

    def first_error(self) -> RemoteError | None:
        """The error that was reported first, if any."""
        if not self._store.check([_ERROR]):
            return None
        rank, kind, text = cast("tuple[int, str, str]", json.loads(self._store.get(_ERROR)))
        return RemoteError(rank, kind, text)


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
