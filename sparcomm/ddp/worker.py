"""One thread that runs jobs in the order they were given, for transports that block the host."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import torch

Job = Callable[[], None]


class Inline:
    """Runs every job at once, on the caller's thread: for transports that only enqueue on the device."""

    def submit(self, job: Job) -> None:
        """Runs ``job``."""
        job()

    def drain(self) -> None:
        """Nothing is ever left to do."""

    @property
    def busy(self) -> bool:
        """Never: a job that was given has run."""
        return False

    def stop(self) -> None:
        """Nothing to stop."""


class Worker:
    """An ordered job queue with one thread, started by the first job. Jobs must not raise.

    One thread and not several: two threads on one process group exchange each other's messages, silently.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue = _Queue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Job) -> None:
        """Runs ``job`` after all earlier ones. After ``stop`` it is dropped."""
        if self._thread is None:
            # A daemon, because the interpreter joins other threads before it runs exit handlers; ``stop`` joins it.
            self._thread = threading.Thread(target=_serve, args=(self._queue,), name=self._name, daemon=True)
            self._thread.start()
        self._queue.put(job)

    def drain(self) -> None:
        """Returns when all jobs given so far have run. From a job itself: at once."""
        if threading.current_thread() is not self._thread:
            self._queue.wait_until_done()

    @property
    def busy(self) -> bool:
        """Whether jobs wait or run."""
        return self._queue.unfinished > 0

    def stop(self) -> None:
        """Drops the jobs that wait, lets the running one end, and ends the thread. Idempotent."""
        self._queue.stop()
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join()


class _Queue:
    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self.unfinished = 0

    def put(self, job: Job) -> None:
        with self._changed:
            if not self._stopped:
                self._jobs.append(job)
                self.unfinished += 1
                self._changed.notify_all()

    def get(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._stopped)
            return None if self._stopped else self._jobs.popleft()

    def done(self) -> None:
        with self._changed:
            self.unfinished -= 1
            if not self.unfinished:
                self._changed.notify_all()

    def wait_until_done(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self.unfinished)

    def stop(self) -> None:
        with self._changed:
            self.unfinished -= len(self._jobs)
            self._jobs.clear()
            self._stopped = True
            self._changed.notify_all()


def _serve(queue: _Queue) -> None:
    """The thread's life. It knows the queue only, so that an idle thread keeps no model and no gradient alive."""
    with torch.no_grad():  # thread-local, and on by default
        while (job := queue.get()) is not None:
            try:
                job()
            finally:
                del job
                queue.done()
