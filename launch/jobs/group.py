"""This process among the others: where it stands, what it runs on, and how the job begins and ends."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparcomm import launch


class Group(NamedTuple):
    """Rank, number of ranks and device of this process."""

    rank: int
    size: int
    device: torch.device

    def mean(self, value: Tensor) -> Tensor:
        """The mean of ``value`` over the ranks; collective; ``value`` is overwritten."""
        dist.all_reduce(value)
        return value / self.size

    def total(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over the ranks; collective; ``value`` is overwritten."""
        dist.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        """Everyone's ``value``; collective."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier()


def first_to_say() -> bool:
    """Whether no other rank has asked before: what all ranks meet is to be printed once. True without torchrun.

    It asks torchrun's own store, which is there before the process group is, and after it has failed.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*where, is_master=False, timeout=timedelta(seconds=10))  # pyright: ignore[reportPrivateImportUsage]
        return store.add(f"said/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except RuntimeError:  # torchrun is gone
        return True


@contextmanager
def joined(timeout: float) -> Iterator[Group]:
    """Joins the other ranks, whatever launcher has started them, and leaves them again (see ``sparcomm.launch``)."""
    here = launch.init(timeout=timeout)
    try:
        yield Group(here.rank, here.size, here.device)
    finally:
        dist.destroy_process_group()


def seed_everything(seed: int, *more: int) -> None:
    """Seeds torch from a hash of the numbers: (seed, rank) for dropout, (seed,) for the first weights."""
    digest = hashlib.sha256("/".join(map(str, (seed, *more))).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "little"))


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the names and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
