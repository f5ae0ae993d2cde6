"""A barrier that says who did not come, in Gloo's words, and a check that all ranks do the same."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from sparcomm.mpi_backend.channel import TAGS
from sparcomm.mpi_backend.work import Health
from sparcomm.transport.mpi.library import MPI
from sparcomm.transport.mpi.types import view
from sparcomm.transport.mpi.waiting import Interrupted, pending, strand, wait
from sparcomm.transport.mpi.world import world

LINE = 128  # bytes of what a rank says that it does
EXTRA = 5.0  # seconds that the others wait longer, so that the first rank can tell them who did not come


class Roll:
    """Calls the ranks of a group, which need not have a communicator yet.

    What is sent to those who do not come is never received. So it goes over the job's own communicator, which is never
    freed: Open MPI gives a freed one's number, and messages that are late, to the next.

    Args:
        ranks: what to call them.
        members: the same, in ``world()``.
        key: the same on all of them, and another one for each group.
    """

    def __init__(self, ranks: Sequence[int], members: Sequence[int], key: int) -> None:
        self._ranks, self._members, self._key = ranks, members, key
        self._mine = members.index(world().Get_rank())
        self._calls = itertools.count()

    def call(self, timeout: timedelta, listen: Callable[[], str], wait_all_ranks: bool = False) -> None:
        """The first rank waits for a byte from the others, and tells them who did not come; these hear it when they do.

        Raises:
            DistBackendError: a rank did not come in time.
        """
        limit, me, first = timeout.total_seconds(), self._ranks[self._mine], self._ranks[0]
        if limit <= 0:
            raise dist.DistBackendError(f"Rank {me} timed out in monitoredBarrier, whose timeout is {limit:g} s")
        # A rank that misses a call gets out of step with the group's others in this alone.
        tag = zlib.crc32(f"{self._key}/{next(self._calls)}".encode()) % TAGS
        here = (self._report if self._mine else self._collect)(tag, limit, listen)
        if not (missing := [self._ranks[i] for i in (here == 0).nonzero().view(-1).tolist()]):
            return
        late = ", ".join(map(str, missing))
        if self._mine == 0 and wait_all_ranks:
            text = f"Ranks {late} failed to pass monitoredBarrier in {limit * 1e3:g} ms"
        elif self._mine == 0:
            text = f"Rank {missing[0]} failed to pass monitoredBarrier in {limit * 1e3:g} ms (all: {late})"
        elif me in missing:
            text = f"Rank {me} failed to pass monitoredBarrier: it came too late (all: {late})"
        else:
            text = (
                f"Rank {me} successfully reached monitoredBarrier, but received errors while waiting for send/recv "
                f"from rank {first}: ranks {late} did not come"
            )
        raise dist.DistBackendError(text)

    def _collect(self, tag: int, limit: float, listen: Callable[[], str]) -> Tensor:
        """On the first rank: who came, as ones; tells the others."""
        came = torch.ones(len(self._members), dtype=torch.uint8)
        others = self._members[1:]
        inbox = torch.empty_like(came)
        requests = [world().Irecv([view(inbox[i]), MPI.BYTE], peer, tag) for i, peer in enumerate(others)]
        try:
            wait(lambda: not pending(requests), limit, listen)
        except Interrupted:
            for i in pending(requests):
                came[i + 1] = 0
            strand(requests, inbox)
        answers = [world().Isend([view(came), MPI.BYTE], peer, tag) for peer in others]
        strand(answers, came)  # short, so they are on their way, or are kept
        return came

    def _report(self, tag: int, limit: float, listen: Callable[[], str]) -> Tensor:
        """On the other ranks: tells the first one, and returns its answer."""
        came, word = torch.empty(len(self._members), dtype=torch.uint8), torch.ones(1, dtype=torch.uint8)
        answer = world().Irecv([view(came), MPI.BYTE], self._members[0], tag)
        told = world().Isend([view(word), MPI.BYTE], self._members[0], tag)
        try:
            wait(answer.Test, limit + EXTRA, listen)
        except Interrupted as stop:
            raise dist.DistBackendError(
                f"Rank {self._ranks[self._mine]} successfully reached monitoredBarrier, but received errors while "
                f"waiting for send/recv from rank {self._ranks[0]}: {stop}"
            ) from None
        finally:
            strand([answer, told], came, word)
        return came


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
