"""Gloo worlds of processes on this machine, and the backend's own collectives: what benches need of torch itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from sparcomm.transport.torchdist import TorchTransport


def run_local(size: int, fn: Callable[[TorchTransport], None]) -> None:
    """Calls ``fn(transport)`` on ``size`` new processes with one thread each. Raises if one of them fails.

    ``fn`` must be picklable, that is, at the top level of a module.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (size, str(Path(folder) / "store"), fn)
        torch.multiprocessing.spawn(_rank, arguments, nprocs=size)  # pyright: ignore[reportPrivateImportUsage]


def _rank(rank: int, size: int, path: str, fn: Callable[[TorchTransport], None]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(path, size)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    transport = TorchTransport.from_group()
    try:
        fn(transport)
        dist.barrier()
    finally:
        transport.close()
        dist.destroy_process_group()


def native_all_gather(out: Tensor, x: Tensor) -> None:
    """The default group's own all_gather: row i of ``out`` (p, *x.shape) becomes rank i's ``x``."""
    # torch 2.13 renamed it, and warns under the old name.
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out.view(-1), x.view(-1))


def native_all_to_all(out: Tensor, x: Tensor) -> None:
    """The default group's own all_to_all of equal rows."""
    dist.all_to_all_single(out, x)


def _tcp_store(port: int) -> Any:
    """One that is hosted here for port 0, else a connection to the one at that port of this machine."""
    # What PyTorch documents, but does not list as exported.
    store = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    return store("127.0.0.1", port, is_master=port == 0, wait_for_workers=False)


class Meeting:
    """A store outside the ranks, as torchrun's, where any number of worlds meet: keep it while they live."""

    def __init__(self) -> None:
        self._store = _tcp_store(0)
        self.port: int = self._store.port


def join_world(port: int, world: str, rank: int, size: int, *, rank_hosts: bool, timeout: float) -> None:
    """Makes the default group over Gloo. Collective over the ranks of ``world``.

    Args:
        port: of a ``Meeting``.
        world: a name that no other world of that meeting has.
        rank_hosts: whether rank 0 hosts the group's store, as without a launcher, rather than the meeting.
        timeout: of the default group, in seconds.
    """
    store = c10d.PrefixStore(world, _tcp_store(port))
    if rank_hosts:
        if rank == 0:
            own = _tcp_store(0)
            store.set("host", str(own.port))
        else:
            own = _tcp_store(int(store.get("host")))
        store = own
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))


def limit_world(timeout: float) -> None:
    """Sets how many seconds the default group's operations may take from now on: joining takes longer than they do."""
    limit = timedelta(seconds=timeout)
    c10d._set_pg_timeout(limit, dist.group.WORLD)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
