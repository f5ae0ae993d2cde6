"""The process group: what torch.distributed, DDP, FSDP and DTensor call, on MPI's non-blocking operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from sparcomm.mpi_backend import monitor, sparse
from sparcomm.mpi_backend.buffers import deliver, incoming, outgoing, pieces, same_dtype
from sparcomm.mpi_backend.channel import Channel
from sparcomm.mpi_backend.reductions import as_real, reduction
from sparcomm.mpi_backend.work import PROGRESS, Health, MpiWork, Steps
from sparcomm.transport.mpi.library import MPI

NAME = "mpi4py"


class MpiGroup(dist.ProcessGroup):
    """A process group over MPI communicators.

    Args:
        store: of the group, for those who ask for it; not used here.
        channel: whose communicators become the group's.
        timeout: after which an operation fails.
        listen: tells what has made waiting pointless; "" = nothing.
    """

    def __init__(self, store: dist.Store, channel: Channel, timeout: timedelta, listen: Callable[[], str]) -> None:
        super().__init__(channel.rank, channel.size)
        self._store = store
        self._channel, self._timeout, self._health = channel, timeout, Health(listen)
        self._called: list[str] = ["", "undefined"]  # the group's name and description
        self._gathering: list[MpiWork] | None = None

    # ---- what it is -----------------------------------------------------------------------------------------------

    def getBackendName(self) -> str:  # noqa: N802  torch's name
        """The name it is registered under."""
        return NAME

    def getRank(self) -> int:  # noqa: N802
        """This rank in the group."""
        return self._channel.rank

    def getSize(self) -> int:  # noqa: N802
        """Ranks of the group."""
        return self._channel.size

    def name(self) -> str:
        """The name it is registered under."""
        return NAME

    def setGroupName(self, name: str) -> None:  # noqa: N802
        """The name under which functional collectives find it."""
        self._called[0] = name

    def getGroupName(self) -> str:  # noqa: N802
        """The name under which functional collectives find it."""
        return self._called[0]

    def setGroupDesc(self, text: str) -> None:  # noqa: N802
        """What it is for."""
        self._called[1] = text

    def getGroupDesc(self) -> str:  # noqa: N802
        """What it is for."""
        return self._called[1]

    def get_group_store(self) -> dist.Store:
        """The group's own part of torch's store."""
        return self._store

    def set_timeout(self, timeout: timedelta) -> None:
        """For operations that start from now on."""
        self._timeout = timeout

    # ---- running --------------------------------------------------------------------------------------------------

    def _start(self, name: str, steps: Steps, outputs: list[Tensor], options: Any = None) -> MpiWork:
        """Starts an operation: its first step now, the others as MPI gets on."""
        if self._health.broken:
            raise dist.DistBackendError(f"the {NAME} group cannot be used any more: {self._health.broken}")
        asked = getattr(options, "timeout", self._timeout)
        limit = (asked if asked > timedelta(0) else self._timeout).total_seconds()
        work = MpiWork(name, steps, outputs, limit, self._health)
        if not work.poll() and getattr(options, "asyncOp", True):
            PROGRESS.watch(work)
        if self._gathering is not None:
            self._gathering.append(work)
        return work

    def abort(self) -> None:
        """Makes the operations under way fail, and all later ones."""
        self._health.fail("it was aborted")
        for work in PROGRESS.under_way(self._health):
            work.expire("the group was aborted")

    def shutdown(self) -> None:
        """Gives the communicators back, unless a failure has left something under way on them."""
        if not self._health.broken and not PROGRESS.under_way(self._health):
            self._channel.free()
        self._health.fail("it was destroyed")

    def _start_coalescing(self, device: torch.device) -> None:
        self._gathering = []

    def _end_coalescing(self, device: torch.device) -> MpiWork:
        works, self._gathering = self._gathering or [], None
        return self._all("coalesced", works)

    def _all(self, name: str, works: Sequence[MpiWork]) -> MpiWork:
        """One work that ends when all of them have."""
        for work in works:
            PROGRESS.watch(work)
        return self._start(name, _wait_for(works), [t for work in works for t in work.outputs])

    # ---- reductions -----------------------------------------------------------------------------------------------

    def allreduce(self, tensors: list[Tensor] | Tensor, opts: Any = None, **more: Any) -> MpiWork:
        """Every rank's tensor becomes the reduction of them all."""
        tensors, opts = _listed(tensors), _options(c10d.AllreduceOptions, opts, more)
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

        return self._start("all_reduce", steps(), tensors, opts)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> MpiWork:
        """The same as ``allreduce`` of each."""
        op = c10d.AllreduceOptions()
        if opts is not None:
            op.reduceOp, op.timeout = opts.reduceOp, opts.timeout
        return self._all("all_reduce_coalesced", [self.allreduce([t], op) for t in tensors])

    def reduce(self, tensors: list[Tensor] | Tensor, opts: Any = None, **more: Any) -> MpiWork:
        """The root's tensor becomes the reduction of all ranks' tensors; the others keep theirs."""
        (t,), opts = _listed(tensors), _options(c10d.ReduceOptions, opts, more)
        channel, root, tag = self._channel, opts.rootRank, self._channel.next_tag()
        real = as_real(t, opts.reduceOp)
        how = reduction(opts.reduceOp, real, channel.size)

        def steps() -> Steps:
            host = outgoing(real)
            yield from channel.reduce_to(how.prepare(host), host, root, how, tag)
            if channel.rank == root:
                deliver(real, host)

        return self._start("reduce", steps(), [t], opts)

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None, **more: Any) -> MpiWork:
        """``outputs[0]`` becomes the reduction of what all ranks have for this one in ``inputs[0]``."""
        (out,), parts = _listed(outputs), inputs if isinstance(inputs[0], Tensor) else inputs[0]
        opts = _options(c10d.ReduceScatterOptions, opts, more)
        channel, tag = self._channel, self._channel.next_tag()
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
        if t.numel() != out.numel() * self._channel.size:
            raise ValueError(
                f"reduce_scatter of {t.numel()} elements to {out.numel()}: input must be {self._channel.size} times "
                "the output"
            )
        return self.reduce_scatter([out], list(outgoing(t).view(-1).view(self._channel.size, out.numel())), opts)

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(self, outs: list[Tensor], ts: list[Tensor], opts: Any = None) -> MpiWork:
        """The same as ``reduce_scatter_single`` of each."""
        works = [self.reduce_scatter_single(out, t, opts) for out, t in zip(outs, ts, strict=True)]
        return self._all("reduce_scatter_coalesced", works)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    # ---- moving data ----------------------------------------------------------------------------------------------

    def broadcast(self, tensors: list[Tensor] | Tensor, opts: Any = None, **more: Any) -> MpiWork:
        """Every rank's tensor becomes the root's."""
        (t,), opts = _listed(tensors), _options(c10d.BroadcastOptions, opts, more)
        channel, root = self._channel, opts.rootRank

        def steps() -> Steps:
            host = outgoing(t) if channel.rank == root else incoming(t)
            yield from channel.broadcast(host, root)
            if channel.rank != root:
                deliver(t, host)

        return self._start("broadcast", steps(), [t], opts)

    def all_gather_single(self, out: Tensor, t: Tensor, opts: Any = None) -> MpiWork:
        """``out`` becomes the ranks' ``t``, one after the other."""
        same_dtype([out, t])
        channel, tag = self._channel, self._channel.next_tag()
        if out.numel() != t.numel() * channel.size:
            raise ValueError(
                f"all_gather of {t.numel()} elements to {out.numel()}: output must be {channel.size} times the input"
            )

        def steps() -> Steps:
            host = incoming(out)
            yield from channel.gather_all(host, outgoing(t), tag)
            deliver(out, host)

        return self._start("all_gather_single", steps(), [out], opts)

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outs: list[Tensor], ts: list[Tensor], opts: Any = None) -> MpiWork:
        """The same as ``all_gather_single`` of each."""
        works = [self.all_gather_single(out, t, opts) for out, t in zip(outs, ts, strict=True)]
        return self._all("all_gather_coalesced", works)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None, **more: Any) -> MpiWork:
        """``outputs[0][i]`` becomes rank i's ``inputs[0]``; sizes may differ between ranks."""
        outs = list(outputs) if isinstance(outputs[0], Tensor) else outputs[0]
        (t,), everyone = _listed(inputs), range(self._channel.size)
        same_dtype([t, *outs])
        self._count("all_gather", outs)
        opts = _options(c10d.AllgatherOptions, opts, more)
        return self._exchange("all_gather", dict.fromkeys(everyone, t), dict(enumerate(outs)), opts)

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> MpiWork:
        """``outputs[j][i]`` becomes rank i's ``inputs[j]``."""
        works = [self.allgather([outs], [t], opts) for outs, t in zip(outputs, inputs, strict=True)]
        return self._all("all_gather_coalesced", works)

    def gather(self, outputs: Any, inputs: Any, opts: Any = None, **more: Any) -> MpiWork:
        """The root's ``outputs[0][i]`` becomes rank i's ``inputs[0]``."""
        (t,), opts = _listed(inputs), _options(c10d.GatherOptions, opts, more)
        receives: dict[int, Tensor] = {}
        if self._channel.rank == opts.rootRank:
            outs = list(outputs) if isinstance(outputs[0], Tensor) else outputs[0]
            self._count("gather", outs)
            receives = dict(enumerate(outs))
        return self._exchange("gather", {opts.rootRank: t}, receives, opts)

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None, **more: Any) -> MpiWork:
        """``outputs[0]`` becomes what the root's ``inputs[0]`` has for this rank."""
        (out,), opts = _listed(outputs), _options(c10d.ScatterOptions, opts, more)
        sends: dict[int, Tensor] = {}
        if self._channel.rank == opts.rootRank:
            parts = list(inputs) if isinstance(inputs[0], Tensor) else inputs[0]
            self._count("scatter", parts)
            sends = dict(enumerate(parts))
        return self._exchange("scatter", sends, {opts.rootRank: out}, opts)

    def alltoall(self, outs: list[Tensor], ts: list[Tensor], opts: Any = None) -> MpiWork:
        """``outs[i]`` becomes what rank i has in its ``ts`` for this rank; sizes may differ."""
        self._count("all_to_all", outs)
        self._count("all_to_all", ts)
        same_dtype([*outs, *ts])
        return self._exchange("all_to_all", dict(enumerate(ts)), dict(enumerate(outs)), opts)

    def all_to_all_single(
        self,
        out: Tensor,
        t: Tensor,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        opts: Any = None,
    ) -> MpiWork:
        """As ``alltoall``, of rows of one tensor; no sizes = as many rows for each rank."""
        same_dtype([out, t])
        host, sent = incoming(out), outgoing(t)
        size = self._channel.size
        receives, sends = _split(host, output_split_sizes, size), _split(sent, input_split_sizes, size)
        return self._exchange("all_to_all_single", sends, receives, opts, [(out, host)])

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
        homes: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> MpiWork:
        """Messages to and from ranks; ``homes`` says which tensors come from which host memory, if not as usual."""
        channel, tag = self._channel, self._channel.next_tag()
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
            yield [self._channel.pairs.Irecv([part, MPI.BYTE], peer, tag) for part in pieces(host)]
            deliver(t, host)

        whom = "any rank" if peer == MPI.ANY_SOURCE else f"rank {peer}"
        return self._start(f"recv from {whom}, tag {tag}", steps(), tensors)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> MpiWork:
        """From whoever has sent under the tag; the work's ``_source_rank`` says who."""
        return self.recv(tensors, MPI.ANY_SOURCE, tag)

    # ---- waiting for each other -----------------------------------------------------------------------------------

    def barrier(self, opts: Any = None, **more: Any) -> MpiWork:
        """Ends when all ranks have called it."""
        opts = _options(c10d.BarrierOptions, opts, more)
        channel = self._channel

        def steps() -> Steps:
            yield [channel.comm.Ibarrier()]

        return self._start("barrier", steps(), [], opts)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier whose error names the ranks that did not come, all of them, on every rank that did.

        Raises:
            DistBackendError: a rank did not come in time.
        """
        monitor.barrier(self._channel, timeout or self._timeout, self._health.listen)


def _wait_for(works: Sequence[MpiWork]) -> Steps:
    for work in works:
        while not work.poll():
            yield None
        if (error := work.exception()) is not None:
            raise error


def _listed(tensors: Any) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _options(kind: Any, opts: Any, more: dict[str, Any]) -> Any:
    """The options of a call in any of torch's forms: an options object, or what it consists of."""
    if isinstance(opts, kind):
        return opts
    made = kind()
    if opts is not None:  # the second argument of the short forms
        more = {("timeout" if isinstance(opts, timedelta) else "root" if isinstance(opts, int) else "op"): opts} | more
    for name, value in more.items():
        if value is not None:
            setattr(made, {"op": "reduceOp", "root": "rootRank"}.get(name, name), value)
    return made


def _split(t: Tensor, sizes: Sequence[int] | None, ranks: int) -> dict[int, Tensor]:
    rows = t.shape[0] if t.dim() else 0
    if not sizes:
        if rows % ranks:
            raise ValueError(f"all_to_all_single of {rows} rows without split sizes: must be a multiple of {ranks}")
        sizes = [rows // ranks] * ranks
    if len(sizes) != ranks or sum(sizes) != rows:
        raise ValueError(f"split sizes {list(sizes)} of {rows} rows: must be {ranks} that add up to the rows")
    return dict(enumerate(t.split(list(sizes))))
