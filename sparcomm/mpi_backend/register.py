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
from sparcomm.mpi_backend.channel import TAGS, Channel, free_left
from sparcomm.mpi_backend.group import MpiGroup
from sparcomm.mpi_backend.identity import NAME
from sparcomm.mpi_backend.monitor import Roll
from sparcomm.transport.mpi.library import MPI
from sparcomm.transport.mpi.notices import EVERY
from sparcomm.transport.mpi.world import notices, world

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
    free_left()
    rank, size, ranks = options.group_rank, options.group_size, list(options.global_ranks_in_group)
    comm, key = _subset(ranks, options.timeout) if ranks else _default(rank, size, options.timeout)
    if (comm.Get_rank(), comm.Get_size()) != (rank, size):
        raise ConfigError(
            f"rank {rank} of {size} for torch is rank {comm.Get_rank()} of {comm.Get_size()} for MPI: must be the same"
        )
    board, roll = notices(), Roll(range(size), _in_world(comm, range(size)), key)
    return MpiGroup(options.store, Channel(comm, comm.Dup()), roll, options.timeout, lambda: board.look(EVERY))


def _default(rank: int, size: int, timeout: timedelta) -> tuple[MPI.Intracomm, int]:
    everyone = world()
    if size not in (1, everyone.Get_size()):
        raise ConfigError(
            f"world_size={size}: must be {everyone.Get_size()}, the processes that MPI was started with (or 1); "
            "start this program with mpirun -n"
        )
    key = _meet(range(size), range(size), timeout) if size > 1 else 0
    before: Any = _base.pop("comm", MPI.COMM_SELF)
    if before != MPI.COMM_SELF:
        before.Free()
    # torch may have been told other numbers than MPI's.
    base: Any = MPI.COMM_SELF if size == 1 else everyone.Split(0, rank)
    _base["comm"] = base
    return base.Dup(), key


def _subset(ranks: list[int], timeout: timedelta) -> tuple[MPI.Intracomm, int]:
    base: Any = _base.get("comm") or world()
    if dist.get_rank() != base.Get_rank():
        raise ConfigError(f"rank {dist.get_rank()} for torch is rank {base.Get_rank()} for MPI: must be the same")
    key = _meet(ranks, _in_world(base, ranks), timeout)
    return base.Create_group(base.Get_group().Incl(ranks), key % TAGS), key


def _in_world(comm: MPI.Intracomm, ranks: Sequence[int]) -> list[int]:
    return list(comm.Get_group().Translate_ranks(list(ranks), world().Get_group()))


def _meet(ranks: Sequence[int], members: Sequence[int], timeout: timedelta) -> int:
    """Returns when all of these ranks are here, since MPI makes communicators without a time limit; the group's key.

    Raises:
        DistBackendError: a rank did not come in time.
    """
    names = tuple(members)
    _made[names] += 1
    # Not from the group's name: with use_local_synchronization torch counts groups in it, of which ranks have different
    # numbers.
    key, board = zlib.crc32(repr((names, _made[names])).encode()), notices()
    try:
        Roll(ranks, members, key).call(timeout, lambda: board.look(EVERY), wait_all_ranks=True)
    except dist.DistBackendError as error:
        raise dist.DistBackendError(f"{NAME} backend, a new group of the ranks {list(ranks)}: {error}") from None
    return key
