"""A Gloo world of processes on this machine, and the backend's own collectives: what benches compare us with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

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
