"""Process groups: which backend takes which tensors, groups of our own, and how to end one so that peers notice.

**Groups of our own** are made as backend objects on a prefix of the job's store that the ranks have agreed on, not
by ``dist.new_group``: its name for ``use_local_synchronization=True`` is a hash of the ranks and of how many groups
the process has at that moment. Ranks that have different numbers of groups wait for each other in vain, and a group
made again after ``destroy_process_group`` finds the dead group's addresses in the store (torch 2.13: 30 rounds of
new_group, all_reduce, destroy on 4 ranks fail from round 2 on). Ours, too, involve their members only.

**Waking peers.** A Gloo wait has no cancellation: ``abort()`` and ``shutdown()`` of the group return and leave the
peers waiting until the process ends (measured, torch 2.13). Two things do wake them, within 5 to 60 ms, be they in
recv, send, all_to_all or all_reduce: destroying the group with the last reference to it, which is hard to be sure
of; and a receive that runs out of time, upon which Gloo closes *all* connections of its group. So ``sever`` posts one
that is never answered, with 1 ms to live. Only those wake who wait for this very rank.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sparcomm.errors import ConfigError, NotInitializedError

# Which backend can take tensors of which device type as they are. Gloo registers for CUDA but cannot send from it.
_DIRECT = {"gloo": "cpu", "mpi": "cpu", "nccl": "cuda"}
NEVER_SENT = 0x7FFFFFFF  # a tag that no message has


class Links:
    """The backends of one group, by device type, and how to end them."""

    def __init__(self, backends: dict[str, Any], names: dict[str, str], destroy: Callable[[], None] | None) -> None:
        self.backends, self.names, self.destroy = backends, names, destroy

    def sever(self, rank: int, size: int) -> None:
        """Makes peers' waits on this rank fail."""
        for device, backend in self.backends.items():
            if self.names[device] == "gloo":
                for peer in range(size):
                    # One is enough, unless that peer's connection is broken already: then the next one serves.
                    if peer != rank:
                        quietly(lambda b=backend, p=peer: expire(b, p))
            elif hasattr(backend, "abort"):
                quietly(backend.abort)

    def close(self) -> None:
        """Drops the backends; a group that is ours ends with the last reference to them."""
        self.backends = {}
        if self.destroy is not None:
            quietly(self.destroy)
            self.destroy = None


def find_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group, or the default one. Raises NotInitializedError, or ConfigError if this rank is outside."""
    if not dist.is_available():
        raise NotInitializedError("this PyTorch was built without torch.distributed")
    if not dist.is_initialized():
        raise NotInitializedError(
            "torch.distributed is not initialised: call torch.distributed.init_process_group() first, "
            "in a script started by torchrun"
        )
    pg: Any = dist.group.WORLD if group is None else group
    if not isinstance(pg, dist.ProcessGroup) or dist.get_rank(pg) < 0:
        raise ConfigError(f"group={group!r}, must be a process group that rank {dist.get_rank()} belongs to")
    return pg


def backend_names(pg: dist.ProcessGroup) -> dict[str, str]:
    """Backend names by device type, such as ``{"cpu": "gloo", "cuda": "nccl"}``."""
    return dict(pair.split(":", 1) for pair in dist.get_backend_config(pg).split(","))


def usable(kind: str, name: str) -> bool:
    """Whether the backend takes tensors of that device type as they are; unknown backends know themselves."""
    return _DIRECT.get(name, kind) == kind


def backend_of(pg: dist.ProcessGroup, kind: str) -> Any:
    """The object that moves a group's tensors of one device type; a group written in Python is its own."""
    try:
        return pg._get_backend(torch.device(kind))  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    except RuntimeError:
        return pg


def make_links(name: str, rank: int, ranks: list[int], like: Links, timeout: timedelta) -> Links:
    """Backends like those of ``like`` for a new group of the given ranks of the world. Collective over them."""
    names = {kind: like.names[kind] for kind in like.backends}
    if len(ranks) == 1:
        return Links({}, names, None)
    if not set(names.values()) <= {"gloo", "nccl"}:
        config = ",".join(f"{kind}:{backend}" for kind, backend in names.items())
        pg: Any = dist.new_group(ranks, timeout, config, use_local_synchronization="mpi" not in names.values())
        return Links({kind: backend_of(pg, kind) for kind in names}, names, lambda: dist.destroy_process_group(pg))
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    backends: dict[str, Any] = {}
    for kind, backend in names.items():
        prefix = dist.distributed_c10d.PrefixStore(f"{name}/{kind}/", store)
        if backend == "gloo":
            backends[kind] = dist.ProcessGroupGloo(prefix, rank, len(ranks), timeout)
        else:
            # A high-priority stream, so that messages do not queue behind the backward pass.
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            options._timeout = timeout  # noqa: SLF001
            backends[kind] = dist.ProcessGroupNCCL(prefix, rank, len(ranks), options)
    nccl = [backends[kind] for kind, backend in names.items() if backend == "nccl"]
    return Links(backends, names, nccl[0].shutdown if nccl else None)


def expire(backend: Any, peer: int) -> None:
    """Waits 1 ms for a message that never comes, upon which Gloo closes all connections of the group."""
    backend.recv([torch.empty(1, dtype=torch.uint8, device="cpu")], peer, NEVER_SENT).wait(timedelta(milliseconds=1))


def quietly(call: Callable[[], object]) -> None:
    """Runs what may fail because the other side is gone."""
    try:
        call()
    except (RuntimeError, ValueError, AssertionError):
        return
