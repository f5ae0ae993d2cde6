"""A barrier that says who did not come."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from sparcomm.mpi_backend.buffers import view
from sparcomm.mpi_backend.channel import Channel
from sparcomm.transport.mpi.library import MPI
from sparcomm.transport.mpi.waiting import Interrupted, pending, strand, wait

EXTRA = 5.0  # seconds that others wait longer, so that rank 0 can tell them who did not come


def barrier(channel: Channel, timeout: timedelta, listen: Callable[[], str]) -> None:
    """Rank 0 waits for a byte from everyone, and tells everyone who did not come; they are too late afterwards, too."""
    tag, limit = channel.next_tag(), timeout.total_seconds()
    here = torch.ones(channel.size, dtype=torch.uint8)
    others = range(1, channel.size)
    if channel.rank == 0:
        requests = [channel.comm.Irecv([view(here[peer]), MPI.BYTE], peer, tag) for peer in others]
        try:
            wait(lambda: not pending(requests), limit, listen)
        except Interrupted as stop:
            late = pending(requests)
            strand(requests, here)
            here = here.clone()
            for i in late:
                here[others[i]] = 0
            reason = str(stop)
        else:
            reason = ""
        strand([channel.comm.Isend([view(here), MPI.BYTE], peer, tag) for peer in others], here)
    else:
        answer = channel.comm.Irecv([view(here), MPI.BYTE], 0, tag)
        told = channel.comm.Isend([view(torch.ones(1, dtype=torch.uint8)), MPI.BYTE], 0, tag)
        try:
            wait(answer.Test, limit + EXTRA, listen)
        except Interrupted as stop:
            strand([answer, told], here)
            raise dist.DistBackendError(f"monitored_barrier: rank 0 did not answer ({stop})") from None
        reason = f"nothing within {limit:g} s"
    if missing := (here == 0).nonzero().view(-1).tolist():
        ranks = ", ".join(map(str, missing))
        raise dist.DistBackendError(f"monitored_barrier: of ranks 0 to {channel.size - 1}, {ranks} did not come: {reason}")
