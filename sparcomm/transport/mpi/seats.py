"""Places in groups of ranks: how a transport's communicator is made, with a time limit and the names of who is late.

MPI makes communicators by collective calls, most of which cannot be left again. So the ranks first meet point to point.
"""

from __future__ import annotations

import itertools
import threading
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sparcomm.errors import ConfigError, PeerError
from sparcomm.transport.common import Shared
from sparcomm.transport.mpi.library import MPI
from sparcomm.transport.mpi.notices import EVERY
from sparcomm.transport.mpi.waiting import Interrupted, pending, strand, wait
from sparcomm.transport.mpi.watchdog import Guard
from sparcomm.transport.mpi.world import notices, started, world

_TAGS = 32767  # every MPI has as many
_EXTRA = 1.0  # seconds that the others wait longer for the first rank, which tells them who is late

_meetings: defaultdict[tuple[int, ...], Iterator[int]] = defaultdict(itertools.count)
_counting = threading.Lock()


class Family(Shared):
    """What a transport and its sub-groups have in common.

    Attributes:
        number: of the family, the same on all its ranks, and of no other.
        ranks: of the job, by rank of the first group.
    """

    def __init__(self, number: int, ranks: list[int]) -> None:
        super().__init__()
        self.number, self.ranks = number, ranks


@dataclass
class Seat:
    """A place in a group that is made already, and whose communicator is ours.

    Attributes:
        ranks: of the job, by rank of the group.
    """

    comm: MPI.Intracomm
    family: Family
    ranks: list[int]


def take(comm: MPI.Intracomm, limit: float) -> Seat:
    """In a duplicate of ``comm``, and in a new family. Collective, within ``limit`` seconds."""
    group, everyone = comm.Get_group(), world().Get_group()
    ranks = group.Translate_ranks(list(range(comm.Get_size())), everyone)
    group.Free()
    everyone.Free()
    if MPI.UNDEFINED in ranks:
        raise ConfigError(f"communicator of {comm.Get_size()} ranks: all must be ranks that mpirun has started")
    meet(ranks, limit)
    own, request = comm.Idup()
    _until(request, limit, comm)
    request, number = notices().new_family(own)
    _until(request, limit, number)
    return Seat(own, Family(int.from_bytes(number, "little"), ranks), ranks)


def take_some(ranks: Sequence[int], limit: float) -> Seat:
    """In a group of some ranks of the job, in that order. Collective over these, within ``limit`` seconds.

    Raises:
        ConfigError: these are no ranks of the job, or this one is not among them, or not all ranks of the job have
            called ``world()``.
        PeerError: not all of them came in time.
    """
    everyone = MPI.COMM_WORLD.Get_size()
    if len(ranks) < everyone and not started():
        raise ConfigError(
            f"transport over {len(ranks)} of {everyone} ranks: all ranks of the job must have called "
            "sparcomm.transport.mpi.world.world() before, or have imported sparcomm.mpi_backend"
        )
    me = world().Get_rank()
    if len(set(ranks)) < len(ranks) or not set(ranks) <= set(range(everyone)) or me not in ranks:
        raise ConfigError(
            f"transport over ranks {list(ranks)}: must be different ones from 0 to {everyone - 1}, and {me}, this one"
        )
    if list(ranks) == list(range(everyone)):
        return take(world(), limit)
    meet(ranks, limit)
    whole = world().Get_group()
    group = whole.Incl(list(ranks))
    with Guard(limit, lambda: f"making a transport over ranks {list(ranks)}"):
        comm = world().Create_group(group, zlib.crc32(repr(list(ranks)).encode()) % _TAGS)
    whole.Free()
    group.Free()
    try:
        return take(comm, limit)
    finally:
        comm.Free()


def meet(ranks: Sequence[int], limit: float) -> None:
    """Returns when all these ranks of the job are here.

    Raises:
        PeerError: names those that were not in time; on all that were, and on the late ones.
    """
    comm, first = world(), ranks[0]
    with _counting:
        number = next(_meetings[tuple(ranks)])
    # A rank that came too late has left a byte, which must not count at the next meeting.
    tag = zlib.crc32(repr((list(ranks), number)).encode()) % _TAGS
    came = bytearray([1] * len(ranks))
    told = ""
    if comm.Get_rank() == first:
        words = [bytearray(1) for _ in ranks]
        requests = [comm.Irecv([words[i], MPI.BYTE], ranks[i], tag) for i in range(1, len(ranks))]
        try:
            wait(
                lambda: MPI.Request.Testall(requests),
                limit,
                lambda: notices().look(EVERY, lambda: [ranks[i + 1] for i in pending(requests)]),
            )
        except Interrupted as stop:
            told = str(stop)
            for i in pending(requests):
                came[i + 1] = 0
            strand(requests, words)
        strand([comm.Isend([came, MPI.BYTE], ranks[i], tag) for i in range(1, len(ranks))], came)
    else:
        word = bytearray(1)
        requests = [comm.Irecv([came, MPI.BYTE], first, tag), comm.Isend([word, MPI.BYTE], first, tag)]
        try:
            wait(lambda: MPI.Request.Testall(requests), limit + _EXTRA, lambda: notices().look(EVERY))
        except Interrupted as stop:
            told, came = str(stop), bytearray([0])
            strand(requests, came, word)
    if late := [rank for rank, there in zip(ranks, came, strict=False) if not there]:
        who = f"rank {late[0]}" if len(late) == 1 else f"ranks {late}"
        raise PeerError(
            f"making a transport over {len(ranks)} ranks: waiting for {who} of the job: "
            f"{told or f'nothing within {limit:g} s'}"
        )


def _until(request: MPI.Request, limit: float, *buffers: object) -> None:
    try:
        wait(request.Test, limit, lambda: notices().look(EVERY))
    except Interrupted as error:
        strand([request], *buffers)
        raise PeerError(f"making a transport: not all ranks went through: {error}") from None
