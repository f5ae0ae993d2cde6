"""Operations under way: a sequence of steps, each of which waits for some MPI requests.

MPI moves data only while somebody calls it. Whoever waits for a work calls it in a loop; works that nobody waits for
yet are moved on by one thread of the process, which also completes the futures that DDP's hooks wait for.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparcomm.transport.mpi.library import MPI
from sparcomm.transport.mpi.waiting import BRISK, LISTEN, LONGEST, SHORTEST, Interrupted, wait

Requests = list[MPI.Request]
# None: to be resumed at the next look. What is sent back says how the requests have ended.
Steps = Generator[Requests | None, "list[MPI.Status]", None]
NO_LIMIT = timedelta(0)
SIZES = "ranks have called it with tensors of different sizes, or have called different operations"
LINGER = 5e-3  # seconds that the thread stays awake for the next work, since waking it costs more than a short message
QUIET, RARE = 0.1, 5e-3  # seconds without a change after which the thread looks so seldom: it takes a core's time
MOVED = 6e-5  # seconds of a core: a look at all works that took longer has moved data
LATER = 1e-4  # seconds before the first look at a new work, since most callers wait for it themselves at once


class Received(list[MPI.Request]):
    """Requests, of which the first ones are receives that have to bring so many bytes, neither more nor fewer."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: list[int] = []

    def expect(self, request: MPI.Request, nbytes: int) -> None:
        """Adds a receive; sends come after the last of them."""
        self.append(request)
        self._sizes.append(nbytes)

    def check(self, statuses: Sequence[MPI.Status]) -> None:
        """Raises ValueError if one was shorter; MPI itself has raised if one was longer."""
        for status, nbytes in zip(statuses, self._sizes, strict=False):
            if (got := status.Get_count(MPI.BYTE)) != nbytes:
                raise ValueError(f"{got} bytes came from rank {status.Get_source()}, {nbytes} were expected: {SIZES}")


class Health:
    """Whether a group can be used.

    Args:
        listen: tells what has made waiting pointless; "" = nothing.
    """

    def __init__(self, listen: Callable[[], str]) -> None:
        self.broken, self._aborted, self._listen = "", "", listen

    def fail(self, reason: str) -> None:
        """From now on no operation can be started; the first reason counts."""
        self.broken = self.broken or reason

    def abort(self, reason: str) -> None:
        """The same, and those who wait stop waiting."""
        self.fail(reason)
        self._aborted = reason

    def listen(self) -> str:
        """What has made waiting pointless; "" = nothing."""
        return self._aborted or self._listen()


