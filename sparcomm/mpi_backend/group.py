"""The process group: what torch.distributed, DDP, FSDP and DTensor call, on MPI's non-blocking operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparcomm.mpi_backend import monitor, sparse
from sparcomm.mpi_backend.arguments import c10d, described, listed, options, split, wait_for
from sparcomm.mpi_backend.buffers import deliver, incoming, outgoing, pieces, same_dtype
from sparcomm.mpi_backend.channel import Channel
from sparcomm.mpi_backend.identity import NAME, Identity
from sparcomm.mpi_backend.reductions import as_real, reduction
from sparcomm.mpi_backend.work import PROGRESS, Health, MpiWork, Steps
from sparcomm.transport.mpi.library import MPI


class MpiGroup(Identity):
    """A process group over MPI communicators.

    Args:
        store: of the group, for those who ask for it; not used here.
        channel: whose communicators become the group's.
        roll: of the same ranks.
        timeout: after which an operation fails.
        listen: tells what has made waiting pointless; "" = nothing.
    """

    def __init__(
        self, store: Any, channel: Channel, roll: monitor.Roll, timeout: timedelta, listen: Callable[[], str]
    ) -> None:
        super().__init__(channel.rank, channel.size, store)
        self._roll = roll
        self._channel, self._timeout, self._health = channel, timeout, Health(listen)
        self._gathering: list[MpiWork] | None = None

    def set_timeout(self, timeout: timedelta) -> None:
        """For operations that start from now on."""
        self._timeout = timeout

    # ---- running --------------------------------------------------------------------------------------------------

    def _start(
        self, name: str, steps: Steps, outputs: list[Tensor], options: Any = None, alike: Tensor | None = None
    ) -> MpiWork:
        """Starts an operation: its first step now, the others as MPI gets on.

        Args:
            options: of a collective; None: a message of the caller.
            alike: of the same size and dtype on all ranks.
        """
        if self._health.broken:
            raise dist.DistBackendError(f"the {NAME} group cannot be used any more: {self._health.broken}")
        asked = getattr(options, "timeout", self._timeout)
        limit = (asked if asked > timedelta(0) else self._timeout).total_seconds()
        if options is not None and c10d.get_debug_level() == c10d.DebugLevel.DETAIL:
            monitor.same(self._channel.comm, described(name, options, alike), limit, self._health)
        work = MpiWork(name, steps, outputs, limit, self._health)
        if not work.poll() and getattr(options, "asyncOp", True):
            PROGRESS.watch(work)
        if self._gathering is not None:
            self._gathering.append(work)
        return work

    def abort(self) -> None:
        """Makes the operations under way fail, and all later ones."""
        self._health.abort("the group was aborted")
        for work in PROGRESS.under_way(self._health):
            work.expire("the group was aborted")

    def shutdown(self) -> None:
        """Gives the communicators back, unless a failure has left something under way on them."""
        if not self._health.broken and not PROGRESS.under_way(self._health):
            self._channel.leave()
        self._health.fail("it was destroyed")

    def _start_coalescing(self, device: torch.device) -> None:
        self._gathering = []

    def _end_coalescing(self, device: torch.device) -> MpiWork:
        works, self._gathering = self._gathering or [], None
        return self._all("coalesced", works)

    # What C++ calls after torch 2.13.
    start_coalescing, end_coalescing = _start_coalescing, _end_coalescing

    def _all(self, name: str, works: Sequence[MpiWork]) -> MpiWork:
        """One work that ends when all of them have."""
        for work in works:
            PROGRESS.watch(work)
        return self._start(name, wait_for(works), [t for work in works for t in work.outputs])

    # ---- reductions -----------------------------------------------------------------------------------------------

    def allreduce(self, tensors: list[Tensor] | Tensor, opts: Any = None, **more: Any) -> MpiWork:
        """Every rank's tensor becomes the reduction of them all."""
        tensors, opts = listed(tensors), options(c10d.AllreduceOptions, opts, more)
        if len(tensors) != 1:
            return self._all("all_reduce", [self.allreduce([t], opts) for t in tensors])
        (t,) = tensors
        channel, tag = self._channel, self._channel.next_tag()
        if t.layout == torch.sparse_coo:
            return self._start("all_reduce (sparse)", sparse.reduce_all(channel, t, opts.reduceOp, tag), tensors, opts)
        real = as_real(t, opts.reduceOp)
        how = reduction(opts.reduceOp, real, channel.size)

        def steps() -> Steps:
            host = how.prepare(outgoing(real))
            yield from channel.reduce_all(host, how, tag)
            deliver(real, host)

        return self._start("all_reduce", steps(), tensors, opts, t)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> MpiWork:
        """The same as ``allreduce`` of each."""
        op = c10d.AllreduceOptions()
        if opts is not None:
            op.reduceOp, op.timeout = opts.reduceOp, opts.timeout
        return self._all("all_reduce_coalesced", [self.allreduce([t], op) for t in tensors])

    def reduce(self, tensors: list[Tensor] | Tensor, opts: Any = None, **more: Any) -> MpiWork:
        """The root's tensor becomes the reduction of all ranks' tensors; the others keep theirs."""
        (t,), opts = listed(tensors), options(c10d.ReduceOptions, opts, more)
        channel, root, tag = self._channel, opts.rootRank, self._channel.next_tag()
        real = as_real(t, opts.reduceOp)
        how = reduction(opts.reduceOp, real, channel.size)

        def steps() -> Steps:
            host = outgoing(real)
            yield from channel.reduce_to(how.prepare(host), host, root, how, tag)
            if channel.rank == root:
                deliver(real, host)

        return self._start("reduce", steps(), [t], opts, t)

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None, **more: Any) -> MpiWork:
        """``outputs[0]`` becomes the reduction of what all ranks have for this one in ``inputs[0]``."""
        tag = self._channel.next_tag()
        (out,), parts = listed(outputs), inputs if isinstance(inputs[0], Tensor) else inputs[0]
        return self._reduce_scatter(out, parts, options(c10d.ReduceScatterOptions, opts, more), tag)

    def _reduce_scatter(self, out: Tensor, parts: Sequence[Tensor], opts: Any, tag: int) -> MpiWork:
        channel = self._channel
        same_dtype([out, *parts])
        if len(parts) != channel.size or parts[channel.rank].numel() != out.numel():
            raise ValueError(
                f"reduce_scatter of {len(parts)} tensors to one of {out.numel()} elements: must be {channel.size}, and "
                "this rank's of the output's size"
            )
        real = as_real(out, opts.reduceOp)
        how = reduction(opts.reduceOp, real, channel.size)

        def steps() -> Steps:
            sent = [how.prepare(outgoing(as_real(part, opts.reduceOp))).view(-1) for part in parts]
            host = incoming(real)
            yield from channel.reduce_parts(sent, host.view(-1), how, tag)
            deliver(real, host)

        return self._start("reduce_scatter", steps(), [out], opts)

    def reduce_scatter_single(self, out: Tensor, t: Tensor, opts: Any = None) -> MpiWork:
        """``out`` becomes this rank's part of the reduction of all ranks' ``t``."""
        tag, size = self._channel.next_tag(), self._channel.size
        if t.numel() != out.numel() * size:
            raise ValueError(
                f"reduce_scatter of {t.numel()} elements to {out.numel()}: input must be {size} times the output"
            )
        parts = list(outgoing(t).view(-1).view(size, out.numel()))
        return self._reduce_scatter(out, parts, options(c10d.ReduceScatterOptions, opts, {}), tag)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(self, outs: list[Tensor], ts: list[Tensor], opts: Any = None) -> MpiWork:
        """The same as ``reduce_scatter_single`` of each."""
        works = [self.reduce_scatter_single(out, t, opts) for out, t in zip(outs, ts, strict=True)]
        return self._all("reduce_scatter_coalesced", works)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    # ---- moving data ----------------------------------------------------------------------------------------------

    def broadcast(self, tensors: list[Tensor] | Tensor, opts: Any = None, **more: Any) -> MpiWork:
        """Every rank's tensor becomes the root's."""
        (t,), opts = listed(tensors), options(c10d.BroadcastOptions, opts, more)
        channel, root = self._channel, opts.rootRank

        def steps() -> Steps:
            host = outgoing(t) if channel.rank == root else incoming(t)
            yield from channel.broadcast(host, root)
            if channel.rank != root:
                deliver(t, host)

        return self._start("broadcast", steps(), [t], opts, t)

    def all_gather_single(self, out: Tensor, t: Tensor, opts: Any = None) -> MpiWork:
        """``out`` becomes the ranks' ``t``, one after the other."""
        channel, tag = self._channel, self._channel.next_tag()
        same_dtype([out, t])
        if out.numel() != t.numel() * channel.size:
            raise ValueError(
                f"all_gather of {t.numel()} elements to {out.numel()}: output must be {channel.size} times the input"
            )

        def steps() -> Steps:
            host = incoming(out)
            yield from channel.gather_all(host, outgoing(t), tag)
            deliver(out, host)

        return self._start("all_gather_single", steps(), [out], options(c10d.AllgatherOptions, opts, {}), t)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outs: list[Tensor], ts: list[Tensor], opts: Any = None) -> MpiWork:
        """The same as ``all_gather_single`` of each."""
        works = [self.all_gather_single(out, t, opts) for out, t in zip(outs, ts, strict=True)]
        return self._all("all_gather_coalesced", works)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None, **more: Any) -> MpiWork:
        """``outputs[0][i]`` becomes rank i's ``inputs[0]``; sizes may differ between ranks."""
        tag = self._channel.next_tag()
        outs = list(outputs) if isinstance(outputs[0], Tensor) else outputs[0]
        (t,), everyone = listed(inputs), range(self._channel.size)
        self._count("all_gather", outs)
        opts = options(c10d.AllgatherOptions, opts, more)
        return self._exchange("all_gather", dict.fromkeys(everyone, t), dict(enumerate(outs)), opts, tag)

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> MpiWork:
        """``outputs[i][j]`` becomes rank i's ``inputs[j]``."""
        works = [
            self.allgather([list(outs)], [t], opts) for outs, t in zip(zip(*outputs, strict=True), inputs, strict=True)
        ]
        return self._all("all_gather_coalesced", works)

    def gather(self, outputs: Any, inputs: Any, opts: Any = None, **more: Any) -> MpiWork:
        """The root's ``outputs[0][i]`` becomes rank i's ``inputs[0]``."""
        tag = self._channel.next_tag()
        (t,), opts = listed(inputs), options(c10d.GatherOptions, opts, more)
        receives: dict[int, Tensor] = {}
        if self._channel.rank == opts.rootRank:
            outs = list(outputs) if isinstance(outputs[0], Tensor) else outputs[0]
            self._count("gather", outs)
            receives = dict(enumerate(outs))
        return self._exchange("gather", {opts.rootRank: t}, receives, opts, tag)

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None, **more: Any) -> MpiWork:
        """``outputs[0]`` becomes what the root's ``inputs[0]`` has for this rank."""
        tag = self._channel.next_tag()
        (out,), opts = listed(outputs), options(c10d.ScatterOptions, opts, more)
        sends: dict[int, Tensor] = {}
        if self._channel.rank == opts.rootRank:
            parts = list(inputs) if isinstance(inputs[0], Tensor) else inputs[0]
            self._count("scatter", parts)
            sends = dict(enumerate(parts))
        return self._exchange("scatter", sends, {opts.rootRank: out}, opts, tag)

    def alltoall(self, outs: list[Tensor], ts: list[Tensor], opts: Any = None) -> MpiWork:
        """``outs[i]`` becomes what rank i has in its ``ts`` for this rank; sizes may differ."""
        tag = self._channel.next_tag()
        self._count("all_to_all", outs)
        self._count("all_to_all", ts)
        opts = options(c10d.AllToAllOptions, opts, {})
        return self._exchange("all_to_all", dict(enumerate(ts)), dict(enumerate(outs)), opts, tag)

    def all_to_all_single(
        self,
        out: Tensor,
        t: Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        opts: Any = None,
    ) -> MpiWork:
        """As ``alltoall``, of rows of one tensor; no sizes = as many rows for each rank."""
        tag, size = self._channel.next_tag(), self._channel.size
        host, sent, opts = incoming(out), outgoing(t), options(c10d.AllToAllOptions, opts, {})
        receives, sends = split(host, output_split_sizes, size), split(sent, input_split_sizes, size)
        return self._exchange("all_to_all_single", sends, receives, opts, tag, [(out, host)])

    alltoall_base = all_to_all_single

    def _count(self, name: str, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != self._channel.size:
            raise ValueError(f"{name} with {len(tensors)} tensors: must be {self._channel.size}, one for each rank")

    def _exchange(
        self,
        name: str,
        sends: dict[int, Tensor],
        receives: dict[int, Tensor],
        opts: Any,
        tag: int,
        homes: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> MpiWork:
        """Messages to and from ranks; ``homes`` says which tensors come from which host memory, if not as usual."""
        channel = self._channel
        same_dtype([*sends.values(), *receives.values()])
        own = sends.get(channel.rank), receives.get(channel.rank)
        if own[0] is not None and own[1] is not None and own[0].numel() != own[1].numel():
            raise ValueError(
                f"{name}: rank {channel.rank} has {own[0].numel()} elements for itself, and room for "
                f"{own[1].numel()}: must be as many"
            )
        outputs = list(receives.values()) if homes is None else [t for t, _ in homes]

        def steps() -> Steps:
            hosts = {peer: incoming(t) for peer, t in receives.items()}
            copies = {id(t): outgoing(t) for t in sends.values()}
            yield from channel.exchange({peer: copies[id(t)] for peer, t in sends.items()}, hosts, tag)
            for t, host in homes or [(t, hosts[peer]) for peer, t in receives.items()]:
                deliver(t, host)

        return self._start(name, steps(), outputs, opts)

    # ---- between two ranks ----------------------------------------------------------------------------------------

    def send(self, tensors: list[Tensor], peer: int, tag: int = 0) -> MpiWork:
        """To one rank, which has to ``recv`` under the same tag."""
        (t,) = tensors

        def steps() -> Steps:
            host = outgoing(t)
            yield [self._channel.pairs.Isend([part, MPI.BYTE], peer, tag) for part in pieces(host)]

        return self._start(f"send to rank {peer}, tag {tag}", steps(), tensors)

    def recv(self, tensors: list[Tensor], peer: int, tag: int = 0) -> MpiWork:
        """From one rank, or from any with ``MPI.ANY_SOURCE``."""
        (t,) = tensors

        def steps() -> Steps:
            host = incoming(t)
            yield from self._channel.receive(host, peer, tag)
            deliver(t, host)

        whom = "any rank" if peer == MPI.ANY_SOURCE else f"rank {peer}"
        return self._start(f"recv from {whom}, tag {tag}", steps(), tensors)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> MpiWork:
        """From whoever has sent under the tag; the work's ``_source_rank`` says who."""
        return self.recv(tensors, MPI.ANY_SOURCE, tag)

    # ---- waiting for each other -----------------------------------------------------------------------------------

    def barrier(self, opts: Any = None, **more: Any) -> MpiWork:
        """Ends when all ranks have called it."""
        opts = options(c10d.BarrierOptions, opts, more)
        channel = self._channel

        def steps() -> Steps:
            yield [channel.comm.Ibarrier()]

        return self._start("barrier", steps(), [], opts)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier whose error names the first rank that did not come, or all of them, on every rank that did.

        Raises:
            DistBackendError: a rank did not come in time.
        """
        self._roll.call(self._timeout if timeout is None else timeout, self._health.listen, wait_all_ranks)
