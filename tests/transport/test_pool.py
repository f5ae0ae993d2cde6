"""The pool of real ranks itself: results, failures with everyone's traceback, silence, and going on afterwards."""

from __future__ import annotations

import fcntl
import threading

import pytest
import torch.distributed as dist

from sparcomm.kernels import warm_up
from sparcomm.kernels.cpu import warm
from support.pool import Died, RankError, pool, spawn


class Custom:
    """Its pickle names this file's module, which a rank has to find."""

    def __init__(self, value: int) -> None:
        self.value = value


def double(rank: int, size: int, given: Custom) -> Custom:
    assert (dist.get_rank(), dist.get_world_size()) == (rank, size)
    return Custom(given.value * 2 + rank)


def test_arguments_and_results_travel() -> None:
    for size in (2, 1, 2):
        assert [c.value for c in pool(size).run(double, Custom(10))] == [20 + r for r in range(size)]


def fail(rank: int, size: int) -> None:
    if rank == 1:
        raise ValueError("one is odd")
    threading.Event().wait()


def leave(rank: int, size: int) -> None:
    print("last words")
    if rank == 0:
        import os

        os._exit(3)


def test_failures_name_every_rank_and_the_pool_recovers() -> None:
    with pytest.raises(RankError) as caught:
        pool(2).run(fail, timeout=30)
    text = str(caught.value)
    assert "ValueError: one is odd" in text
    assert "--- rank 0 of 2 ---\nno answer" in text
    assert "in fail" in caught.value.errors[0], "the stacks of the silent rank"
    with pytest.raises(RankError, match=r"rank 0.*code|Died\(returncode=3\)"):
        pool(2).run(leave)
    assert [c.value for c in pool(2).run(double, Custom(1))] == [2, 3]


def test_spawned_ranks_may_die() -> None:
    assert spawn(1, leave) == [Died(3)]


def test_functions_must_be_found_in_their_file() -> None:
    with pytest.raises(TypeError, match="not at the top level of its file"):
        pool(1).run(lambda rank, size: None)


def load_kernels(rank: int, size: int) -> None:
    warm_up()


def test_the_time_limit_begins_when_all_ranks_have_started() -> None:
    """Somebody else is compiling for longer than the limit."""
    with warm.lock_file().open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threading.Timer(3.0, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        assert spawn(2, load_kernels, timeout=2.5) == [None, None]