class MpiWork(dist.Work):
    """One operation of a group.

    Args:
        name: for messages.
        steps: yields the requests to wait for before it is resumed; what it holds stays in memory until it ends.
        outputs: tensors that are the result.
        limit: seconds from now after which the operation has failed.
        health: of the group.

    Raises:
        Exception: whatever its first step does.
    """

    def __init__(self, name: str, steps: Steps, outputs: list[Tensor], limit: float, health: Health) -> None:
        super().__init__()
        self.outputs, self.health = outputs, health
        self._name, self._steps = name, steps
        self._limit, self._deadline = limit, time.monotonic() + limit
        self._moving, self._gate = threading.Lock(), threading.Lock()
        self._done, self._error = False, None
        self._promise: Any = None
        self._future: Any = None
        self._source, self._statuses = -1, []
        self._waited = 0  # threads that wait for it, and so move it on
        try:
            self._requests = next(steps)
        except StopIteration:
            self._end(None)
        except MPI.Exception as error:
            _strand(None, error)
            raise dist.DistBackendError(f"mpi4py backend, {name}: {reason(error)}") from None

    # ---- moving it on ---------------------------------------------------------------------------------------------

    def poll(self) -> bool:
        """Moves on as far as possible without a wait; whether it has ended."""
        if self._done or not self._moving.acquire(blocking=False):
            return self._done
        try:
            while not self._done and self._arrived():
                self._requests = self._steps.send(self._statuses)
                if self._requests is None:
                    break
        except StopIteration:
            self._end(None)
        except Exception as error:  # noqa: BLE001  whatever it is belongs to whoever waits
            _strand(None, error)  # whose traceback holds what a failed step held
            self.give_up(reason(error, self._statuses))
        finally:
            self._moving.release()
        return self._done

    def _arrived(self) -> bool:
        requests = self._requests
        if requests is None:
            return True
        checked = isinstance(requests, Received)
        if not checked and len(requests) != 1:  # no more than needed, since this is called again and again
            self._statuses = []
            return MPI.Request.Testall(requests)
        if len(statuses := self._statuses) != len(requests):
            statuses = self._statuses = [MPI.Status() for _ in requests]
        if not MPI.Request.Testall(requests, statuses):
            return False
        if checked:
            requests.check(statuses)
        else:
            self._source = statuses[0].Get_source()
        return True

    def check(self) -> None:
        """Gives up if time has run out, or another rank has."""
        if self._done:
            return
        if time.monotonic() > self._deadline:
            waited = f"Timed out waiting {self._limit * 1e3:g}ms"  # Gloo's words
            self.expire(f"{waited}: a rank is late, stuck or gone, or has called something else")
        elif told := self.health.listen():
            self.expire(told)

    def expire(self, reason: str) -> None:
        """Gives up, unless it has ended."""
        with self._moving:
            if not self._done:
                self.give_up(reason)

    def give_up(self, reason: str) -> None:
        """Ends it with an error; what MPI may still touch is kept for good. Only for who holds the lock."""
        _strand(self._requests, self._steps, self.outputs)
        self.health.fail(f"{self._name}: {reason}")
        self._end(dist.DistBackendError(f"mpi4py backend, {self._name}: {reason}"))

    def _end(self, error: Exception | None) -> None:
        with self._gate:
            self._error, self._done = error, True
            promise, self._promise = self._promise, None
        self._steps, self._requests = _nothing(), []
        if promise is not None:
            PROGRESS.resolve(promise, self.outputs, error)

    @property
    def done(self) -> bool:
        """Whether it has been seen to end."""
        return self._done

    @property
    def waited(self) -> bool:
        """Whether a thread waits for it now."""
        return self._waited > 0

    # ---- what torch calls -----------------------------------------------------------------------------------------

    def wait(self, timeout: timedelta = NO_LIMIT) -> bool:
        """Returns True when it has ended.

        A ``timeout`` that is shorter than the group's only ends this wait: a later one may succeed.

        Raises:
            DistBackendError: it failed, or is not complete in time.
        """
        if not self.poll():
            asked, left = timeout.total_seconds(), self._deadline - time.monotonic()
            with self._gate:
                self._waited += 1
            try:
                wait(self.poll, min(asked, left) if asked > 0 else left, self.health.listen)
            except Interrupted as stop:
                self.check()
                if not self._done:
                    PROGRESS.watch(self)
                    raise dist.DistBackendError(f"mpi4py backend, {self._name}: timed out, {stop}") from None
            except BaseException:
                PROGRESS.watch(self)  # its memory must outlive what MPI does to it
                raise
            finally:
                with self._gate:
                    self._waited -= 1
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        """The same as ``wait``."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether it has ended, well or not."""
        return self.poll()

    def is_success(self) -> bool:
        """Whether it has ended well."""
        return self.poll() and self._error is None

    def exception(self) -> Exception | None:
        """What it failed with."""
        return self._error

    def result(self) -> list[Tensor]:
        """The output tensors; waits for them."""
        self.wait()
        return self.outputs

    def _source_rank(self) -> int:
        return self._source

    def source_rank(self) -> int:
        """The rank in the group that a ``recv`` from any has received from."""
        return self._source

    def get_future(self) -> Any:
        """Completes with the list of output tensors, or the error."""
        with self._gate:
            if self._future is not None:
                return self._future
            promise: Any = torch.futures.Future()
            # DDP's reducer takes an exception that was set for a value; one that a callback raised is an error there.
            self._future = promise.then(_value)
            if under_way := not self._done:
                self._promise = promise
        if under_way:
            PROGRESS.watch(self)
        else:
            _resolve(promise, self.outputs, self._error)
        return self._future


