"""Loops over large vectors in several parts at once.

Plain threads that call serial kernels, which release the GIL: Numba's own parallel loops abort the process when several
threads enter them on its default threading layer. Parts are joined in their order, so that no result depends on how
many there were.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from sparcomm import threads
from sparcomm.kernels.cpu._jit import PIECE

R = TypeVar("R")

LARGE = 1 << 20  # elements from which handing a part to another thread costs little
LEAST = 1 << 18  # elements of a part at least,
SHARES = 4  # and parts for every thread at most
_pool: ThreadPoolExecutor | None = None


def _forget() -> None:
    """A forked child has none of the pool's threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget)


def cut(numel: int, tile: int) -> list[tuple[int, int]]:
    """Ranges of a vector for ``run``, in order: whole tiles, or at least whole pieces of them.

    Several for each thread that may be used: how fast the other cores are, if they are free at all, nobody knows.
    """
    allowed = threads.allowed() if numel >= LARGE else 1
    if allowed == 1:
        return [(0, numel)]
    count = max(allowed, min(SHARES * allowed, numel // LEAST))
    bounds = [0]
    for j in range(1, count):
        place = numel * j // count
        start = place // tile * tile
        bounds.append(max(bounds[-1], start + (place - start) // PIECE * PIECE))
    return list(zip(bounds, [*bounds[1:], numel], strict=True))


def run(jobs: Sequence[Callable[[], R]]) -> list[R]:
    """The jobs' results, whoever of the threads that may be used does them. Returns, or raises, when all have ended."""
    if len(jobs) == 1:
        return [jobs[0]()]
    results: dict[int, R] = {}
    left = deque(range(len(jobs)))

    def work() -> None:
        while left:
            try:
                i = left.popleft()
            except IndexError:  # another thread was faster
                return
            results[i] = jobs[i]()

    helpers = [helper for _ in range(threads.allowed() - 1) if (helper := _submit(work))]
    try:
        work()
    finally:
        left.clear()
        started = [helper for helper in helpers if not helper.cancel()]  # who has not even begun is not waited for
        wait(started)
    for helper in started:
        helper.result()
    return [results[i] for i in range(len(jobs))]


def _submit(job: Callable[[], None]) -> Future[None] | None:
    """None if no thread can be had any more: the interpreter is shutting down."""
    global _pool
    pool = _pool
    if pool is None:
        pool = _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="sparcomm-part")
    try:
        return pool.submit(job)
    except RuntimeError:
        return None
