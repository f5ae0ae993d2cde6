"""How torch.distributed gets to know the backend, and makes groups of it."""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from sparcomm.errors import ConfigError
from sparcomm.mpi_backend import monitor
from sparcomm.mpi_backend.channel import Channel
from sparcomm.mpi_backend.group import MpiGroup
from sparcomm.mpi_backend.identity import NAME
from sparcomm.transport.mpi.library import MPI
from sparcomm.transport.mpi.notices import EVERY
from sparcomm.transport.mpi.world import notices, world

TAGS = 1 << 15  # every MPI has as many
# The communicator whose ranks are those of torch's default group.
_base: dict[str, Any] = {}
_made: Counter[tuple[int, ...]] = Counter()  # groups of the same ranks


def register() -> None:
    """Makes the backend known. Once per process."""
    dist.Backend.register_backend(NAME, make, extended_api=True, devices=["cpu"])
    before = c10d.monitored_barrier

    @functools.wraps(before)
    def monitored_barrier(group: Any = None, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        chosen = group or dist.group.WORLD
        if not isinstance(chosen, MpiGroup):
            return before(group, timeout, wait_all_ranks)
        limit = timedelta(seconds=timeout) if isinstance(timeout, (int, float)) else timeout
        return chosen.monitored_barrier(limit, wait_all_ranks)

    c10d.monitored_barrier = dist.monitored_barrier = monitored_barrier


def make(options: Any, _: object = None) -> MpiGroup:
    """A group, over all ranks or some. Collective over its ranks.

    Raises:
        ConfigError: torch and MPI do not count the same ranks.
    """
    rank, size, ranks = options.group_rank, options.group_size, list(options.global_ranks_in_group)
    comm = _subset(ranks, options.timeout) if ranks else _default(rank, size, options.timeout)
    if (comm.Get_rank(), comm.Get_size()) != (rank, size):
        raise ConfigError(
            f"rank {rank} of {size} for torch is rank {comm.Get_rank()} of {comm.Get_size()} for MPI: must be the same"
        )
    board = notices()
    return MpiGroup(options.store, Channel(comm, comm.Dup()), options.timeout, lambda: board.look(EVERY))


def _default(rank: int, size: int, timeout: timedelta) -> MPI.Intracomm:
    everyone = world()
    if size not in (1, everyone.Get_size()):
        raise ConfigError(
            f"world_size={size}: must be {everyone.Get_size()}, the processes that MPI was started with (or 1); "
            "start this program with mpirun -n"
        )
    before: Any = _base.pop("comm", MPI.COMM_SELF)
    if before != MPI.COMM_SELF:
        before.Free()
    if size > 1:
        _meet(everyone, range(size), timeout)
    # torch may have been told other numbers than MPI's.
    base: Any = MPI.COMM_SELF if size == 1 else everyone.Split(0, rank)
    _base["comm"] = base
    return base.Dup()


def _subset(ranks: list[int], timeout: timedelta) -> MPI.Intracomm:
    base: Any = _base.get("comm") or world()
    if dist.get_rank() != base.Get_rank():
        raise ConfigError(f"rank {dist.get_rank()} for torch is rank {base.Get_rank()} for MPI: must be the same")
    tag = _meet(base, ranks, timeout)
    return base.Create_group(base.Get_group().Incl(ranks), tag)


def _meet(comm: MPI.Intracomm, ranks: Sequence[int], timeout: timedelta) -> int:
    """Returns when all of these ranks are here, since MPI makes communicators without a time limit; a tag for it.

    Raises:
        DistBackendError: a rank did not come in time.
    """
    key = tuple(ranks)
    _made[key] += 1
    # Not by the group's name: with use_local_synchronization torch counts groups in it, of which ranks have different
    # numbers.
    tag, board = zlib.crc32(repr((key, _made[key])).encode()) % TAGS, notices()
    try:
        monitor.barrier(comm, ranks, tag, timeout, lambda: board.look(EVERY), wait_all_ranks=True)
    except dist.DistBackendError as error:
        raise dist.DistBackendError(f"{NAME} backend, a new group of the ranks {list(ranks)}: {error}") from None
    return tag