def _nothing() -> Steps:
    yield from ()


def reason(error: Exception, statuses: Sequence[MPI.Status] = ()) -> str:
    """What to say of an error."""
    if not isinstance(error, MPI.Exception):
        return f"{type(error).__name__}: {error}"
    codes = [error.Get_error_code()]
    if error.Get_error_class() == MPI.ERR_IN_STATUS:  # the requests that have failed know why
        codes = [code for status in statuses if (code := status.Get_error()) not in (MPI.SUCCESS, MPI.ERR_PENDING)]
    text = "; ".join(dict.fromkeys(map(MPI.Get_error_string, codes))) or str(error)
    return f"{text}: {SIZES}" if MPI.ERR_TRUNCATE in map(MPI.Get_error_class, codes) else text


def _strand(requests: Requests | None, *buffers: object) -> None:
    """Withdraws receives, and keeps for good the memory of what cannot be withdrawn: MPI may still use it."""
    for request in requests or ():
        with contextlib.suppress(MPI.Exception):  # a collective's
            request.Cancel()
    _stranded.append((requests, buffers))


_stranded: list[object] = []


def _resolve(promise: Any, outputs: list[Tensor], error: Exception | None) -> None:
    if error is not None:
        promise.set_exception(error)
    else:
        promise.set_result(outputs)


def _value(done: Any) -> Any:
    return done.value()


class Progress:
    """The thread that moves on works that nobody waits for."""

    def __init__(self) -> None:
        self._works: dict[MpiWork, None] = {}
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        # A callback of a future may wait for another future, so callbacks must not hold up the thread that moves
        # works on, nor each other.
        self._callbacks = ThreadPoolExecutor(16, "sparcomm-mpi-future")
        self._stopped, self._parked, self._checked = False, False, 0.0

    def watch(self, work: MpiWork) -> None:
        """Moves the work on, and keeps it in memory, until it ends."""
        with self._lock:
            self._works[work] = None
            if self._parked:
                self._parked = False
                self._wake.set()
            if self._thread is None and not self._stopped:
                self._thread = threading.Thread(target=self._run, name="sparcomm-mpi", daemon=True)
                self._thread.start()
                atexit.register(self._stop)

    def under_way(self, health: Health) -> list[MpiWork]:
        """The works of one group that have not ended."""
        with self._lock:
            return [work for work in self._works if work.health is health and not work.done]

    def resolve(self, promise: Any, outputs: list[Tensor], error: Exception | None) -> None:
        """Completes a future on a thread of its own."""
        try:
            self._callbacks.submit(_resolve, promise, outputs, error)
        except RuntimeError:  # the interpreter ends, and starts no threads any more
            _resolve(promise, outputs, error)

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        busy, pause = time.monotonic(), SHORTEST
        while not self._stopped:
            with self._lock:
                works = list(self._works)
            before = time.monotonic()
            if not works:
                if before - busy > LINGER:
                    self._park()
                    busy = time.monotonic()
                time.sleep(LATER)
                pause = SHORTEST
                continue
            if self._sweep(works):
                busy, pause = time.monotonic(), SHORTEST
            if before - busy < BRISK and not all(work.waited for work in works):
                os.sched_yield()
            else:
                time.sleep(pause)
                pause = min(1.5 * pause, LONGEST if before - busy < QUIET else RARE)

    def _park(self) -> None:
        """Waits for a work."""
        with self._lock:
            self._wake.clear()
            self._parked = not self._works and not self._stopped
        if self._parked:
            self._wake.wait()

    def _sweep(self, works: list[MpiWork]) -> bool:
        """Moves the works on; whether that has changed something."""
        spent = time.thread_time()  # of the clock a look takes long, whatever it does, where ranks outnumber cores
        ended = [work for work in works if (work.done if work.waited else work.poll())]
        moved = bool(ended) or time.thread_time() - spent > MOVED
        if (now := time.monotonic()) - self._checked > LISTEN:
            self._checked = now
            for work in works:
                work.check()
        with self._lock:
            for work in ended:
                self._works.pop(work, None)
        return moved


PROGRESS = Progress()
