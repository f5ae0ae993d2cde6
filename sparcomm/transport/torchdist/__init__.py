"""The transport over torch.distributed: CPU tensors on Gloo, CUDA tensors on NCCL, everything else through the host.

Everything moves as bytes, since backends differ in the dtypes they know. Gathering is Bruck's over p2p, because
Gloo's own all_gather takes 1.3 to 4 times as long for large tensors; exchanging is Gloo's all_to_all, which beats
p2p by waiting once in C++ instead of 2(p-1) times from Python (``python -m sparcomm.bench.gather``).

Sizes are by contract: a size mismatch on Gloo is a SIGABRT in C++ that nobody can catch.
"""

from __future__ import annotations

import atexit
import os
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparcomm.errors import ConfigError, PeerError
from sparcomm.transport.base import Op
from sparcomm.transport.common import BaseTransport, Call, Shared
from sparcomm.transport.limits import as_timedelta
from sparcomm.transport.staging import Staging, as_bytes
from sparcomm.transport.torchdist.groups import (
    NEVER_SENT,
    Links,
    backend_names,
    backend_of,
    find_group,
    make_links,
    usable,
)

TIMEOUT = timedelta(minutes=5)
T = TypeVar("T")


@dataclass
class Seat:
    """A place in a group: its ranks in the world, its backends, its name in the store, and what is shared."""

    ranks: list[int]
    links: Links
    name: str = ""
    shared: Shared | None = None
    family: list[TorchTransport] = field(default_factory=list)


