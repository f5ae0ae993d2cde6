"""Loops over large vectors in several parts at once.

Plain threads that call serial kernels, which release the GIL: Numba's own parallel loops abort the process when several
threads enter them on its default threading layer. Parts are joined in their order, so that no result depends on how
many there were.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from sparcomm import threads
from sparcomm.kernels.cpu._jit import PIECE

R = TypeVar("R")

LARGE = 1 << 20  # elements from which handing a part to another thread costs little
_pool: ThreadPoolExecutor | None = None


def _forget() -> None:
    """A forked child has none of the pool's threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget)


def cut(numel: int, tile: int) -> list[tuple[int, int]]:
    """Ranges of a vector, one per thread that may be used: in order, whole tiles or at least whole pieces of them."""
    count = threads.allowed() if numel >= LARGE else 1
    if count == 1:
        return [(0, numel)]
    bounds = [0]
    for j in range(1, count):
        place = numel * j // count
        start = place // tile * tile
        bounds.append(max(bounds[-1], start + (place - start) // PIECE * PIECE))
    return list(zip(bounds, [*bounds[1:], numel], strict=True))


def run(jobs: Sequence[Callable[[], R]]) -> list[R]:
    """The jobs' results; all but the first are done by other threads. Returns, or raises, when all have ended."""
    if len(jobs) == 1:
        return [jobs[0]()]
    others = [_submit(job) for job in jobs[1:]]
    try:
        first = jobs[0]()
    finally:
        wait([future for future in others if future])
    return [first, *(future.result() if future else job() for job, future in zip(jobs[1:], others, strict=True))]


def _submit(job: Callable[[], R]) -> Future[R] | None:
    """None if no thread can be had any more: the interpreter is shutting down."""
    global _pool
    pool = _pool
    if pool is None:
        pool = _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="sparcomm-part")
    try:
        return pool.submit(job)
    except RuntimeError:
        return None
