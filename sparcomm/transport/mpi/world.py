"""The ranks that MPI was started with: a communicator of our own over them, and their nodes.

Importing this makes an exception that nobody catches end all ranks (ending.py), if there are others.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from sparcomm.errors import ConfigError, PeerError
from sparcomm.transport.mpi import ending
from sparcomm.transport.mpi.library import MPI
from sparcomm.transport.mpi.notices import Notices
from sparcomm.transport.mpi.waiting import Interrupted, wait
from sparcomm.transport.mpi.watchdog import Guard

START = 300.0  # seconds in which all ranks have to come
_LEVELS = {
    MPI.THREAD_SINGLE: "MPI_THREAD_SINGLE",
    MPI.THREAD_FUNNELED: "MPI_THREAD_FUNNELED",
    MPI.THREAD_SERIALIZED: "MPI_THREAD_SERIALIZED",
    MPI.THREAD_MULTIPLE: "MPI_THREAD_MULTIPLE",
}


@dataclass(frozen=True)
class Job:
    """What is made once, by all ranks together.

    Attributes:
        comm: a duplicate of COMM_WORLD.
        board: how ranks tell each other that they give up.
        node_of: for each rank, the lowest rank that shares its memory.
    """

    comm: MPI.Intracomm
    board: Notices
    node_of: tuple[int, ...]


_jobs: list[Job] = []
_making = threading.Lock()


def started() -> bool:
    """Whether ``world()`` has been called."""
    return bool(_jobs)


def world() -> MPI.Intracomm:
    """A duplicate of COMM_WORLD that is sparcomm's, the same one at every call. The first call is collective.

    Raises:
        ConfigError: MPI has ended, or cannot be called from several threads.
        PeerError: not all ranks came within ``START`` seconds.
    """
    return _job().comm


def notices() -> Notices:
    """How ranks tell each other that they give up. Collective as ``world()`` is."""
    return _job().board


def node_of() -> Sequence[int]:
    """For each rank, the lowest rank that shares its memory: the name of its node. Collective as ``world()`` is."""
    return _job().node_of


def local() -> tuple[int, int]:
    """(this rank's number on its node, ranks of its node): those that share memory. Collective as ``world()`` is."""
    job, rank = _job(), world().Get_rank()
    node = [other for other, name in enumerate(job.node_of) if name == job.node_of[rank]]
    return node.index(rank), len(node)


def nodes(names: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The numbers of equal names together, in order of their first ones: (7, 3, 7) are ((0, 2), (1,))."""
    found: dict[int, list[int]] = {}
    for number, name in enumerate(names):
        found.setdefault(name, []).append(number)
    return tuple(map(tuple, found.values()))


def abort_on_error() -> None:
    """Collective as ``world()`` is: from now on failures reach all ranks, see ending.py."""
    world()


def _job() -> Job:
    if not _jobs:
        with _making:
            if not _jobs:
                _jobs.append(_start())
                ending.tell_by(_jobs[0].board)
    return _jobs[0]


def _start() -> Job:
    if MPI.Is_finalized():
        raise ConfigError("MPI has been finalized, and cannot be started again in the same process")
    level = MPI.Query_thread()
    if level < MPI.THREAD_MULTIPLE:
        raise ConfigError(
            f"MPI runs at thread level {_LEVELS[level]}, must be MPI_THREAD_MULTIPLE, since the hook communicates from "
            "a thread of its own: import sparcomm before mpi4py.MPI, or an MPI that is built with threads"
        )
    comm = _duplicate(MPI.COMM_WORLD)
    comm.Set_name("sparcomm")
    board = Notices(_duplicate(comm))
    with Guard(START, lambda: "starting: finding out which ranks share memory"):
        node = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.Get_rank())
        node_of = comm.allgather(node.bcast(comm.Get_rank()))
        node.Free()
    return Job(comm, board, tuple(node_of))


def _duplicate(comm: MPI.Intracomm) -> MPI.Intracomm:
    """Not by Dup, which has no limit, and would take a core from those who are still importing."""
    made, request = comm.Idup()
    try:
        wait(request.Test, START, str)
    except Interrupted as error:
        raise PeerError(f"starting: not all of {comm.Get_size()} ranks came here: {error}") from None
    return made


if not MPI.Is_finalized() and MPI.COMM_WORLD.Get_size() > 1:
    ending.install()