class TorchTransport(BaseTransport):
    """A transport over a torch.distributed process group.

    Blocks the host on Gloo; on NCCL only orders the current stream. Tensors on a device the group's backends cannot
    take are staged through cached (pinned, if CUDA) host memory. ``exchange(capacity=True)`` needs a backend that
    takes short messages: Gloo or MPI.

    Args:
        group: a process group this rank belongs to; None = the default group. It stays the caller's: nothing else
            may use it from another thread, except that ``abort`` breaks its connections.
        device: where tensors usually live; used for set-up where a group cannot take CPU tensors.
        timeout: of sub-groups made by ``split``: timedelta or seconds. Waits on ``group`` have its own time limit.
        seat: a place in a group that is made already, instead of ``group``: for ``split`` and ``from_group``.

    Attributes:
        links: the group's backends.

    Raises:
        NotInitializedError: torch.distributed is not initialised.
        ConfigError: this rank is not in ``group``.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str | None = None,
        timeout: timedelta | float = TIMEOUT,
        seat: Seat | None = None,
    ) -> None:
        if seat is None:
            pg = find_group(group)
            config = backend_names(pg)
            backends = {kind: backend_of(pg, kind) for kind, name in config.items() if usable(kind, name)}
            seat = Seat(dist.get_process_group_ranks(pg), Links(backends, config, None))
        super().__init__(seat.ranks.index(dist.get_rank()), len(seat.ranks), seat.shared)
        self.links, self._ranks, self._name = seat.links, seat.ranks, seat.name
        self._device = torch.device(device) if device is not None else None
        self._timeout = as_timedelta(timeout)
        self._process = os.getpid()
        self._staging = Staging()
        self._staged: set[str] = set()  # device types known to go through the host
        # All that share this rank's fate: abort ends them together.
        self._family: list[TorchTransport] = seat.family
        self._family.append(self)
        _open.add(self)

    @classmethod
    def from_group(
        cls,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str | None = None,
        timeout: timedelta | float = TIMEOUT,
        name: str = "",
    ) -> TorchTransport:
        """A transport on a new group of its own over the ranks of ``group``. Collective over these ranks only.

        Args:
            group: whose ranks and backends to take; used during this call only. None = the default group.
            device: where tensors usually live.
            timeout: how long any wait may take, timedelta or seconds.
            name: the same on all ranks, and never used before in this job. "" = they agree on one over ``group``,
                whose own time limit, often half an hour, then holds for that.

        ``close()`` it when done; at the interpreter's exit that happens by itself. Raises as the constructor does.
        """
        parent = cls(group, device=device, timeout=timeout)
        parent._name = name and f"sparcomm/{name}"
        try:
            seat = parent._new_seat(list(range(parent.size)), 0)
            return cls(device=device, timeout=timeout, seat=seat).met()
        finally:
            parent.close()

    # ---- moving bytes -----------------------------------------------------------------------------------------

    def _transfer(
        self, send: Tensor | None, to: int, recv: Tensor | None, source: int, capacity: bool, tag: int
    ) -> None:
        device = (send if send is not None else recv).device  # pyright: ignore[reportOptionalMemberAccess]
        backend, name, staged = self._route_for(device)
        if capacity and name == "nccl":
            raise ConfigError("exchange(capacity=True) is not possible on NCCL: choose sizes that do not vary")
        out = None if send is None else self._outgoing(send, staged)
        into = None if recv is None else self._incoming(recv, staged, keep=capacity)
        if name == "nccl":
            self._batched(backend, device, out, to, into, source, tag)
        else:
            self._p2p(backend, out, to, into, source, tag)
        if staged and recv is not None and into is not None:
            self._staging.back("recv", recv, into)

    def _all_to_all(self, out: Tensor, x: Tensor, tag: int) -> None:
        backend, _, staged = self._route_for(x.device)
        sent, got = self._outgoing(x, staged), self._incoming(out, staged)
        peers = f"ranks {[i for i in range(self.size) if i != self.rank]}"
        self._wait(self._guard(lambda: backend.alltoall_base(got, sent, [], []), peers, tag), peers, tag)
        if staged:
            self._staging.back("recv", out, got)

    def _native_all_reduce(self, x: Tensor, op: Op) -> None:
        backend, _, staged = self._route_for(x.device)
        peers = f"ranks {[i for i in range(self.size) if i != self.rank]}"
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
        flat = x.detach().view(-1)
        host = self._outgoing(flat, True).view(x.dtype) if staged else flat
        self._tag += 1
        self._wait(self._guard(lambda: backend.allreduce([host], options), peers, self._tag), peers, self._tag)
        if staged:
            self._staging.back("send", flat, host.view(torch.uint8))

    def _p2p(self, backend: Any, out: Tensor | None, to: int, into: Tensor | None, source: int, tag: int) -> None:
        """Posts the receive first, so that a message in flight finds its place, then sends, then waits for both."""
        slot = tag % NEVER_SENT
        arriving = departing = None
        if into is not None:
            arriving = self._guard(lambda: backend.recv([into], source, slot), f"rank {source}", tag)
        if out is not None:
            departing = self._guard(lambda: backend.send([out], to, slot), f"rank {to}", tag)
        self._wait(arriving, f"rank {source}", tag)
        self._wait(departing, f"rank {to}", tag)

    def _batched(
        self,
        backend: Any,
        device: torch.device,
        out: Tensor | None,
        to: int,
        into: Tensor | None,
        source: int,
        tag: int,
    ) -> None:
        """Both messages as one NCCL group, as ``dist.batch_isend_irecv`` does it; the host does not wait."""
        peers = f"ranks {sorted({peer for t, peer in ((out, to), (into, source)) if t is not None})}"
        begin, end = backend._start_coalescing, backend._end_coalescing  # noqa: SLF001
        with torch.cuda.device(device):
            begin()
            try:
                if out is not None:
                    self._guard(lambda: backend.send([out], to, 0), peers, tag)
                if into is not None:
                    self._guard(lambda: backend.recv([into], source, 0), peers, tag)
            finally:
                # An NCCL group left open would swallow whatever this thread starts next, on any communicator.
                work = self._guard(end, peers, tag)
            self._wait(work, peers, tag)

    def _wait(self, work: Any, peer: str, tag: int) -> None:
        if work is not None:
            self._guard(work.wait, peer, tag)

    def _guard(self, call: Callable[[], T], peer: str, tag: int) -> T:
        """Runs a backend call; its error becomes a PeerError, after which this transport is of no use."""
        try:
            return call()
        except RuntimeError as error:
            text = f"{self.where()}: waiting for {peer} of {self.size} (tag {tag}): {error}"
            self._shared.dead = self._shared.dead or text
            raise PeerError(text) from error

    # ---- which way a tensor goes ------------------------------------------------------------------------------

    def _route_for(self, device: torch.device) -> tuple[Any, str, bool]:
        """Backend, its name, and whether tensors of ``device`` must be staged through the host."""
        links, kind = self.links, device.type
        if kind in links.backends and kind not in self._staged:
            return links.backends[kind], links.names[kind], False
        if "cpu" not in links.backends:
            known = ", ".join(f"{name} for {kind}" for kind, name in links.names.items())
            raise ConfigError(f"tensor on {device}, but the process group has only {known}")
        self._staged.add(kind)
        return links.backends["cpu"], links.names["cpu"], True

    def _outgoing(self, t: Tensor, staged: bool) -> Tensor:
        """The bytes of ``t`` where the backend can read them."""
        return self._staging.out("send", t) if staged else as_bytes(t)

    def _incoming(self, t: Tensor, staged: bool, *, keep: bool = False) -> Tensor:
        """Bytes the backend can write for ``t``; with ``keep`` they start as its present ones."""
        if not staged:
            return as_bytes(t)
        return self._staging.out("recv", t) if keep else self._staging.room("recv", t)

    # ---- groups -----------------------------------------------------------------------------------------------

    def _gather_setup(self, out: Tensor, x: Tensor) -> None:
        if "cpu" in self.links.backends or self.size == 1:
            return self._gather(out, x)
        device = self._device or torch.device("cuda", torch.cuda.current_device())
        there = out.to(device)
        self._gather(there, x.to(device))
        out.copy_(there)
        return None

    def _probe_device(self) -> torch.device:
        if self._device is not None:  # where gradients are: another backend than the host's may move them
            return self._device
        backends = self.links.backends  # none in a group of one
        return torch.device("cuda" if backends and "cpu" not in backends else "cpu")

    def _make_split(self, members: list[int], color: int) -> TorchTransport:
        seat = self._new_seat(members, color)
        seat.shared, seat.family = self._shared, self._family
        return TorchTransport(device=self._device, timeout=self._timeout, seat=seat).met()

    def _new_seat(self, members: list[int], color: int) -> Seat:
        """A place in a new group of some ranks of this one. Collective: every rank for the group it will be in."""
        if not self._name:
            self._name = self._agree()
        ranks = [self._ranks[r] for r in members]
        name = f"{self._name}/{self._tag}/{color}"
        try:
            links = make_links(name, members.index(self.rank), ranks, self.links, self._timeout)
        except RuntimeError as error:
            raise PeerError(f"{self.where()}: ranks {ranks} could not form a group: {error}") from error
        return Seat(ranks, links, name)

    def met(self) -> TorchTransport:
        """Returns when all ranks have the group: one that closed it earlier would make their connecting fail."""
        self.call = Call("making a group")
        mine = torch.zeros(1, dtype=torch.uint8, device="cpu")
        self._gather_setup(mine.new_empty((self.size, 1)), mine)
        return self

    def _agree(self) -> str:
        """A name that no group of this job has or ever had: rank 0's. Collective."""
        mine = torch.tensor([uuid.uuid4().int >> 65], dtype=torch.int64, device="cpu")
        numbers = mine.new_empty((self.size, 1))
        self._gather_setup(numbers, mine)
        return f"sparcomm/{int(numbers[0]):x}"

    def _die(self) -> None:
        for member in self._family:
            member.links.sever(member.rank, member.size)
            member.links.close()

    def close(self) -> None:
        """Ends this transport's own group; a group that was passed in stays as it is. Idempotent, not collective."""
        if os.getpid() != self._process:
            return  # a fork, as of a data loader: the threads that would take part in the ending are not there
        super().close()
        self.links.close()
        self._staging.clear()


_open: weakref.WeakSet[TorchTransport] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Backends that outlive the interpreter end it with "terminate called without an active exception"."""
    for transport in list(_open):
        transport.close()
