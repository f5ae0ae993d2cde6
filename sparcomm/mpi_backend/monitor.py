"""A barrier that says who did not come, in Gloo's words, and a check that all ranks do the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from sparcomm.mpi_backend.buffers import view
from sparcomm.mpi_backend.work import Health
from sparcomm.transport.mpi.library import MPI
from sparcomm.transport.mpi.waiting import Interrupted, pending, strand, wait

LINE = 128  # bytes of what a rank says that it does
EXTRA = 5.0  # seconds that the others wait longer, so that rank 0 can tell them who did not come


def barrier(
    comm: MPI.Intracomm,
    ranks: Sequence[int],
    tag: int,
    timeout: timedelta,
    listen: Callable[[], str],
    wait_all_ranks: bool = False,
) -> None:
    """The first of the ranks waits for a byte from the others, and tells them who did not come.

    Those hear it when they come.

    Raises:
        DistBackendError: a rank did not come in time.
    """
    limit, rank = timeout.total_seconds(), comm.Get_rank()
    if limit <= 0:
        raise dist.DistBackendError(f"Rank {rank} timed out in monitoredBarrier, whose timeout is {limit:g} s")
    here = (_collect if rank == ranks[0] else _report)(comm, ranks, tag, limit, listen)
    if not (missing := [ranks[i] for i in (here == 0).nonzero().view(-1).tolist()]):
        return
    late = ", ".join(map(str, missing))
    if rank == ranks[0] and wait_all_ranks:
        text = f"Ranks {late} failed to pass monitoredBarrier in {limit * 1e3:g} ms"
    elif rank == ranks[0]:
        text = f"Rank {missing[0]} failed to pass monitoredBarrier in {limit * 1e3:g} ms (all: {late})"
    elif rank in missing:
        text = f"Rank {rank} failed to pass monitoredBarrier: it came too late (all: {late})"
    else:
        text = (
            f"Rank {rank} successfully reached monitoredBarrier, but received errors while waiting for send/recv from "
            f"rank {ranks[0]}: ranks {late} did not come"
        )
    raise dist.DistBackendError(text)


def same(comm: MPI.Intracomm, text: str, limit: float, health: Health) -> None:
    """Compares what the ranks are about to do: for debugging, since it is one more round.

    Raises:
        DistBackendError: on all ranks, if they differ; or time ran out.
    """
    mine, rows = torch.zeros(LINE, dtype=torch.uint8), torch.empty(comm.Get_size(), LINE, dtype=torch.uint8)
    data = text.encode()[:LINE]
    mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    request = comm.Iallgather([view(mine), MPI.BYTE], [view(rows), LINE, MPI.BYTE])
    try:
        wait(request.Test, limit, health.listen)
    except Interrupted as stop:
        strand([request], mine, rows)
        health.fail(f"{text}: {stop}")
        raise dist.DistBackendError(f"{text}: not all ranks came to it: {stop}") from None
    texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]
    if len(set(texts)) > 1:
        said = ", ".join(f"rank {i}: {each}" for i, each in enumerate(texts))
        raise dist.DistBackendError(f"ranks have called different operations: {said}")


def _collect(comm: MPI.Intracomm, ranks: Sequence[int], tag: int, limit: float, listen: Callable[[], str]) -> Tensor:
    """On the first rank: who came, as ones; tells the others."""
    came = torch.ones(len(ranks), dtype=torch.uint8)
    inbox = torch.empty_like(came)
    requests = [comm.Irecv([view(inbox[i]), MPI.BYTE], peer, tag) for i, peer in enumerate(ranks) if i]
    try:
        wait(lambda: not pending(requests), limit, listen)
    except Interrupted:
        for i in pending(requests):
            came[i + 1] = 0
        strand(requests, inbox)
    answers = [comm.Isend([view(came), MPI.BYTE], peer, tag) for peer in ranks[1:]]
    strand(answers, came)  # short, so they are on their way, or are kept
    return came


def _report(comm: MPI.Intracomm, ranks: Sequence[int], tag: int, limit: float, listen: Callable[[], str]) -> Tensor:
    """On the other ranks: tells the first one, and returns its answer."""
    came, word = torch.empty(len(ranks), dtype=torch.uint8), torch.ones(1, dtype=torch.uint8)
    answer = comm.Irecv([view(came), MPI.BYTE], ranks[0], tag)
    told = comm.Isend([view(word), MPI.BYTE], ranks[0], tag)
    try:
        wait(answer.Test, limit + EXTRA, listen)
    except Interrupted as stop:
        raise dist.DistBackendError(
            f"Rank {comm.Get_rank()} successfully reached monitoredBarrier, but received errors while waiting for "
            f"send/recv from rank {ranks[0]}: {stop}"
        ) from None
    finally:
        strand([answer, told], came, word)
    return came
