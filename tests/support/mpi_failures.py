"""What the backend mpi4py says and does when something is wrong; part of support/mpi_backend.py."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
c10d: Any = dist.distributed_c10d
BRIEF = timedelta(seconds=0.5)


def refused(r: int, p: int) -> None:
    group: Any = dist.group.WORLD
    for op, x in ((dist.ReduceOp.BAND, torch.ones(2)), (dist.ReduceOp.AVG, torch.ones(2).int())):
        with pytest.raises(ValueError, match=r"ReduceOp\.(BAND|AVG) of torch"):
            dist.all_reduce(x, op)
    with pytest.raises(ValueError, match="output must be"):
        gather_into(torch.empty(p + 1), torch.ones(1))
    with pytest.raises(ValueError, match="split sizes"):
        dist.all_to_all_single(torch.empty(p), torch.ones(p), [1] * p, [2] * p)
    with pytest.raises(ValueError, match="must be dense"):
        dist.broadcast(torch.ones(2).to_sparse(), 0)
    with pytest.raises(ValueError, match=r"all_gather: rank \d has 2 elements for itself, and room for 3"):
        dist.all_gather([torch.empty(3)] * p, torch.ones(2))
    if r == 0:  # what one rank is refused leaves it in step with the others
        with pytest.raises(ValueError, match="same dtype"):
            group.gather([[torch.empty(1)] * p], [torch.ones(1).int()])
    else:
        dist.gather(torch.ones(1), dst=0)
    outs = [torch.empty(1) for _ in range(p)]
    dist.all_gather(outs, torch.tensor([float(r)]))
    assert torch.cat(outs).tolist() == list(range(p))
    x = torch.ones(1)
    dist.all_reduce(x)  # none of it has harmed the group
    assert x.item() == p


def soft_time_limits(r: int, p: int) -> None:
    x = torch.zeros(2)
    if r == 0:
        work = dist.irecv(x, 1, tag=77)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"recv from rank 1, tag 77: timed out, nothing within 0\.2 s"):
            work.wait(timedelta(seconds=0.2))
        assert time.monotonic() - start < 20
        assert not work.is_completed()
    dist.barrier()
    if r == 1:
        dist.send(torch.ones(2), 0, tag=77)
    if r == 0:
        assert work.wait()
        assert x.tolist() == [1.0, 1.0]


def hard_time_limits(r: int, p: int) -> None:
    groups: list[Any] = [dist.new_group(), dist.new_group()]
    for group in groups:
        group.set_timeout(BRIEF)
    group, doomed = groups
    dist.barrier()
    if r == 0:
        time.sleep(1.0)
    else:
        with pytest.raises(dist.DistBackendError, match=r"barrier: .*Timed out waiting 500ms: a rank is late"):
            dist.barrier(group)
        with pytest.raises(dist.DistBackendError, match="cannot be used any more: barrier"):
            dist.all_reduce(torch.ones(1), group=group)
    dist.barrier()
    if r == 0:
        time.sleep(1.0)
    else:
        future = dist.all_reduce(torch.ones(900000), group=doomed, async_op=True).get_future()
        with pytest.raises(RuntimeError, match="a rank is late"):
            future.wait()
    dist.barrier()  # the default group is well


def wrong_sizes(r: int, p: int) -> None:
    group = dist.new_group()
    mine = 3 if r == 0 else 4
    want = "12 bytes came from rank 0, 16 were expected" if r else "(?i)truncated.*: ranks have called it with"
    with pytest.raises(dist.DistBackendError, match=want):
        dist.all_gather([torch.empty(mine) for _ in range(p)], torch.ones(mine), group=group)
    dist.barrier()


def debugging(r: int, p: int) -> None:
    before = c10d.get_debug_level()
    dist.set_debug_level(c10d.DebugLevel.DETAIL)
    try:
        x = torch.ones(3 if r == 0 else 4)
        wrong = "rank 0: all_reduce SUM of 3 elements of torch.float32, rank 1: all_reduce SUM of 4"
        with pytest.raises(dist.DistBackendError, match=wrong):
            dist.all_reduce(x)
        with pytest.raises(dist.DistBackendError, match=r"rank 0: broadcast with root 0 of 3.* rank 1: barrier"):
            dist.broadcast(x, 0) if r == 0 else dist.barrier()
        outs = [torch.empty(i + 1) for i in range(p)]
        dist.all_gather(outs, torch.full((r + 1,), float(r)))  # sizes may differ
        assert torch.cat(outs).tolist() == [float(i) for i in range(p) for _ in range(i + 1)]
    finally:
        dist.set_debug_level(before)


def aborted(r: int, p: int) -> None:
    group: Any = dist.new_group()
    if r == 0:
        timer = threading.Timer(0.2, group.abort)
        timer.start()
        with pytest.raises(dist.DistBackendError, match="barrier: the group was aborted"):
            dist.barrier(group)
        with pytest.raises(dist.DistBackendError, match="cannot be used any more: the group was aborted"):
            dist.all_reduce(torch.ones(1), group=group)
    dist.barrier()


def missing_rank(r: int, p: int) -> None:
    """A new group that one rank makes too late."""
    if r == 1:
        time.sleep(1.0)
    if r < 2:
        with pytest.raises(
            dist.DistBackendError, match=r"a new group of the ranks \[0, 1\]: Ranks? 1 .*failed|too late"
        ):
            dist.new_group([0, 1], use_local_synchronization=True, timeout=BRIEF)
        again = dist.new_group([0, 1], use_local_synchronization=True)
        dist.barrier(again)
    dist.barrier()


def monitored(r: int, p: int) -> None:
    dist.monitored_barrier()
    if r == p - 1:
        time.sleep(1.0)
    with pytest.raises(RuntimeError, match=rf"monitoredBarrier.*\b{p - 1}\b"):  # the late one hears it, too
        dist.monitored_barrier(timeout=timedelta(seconds=0.3))
    dist.monitored_barrier(timeout=timedelta(seconds=30), wait_all_ranks=True)


FAILURES: tuple[Callable[[int, int], None], ...] = (
    refused, soft_time_limits, hard_time_limits, wrong_sizes, debugging, aborted, missing_rank, monitored,
)  # fmt: skip
