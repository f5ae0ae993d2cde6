"""A barrier that says who did not come, in Gloo's words."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from sparcomm.mpi_backend.buffers import view
from sparcomm.mpi_backend.channel import Channel
from sparcomm.transport.mpi.library import MPI
from sparcomm.transport.mpi.waiting import Interrupted, pending, strand, wait

EXTRA = 5.0  # seconds that the others wait longer, so that rank 0 can tell them who did not come


def barrier(channel: Channel, timeout: timedelta, listen: Callable[[], str], wait_all_ranks: bool) -> None:
    """Rank 0 waits for a byte from everyone, and tells everyone who did not come; these hear it when they come."""
    tag, limit, rank = channel.next_monitored_tag(), timeout.total_seconds(), channel.rank
    if limit <= 0:
        raise dist.DistBackendError(f"Rank {rank} timed out in monitoredBarrier, whose timeout is {limit:g} s")
    here = (_collect if rank == 0 else _report)(channel, tag, limit, listen)
    if not (missing := (here == 0).nonzero().view(-1).tolist()):
        return
    late = ", ".join(map(str, missing))
    if rank == 0 and wait_all_ranks:
        text = f"Ranks {late} failed to pass monitoredBarrier in {limit * 1e3:g} ms"
    elif rank == 0:
        text = f"Rank {missing[0]} failed to pass monitoredBarrier in {limit * 1e3:g} ms (all: {late})"
    elif rank in missing:
        text = f"Rank {rank} failed to pass monitoredBarrier: it came too late (all: {late})"
    else:
        text = (
            f"Rank {rank} successfully reached monitoredBarrier, but received errors while waiting for send/recv from "
            f"rank 0: ranks {late} did not come"
        )
    raise dist.DistBackendError(text)


def _collect(channel: Channel, tag: int, limit: float, listen: Callable[[], str]) -> Tensor:
    """On rank 0: who came, as ones; tells the others."""
    came = torch.ones(channel.size, dtype=torch.uint8)
    others = range(1, channel.size)
    inbox = torch.empty_like(came)
    requests = [channel.comm.Irecv([view(inbox[peer]), MPI.BYTE], peer, tag) for peer in others]
    try:
        wait(lambda: not pending(requests), limit, listen)
    except Interrupted:
        for i in pending(requests):
            came[others[i]] = 0
        strand(requests, inbox)
    answers = [channel.comm.Isend([view(came), MPI.BYTE], peer, tag) for peer in others]
    strand(answers, came)  # short, so they are on their way, or are kept
    return came


def _report(channel: Channel, tag: int, limit: float, listen: Callable[[], str]) -> Tensor:
    """On the other ranks: tells rank 0, and returns its answer."""
    came, word = torch.empty(channel.size, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8)
    answer = channel.comm.Irecv([view(came), MPI.BYTE], 0, tag)
    told = channel.comm.Isend([view(word), MPI.BYTE], 0, tag)
    try:
        wait(answer.Test, limit + EXTRA, listen)
    except Interrupted as stop:
        raise dist.DistBackendError(
            f"Rank {channel.rank} successfully reached monitoredBarrier, but received errors while waiting for "
            f"send/recv from rank 0: {stop}"
        ) from None
    finally:
        strand([answer, told], came, word)
    return came
