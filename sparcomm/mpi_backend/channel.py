"""How operations move their bytes: what is written here as a generator is moved on by ``MpiWork``.

Each yields the MPI requests that have to be complete before it goes on. The first step of an operation starts when it
is called, so MPI's collectives are started in the order of the calls, the same on all ranks. Later steps come at any
time, so they are point to point, under a tag that is the operation's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparcomm.mpi_backend.buffers import pieces
from sparcomm.mpi_backend.reductions import Reduction
from sparcomm.mpi_backend.work import Received, Requests, Steps
from sparcomm.transport.mpi.library import MPI
from sparcomm.transport.mpi.types import LONGEST, view

# As many tags as MPI has, 1 << 31 with Open MPI and at least 1 << 15. An operation's comes again after so many others,
# by when it must have ended.
TAGS = (MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 0x7FFF) + 1
SEGMENT = 1 << 20  # bytes that are added up at once, so that they are still in the cache
NATIVE = 1 << 19  # bytes up to which MPI's own Iallreduce is used
GATHERED = 1 << 14  # bytes, of all ranks, up to which what MPI cannot add is gathered on all ranks and added there


# Communicators that this rank has left, with a barrier that ends when all have. Freed earlier, their numbers could go
# to new ones while messages are still on their way, which would then be taken for the new ones'.
_leaving: list[tuple[MPI.Request, list[MPI.Intracomm]]] = []


def free_left() -> None:
    """Frees the communicators that all their ranks have left."""
    for left in list(_leaving):
        request, comms = left
        if request.Test():
            _leaving.remove(left)
            for comm in comms:
                comm.Free()


class Channel:
    """A group's communicators.

    Args:
        comm: for collectives, and the messages that belong to them.
        pairs: for the caller's own messages.
    """

    def __init__(self, comm: MPI.Intracomm, pairs: MPI.Intracomm) -> None:
        self.comm, self.pairs = comm, pairs
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._calls = itertools.count()

    def leave(self) -> None:
        """Gives the communicators back, once all their ranks have called this. Does not wait for them."""
        # Not on ``comm``, where it would be taken for a barrier in which others wait for this rank.
        _leaving.append((self.pairs.Ibarrier(), [self.comm, self.pairs]))
        free_left()

    def next_tag(self) -> int:
        """The tag of one operation; ranks that call the same operations get the same one."""
        return next(self._calls) % TAGS

    # ---- moving ---------------------------------------------------------------------------------------------------

    def post(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], tag: int) -> Requests:
        """Starts messages to and from the given ranks; tensors are plain, and empty ones do not travel."""
        requests = Received()
        for peer, t in receives.items():
            for part in pieces(t) if t.numel() else ():
                requests.expect(self.comm.Irecv([part, MPI.BYTE], peer, tag), len(part))
        for peer, t in sends.items():
            requests += [self.comm.Isend([part, MPI.BYTE], peer, tag) for part in pieces(t) if t.numel()]
        return requests

    def exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor], tag: int) -> Steps:
        """Messages to and from the given ranks, itself among them."""
        mine = receives.get(self.rank)
        yield self.post(self._others(sends), self._others(receives), tag)
        if mine is not None and mine.data_ptr() != sends[self.rank].data_ptr():
            mine.copy_(sends[self.rank].view_as(mine))

    def _others(self, tensors: Mapping[int, Tensor]) -> Mapping[int, Tensor]:
        """In an order in which the ranks do not all begin with the same one."""
        order = [(self.rank + i) % self.size for i in range(1, self.size)]
        return {peer: tensors[peer] for peer in order if peer in tensors}

    def broadcast(self, t: Tensor, root: int) -> Steps:
        """``t`` of the root."""
        yield [self.comm.Ibcast([part, MPI.BYTE], root) for part in pieces(t)]

    def receive(self, t: Tensor, peer: int, tag: int) -> Steps:
        """The caller's own message, from a rank or ``MPI.ANY_SOURCE``; it may be shorter than ``t``."""
        first, *others = pieces(t)
        if others and peer == MPI.ANY_SOURCE:  # the rest has to come from the same rank
            statuses = yield [self.pairs.Irecv([first, MPI.BYTE], peer, tag)]
            yield [self.pairs.Irecv([part, MPI.BYTE], statuses[0].Get_source(), tag) for part in others]
        else:
            yield [self.pairs.Irecv([part, MPI.BYTE], peer, tag) for part in (first, *others)]

    def gather_all(self, out: Tensor, t: Tensor, tag: int) -> Steps:
        """``out`` becomes the ranks' ``t``, one after the other; ``t`` may be its place in there."""
        rows = out.view(-1).view(self.size, t.numel())
        if t.nbytes > LONGEST:
            yield from self.exchange(dict.fromkeys(range(self.size), t.view(-1)), dict(enumerate(rows)), tag)
        else:
            in_place = t.numel() and rows[self.rank].data_ptr() == t.data_ptr()
            mine = MPI.IN_PLACE if in_place else [view(t), MPI.BYTE]
            yield [self.comm.Iallgather(mine, [view(out), t.nbytes, MPI.BYTE])]

    # ---- reducing -------------------------------------------------------------------------------------------------

    def reduce_all(self, t: Tensor, how: Reduction, tag: int) -> Steps:
        """``t`` becomes the reduction of all ranks' ``t``, the same bits on each."""
        native = how.native
        if self.size == 1:
            how.finish(t)
        elif native is not None and t.nbytes <= NATIVE:
            yield [self.comm.Iallreduce(MPI.IN_PLACE, [view(t), native[0]], native[1])]
            how.finish(t)
        elif t.nbytes * self.size <= GATHERED:
            rows = t.new_empty((self.size, t.numel()))
            yield [self.comm.Iallgather([view(t), MPI.BYTE], [view(rows), t.nbytes, MPI.BYTE])]
            how.fold(rows.unbind(), t.view(-1))
        else:
            parts = self.parts(t)
            yield from self.reduce_parts(parts, parts[self.rank], how, tag, range(self.size))

    def reduce_to(self, t: Tensor, out: Tensor, root: int, how: Reduction, tag: int) -> Steps:
        """``out`` of the root becomes the reduction of all ranks' ``t``."""
        parts = self.parts(t)
        yield from self.reduce_parts(parts, torch.empty_like(parts[self.rank]), how, tag, [root], self.parts(out))

    def parts(self, t: Tensor) -> list[Tensor]:
        """``t`` cut into one part a rank; the last ones may be shorter, or empty."""
        flat = t.view(-1)
        width = -(-flat.numel() // self.size)
        return [flat[i * width : (i + 1) * width] for i in range(self.size)]

    def reduce_parts(
        self,
        parts: Sequence[Tensor],
        out: Tensor,
        how: Reduction,
        tag: int,
        readers: Sequence[int] = (),
        results: Sequence[Tensor] | None = None,
    ) -> Steps:
        """``out`` becomes the reduction of all ranks' ``parts[rank]``, which then goes to the ``readers``.

        Segment by segment: while one is added up, the next one travels.

        Args:
            parts: flat and plain, one for each rank, of the same sizes on all ranks.
            results: where readers put them; None = in place of ``parts``.
        """
        results = parts if results is None else results
        length = max(1, SEGMENT // out.element_size())
        count = max(-(-part.numel() // length) for part in parts)
        spare = [out.new_empty((self.size, min(length, max(1, out.numel())))) for _ in range(min(2, count))]
        everyone = range(self.size)

        def cut(t: Tensor, segment: int) -> Tensor:
            return t[segment * length : (segment + 1) * length]

        def collect(segment: int) -> Requests:
            width, rows = cut(out, segment).numel(), spare[segment % 2]
            sends = self._others({peer: cut(parts[peer], segment) for peer in everyone})
            return self.post(sends, self._others({peer: rows[peer, :width] for peer in everyone}), tag)

        last: Requests = []
        under_way = collect(0) if count else []
        for segment in range(count):
            following = collect(segment + 1) if segment + 1 < count else []
            yield under_way
            mine, width = cut(out, segment), cut(out, segment).numel()
            rows = [spare[segment % 2][peer, :width] for peer in everyone]
            rows[self.rank] = cut(parts[self.rank], segment)
            if width:
                how.fold(rows, mine)
            under_way = following
            last += self._publish(mine, [cut(result, segment) for result in results], readers, tag)
        yield last

    def _publish(self, mine: Tensor, results: list[Tensor], readers: Sequence[int], tag: int) -> Requests:
        receives = self._others(dict(enumerate(results))) if self.rank in readers else {}
        if self.rank in readers and results[self.rank].data_ptr() != mine.data_ptr():
            results[self.rank].copy_(mine)
        return self.post(self._others(dict.fromkeys(readers, mine)), receives, tag)
