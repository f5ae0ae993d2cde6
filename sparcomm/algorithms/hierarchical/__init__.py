"""Two levels: a dense sum inside every node, a sparse all-reduce between nodes, over fewer ranks and a shorter vector.

Source: the two-level all-reduce of Jia et al., "Highly Scalable Deep Learning Training System with Mixed-Precision",
2018 (arXiv 1807.11205), in its reduce-scatter form (Cho et al., "BlueConnect", MLSys 2019), with any algorithm of this
package at either level.

p = M nodes of s ranks. The vector is cut into s slices. Inside a node, local rank l gets the node's sum of slice l
(reduce-scatter); the M ranks with the same l reduce slice l by ``outer``; then every node's ranks gather the slices.
Every rank so carries 1/s of what its node sends to others. Cost of n elements, with slices of L = n/s:

    inside: 1 + ceil(log2 s) rounds; (s-1)(L + the slice's total) elements sent by each rank
    between nodes: outer's own cost for L elements over M ranks (``link_cost``)

Deviations, each for a reason:
- Slices are dealt tiles, not contiguous pieces (layout.py): each gets the same quota from ``outer``, which would miss
  mass where layers differ in scale.
- What is gathered at the end is sparse where that is shorter: just as many entries as ``outer`` can leave, in float32,
  so that all ranks get the bits of the ranks that reduced them.
- An ``inner`` other than the ordered dense sum gives the node's sum on all its ranks, and each takes its slice.
- What ``outer`` leaves is owed by the one rank that held that slice of its node: it joins that rank's next gradient
  alone, and therefore counts once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparcomm import layout, wire
from sparcomm.algorithms.base import Algorithm, Cost, Part, Reduced, State, field_kinds, positions, registry
from sparcomm.algorithms.base import write_out as written
from sparcomm.algorithms.hierarchical.levels import HierarchicalState, Levels
from sparcomm.codecs.packet import Packet
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.dense import Rows, log2_ceil, payloads
from sparcomm.collectives.slices import Slices, slice_length
from sparcomm.dtypes import working_dtype
from sparcomm.errors import ConfigError
from sparcomm.kernels import kernels_for
from sparcomm.memory import nothing_owed
from sparcomm.transport.base import Transport


@dataclass(frozen=True)
class Hierarchical(Levels):
    """``inner`` inside every node, ``outer`` between nodes.

    Args:
        inner: sums over the ranks of a node; ``Dense()`` is all that pays on a fast link.
        outer: reduces the nodes' sums, each rank a slice of them. Without state by element.
        local_size: ranks of a node; None: what the environment's LOCAL_WORLD_SIZE says. It must divide the number of
            ranks. MPI's transport knows which ones share a node; elsewhere they are numbered one after the other (as
            torchrun does).
        groups: the ranks of every node, where they are numbered otherwise, such as ((0, 2), (1, 3)).
    """

    name: ClassVar[str] = "hierarchical"

    @classmethod
    def cases(cls, size: int) -> list[Algorithm]:
        """Every number of ranks per node, numbered either way; each kind of algorithm at either level."""
        known = registry()
        dense, topk, spardl, s2, vote = (known[name] for name in ("dense", "topk", "spardl", "s2", "majority-vote"))

        def made(make: Any, **fields: Any) -> Algorithm:
            return make(**fields)

        outers = [made(spardl, density=d, schedule=s) for d in (1e-9, 0.1, 1.0) for s in ("log", "direct")]
        outers += [made(spardl, density=0.1, values=v) for v in ("bfloat16", "float16")]
        outers += [dense(), made(topk, density=0.05), made(spardl, density=0.1, residuals="local")]
        found: list[Algorithm] = []
        for local in (d for d in range(1, size + 1) if size % d == 0):
            found += [cls(outer=outer, local_size=local) for outer in outers]
            found += [cls(made(topk, density=0.3), outers[at], local) for at in (2, 3)]
            if size // local > 1:
                found.append(cls(outer=made(spardl, density=0.1, teams=size // local, sag="b-sag"), local_size=local))
                found.append(cls(outer=made(vote, scale=True, error_feedback=True), local_size=local))
                found.append(cls(outer=made(s2, density=0.1, decoder="projection"), local_size=local))
            dealt = tuple(tuple(range(m, size, size // local)) for m in range(size // local))
            found.append(cls(outer=outers[2], groups=dealt))
        return [*found, cls(made(dense, native=True), outers[2], local_size=size)]

    # ---- cost ------------------------------------------------------------------------------------------------------

    def _packet(self, length: int, dtype: torch.dtype, nodes: int) -> Packet | None:
        """How a slice's total is coded within the node; None: densely."""
        packet = Packet(self.outer.kept(length, nodes), length)
        return packet if dtype == torch.float32 and packet.words < length else None

    def link_cost(self, n: int, dtype: torch.dtype, size: int, state: State | None = None) -> Cost:
        """What a rank sends to other nodes: ``cost`` without what stays inside a node."""
        s = self.nodes.per_node
        if n == 0:
            return Cost(0, 0, 0)
        outer = state.outer if isinstance(state, HierarchicalState) else None
        return self.outer.cost(slice_length(n, s), dtype if s == 1 else working_dtype(dtype), size // s, outer)

    def cost(self, n: int, dtype: torch.dtype, size: int, state: State | None = None) -> Cost:
        """The sum of the three phases: exact if both algorithms are static."""
        s, across = self.nodes.per_node, self.link_cost(n, dtype, size, state)
        if n == 0 or s == 1:
            return across
        length, working = slice_length(n, s), working_dtype(dtype)
        whole = length * working.itemsize // wire.WORD
        packet = self._packet(length, working, size // s)

        inner = state.inner if isinstance(state, HierarchicalState) else None

        def bags(words: int) -> int:
            return (s - 1) * wire.WORD * (wire.HEADER_WORDS + words)

        inside = Cost(1, s - 1, bags(whole)) if self.inner.ordered else self.inner.cost(n, dtype, s, inner)
        last = Cost(log2_ceil(s), log2_ceil(s), bags(whole if packet is None else packet.words))
        return Cost(*map(sum, zip(inside, across, last, strict=True)))

    def kept(self, n: int, size: int) -> int:
        """What ``outer`` keeps of every slice."""
        s = self.nodes.per_node
        return min(n, s * self.outer.kept(slice_length(n, s), size // s)) if n else 0

    def delivers_all(self, n: int, dtype: torch.dtype, size: int) -> bool:
        """If both algorithms do."""
        s = self.nodes.per_node
        if n == 0 or s == 1:
            return n == 0 or self.outer.delivers_all(n, dtype, size)
        whole = self.outer.delivers_all(slice_length(n, s), working_dtype(dtype), size // s)
        return whole and self.inner.delivers_all(n, dtype, s)

    # ---- work ------------------------------------------------------------------------------------------------------

    def init(self, n: int, dtype: torch.dtype, device: torch.device, size: int) -> HierarchicalState:
        """A fresh state. Raises ConfigError for an ``outer`` whose state has one entry per element."""
        s = self.nodes.per_node
        slices, fed = Slices(n, s, device), dtype if s == 1 else working_dtype(dtype)
        outer = self.outer.init(slices.length, fed, device, max(1, size // s))
        # Such state is stored by parameter, and that of a slice belongs to pieces of parameters.
        if any(kind == "per_element" for _, kind in field_kinds(outer)):
            raise ConfigError(f"outer={self.outer!r}: keeps state by element, which no parameter owns in a slice")
        return HierarchicalState(inner=self.inner.init(n, dtype, device, s), outer=outer, slices=slices)

    def _reduce(self, grad: Tensor, residual: Tensor | None, state: State, step: int, transport: Transport) -> Reduced:
        node, across = self.nodes.teams(transport)
        slices = state.slices if isinstance(state, HierarchicalState) else None
        if slices is None or (slices.cut.numel, slices.cut.blocks) != (grad.numel(), node.size):
            raise ConfigError(
                f"state was made for another vector or group: {grad.numel()} elements in nodes of {node.size} asked for"
            )
        assert isinstance(state, HierarchicalState)
        if node.size == 1:
            state.lend(state.outer, wants_sent=state.wants_sent, wants_total=state.wants_total)
            reduced = self.outer.reduce(grad, residual, state.outer, step, across)
            state.damage = reduced.state.damage
            return reduced._replace(state=replace(state, outer=reduced.state))
        packet = self._packet(slices.length, working_dtype(grad.dtype), across.size)
        return _Run(self, grad, state, slices, packet, step, node, across).reduce(residual)


class _Run:
    """One ``reduce`` over nodes of several ranks."""

    def __init__(
        self, algorithm: Hierarchical, grad: Tensor, state: HierarchicalState, slices: Slices, packet: Packet | None,
        step: int, node: Transport, across: Transport,
    ) -> None:  # fmt: skip
        self.inner, self.outer, self.packet, self.slices = algorithm.inner, algorithm.outer, packet, slices
        self.grad, self.state, self.step, self.node, self.across = grad, state, step, node, across
        self.clock, self.space = state.clock, state.workspace
        self.n, self.dtype = grad.numel(), working_dtype(grad.dtype)
        self.bags = Bags(kernels_for(grad), state.unit, step, grad.device, state.damage)
        self.total: Tensor | None = None  # (n,), where the slices' sums come densely
        self.parts: list[Part] = []  # and where they come as entries

    def take(self, numel: int) -> Tensor:
        """A buffer of the working dtype."""
        return self.space.take(numel, self.dtype, self.grad.device)

    def reduce(self, residual: Tensor | None) -> Reduced:
        """All three phases."""
        state, bags = self.state, self.bags
        inside, part, buffers = self.sum_in_order(residual) if self.inner.ordered else self.sum_by_inner(residual)
        state.damage = bags.damage()
        state.lend(state.outer, wants_sent=state.wants_sent, wants_total=False)
        outside = self.outer.reduce(part, None, state.outer, self.step, self.across)
        self.space.give(*buffers)
        bags.flags |= (~outside.ok).to(torch.uint8) * wire.NONFINITE
        if outside.state.damage is not None:
            bags.flags |= outside.state.damage
        self.gather_dense(outside) if self.packet is None else self.gather_sparse(outside, self.packet)
        with self.clock.span("select"):
            sent = self.sent(inside.sent, outside.sent) if state.wants_sent else None
            owed = self.owed(inside.residual, outside.residual)
        self.space.give(outside.total, outside.residual)
        state.damage = bags.damage()
        same = inside.state is state.inner and outside.state is state.outer
        after = state if same else replace(state, inner=inside.state, outer=outside.state)
        if self.total is None and not state.wants_total:
            return Reduced(None, owed, sent, after, bags.ok(), self.parts)
        if self.total is None:
            with self.clock.span("code"):
                self.total = written(self.parts, self.take(self.n))
        return Reduced(self.total, owed, sent, after, bags.ok())

    # ---- inside the node -------------------------------------------------------------------------------------------

    def sum_in_order(self, residual: Tensor | None) -> tuple[Reduced, Tensor, tuple[Tensor, ...]]:
        """A reduce-scatter: gradient + residual of all ranks, added in rank order.

        Returns:
            What an inner algorithm would (without the total), (L,) the node's sum of this rank's slice, which holds a
            NaN or inf if anything was not finite, and buffers to be given back once that has been used.
        """
        x, buffers = self.grad, ()
        with self.clock.span("code"):
            if residual is not None or self.grad.dtype != self.dtype:
                x = self.take(self.n)
                x.copy_(self.grad) if residual is None else torch.add(residual, self.grad, out=x)
                buffers = (x,)
            rows = Rows(self.slices.length, x, self.bags, self.node, self.clock, self.space)
            for rank in range(self.node.size):
                self.slices.take(x, rank, rows.values[rank])
        part = rows.reduce_scatter()
        return Reduced(None, None, None, self.state.inner, self.bags.ok()), part, (*buffers, *rows.buffers)

    def sum_by_inner(self, residual: Tensor | None) -> tuple[Reduced, Tensor, tuple[Tensor, ...]]:
        """The node's sum by ``inner``, of which this rank takes its slice. Returns the same."""
        state = self.state
        state.lend(state.inner, wants_sent=state.wants_sent, wants_total=True)
        reduced = self.inner.reduce(self.grad, residual, state.inner, self.step, self.node)
        assert reduced.total is not None
        if reduced.state.damage is not None:
            self.bags.flags |= reduced.state.damage
        part = self.slices.take(reduced.total, self.node.rank, self.take(self.slices.length))
        part[:1].masked_fill_(~reduced.ok, torch.nan)  # one is enough to tell all ranks of all nodes
        self.space.give(reduced.total)
        if residual is not None and reduced.residual is residual:
            reduced = reduced._replace(residual=residual.clone())
        return reduced, part, (part,)

    # ---- back to all ranks of the node -----------------------------------------------------------------------------

    def gather_sparse(self, outside: Reduced, packet: Packet) -> None:
        """All slices' sums as entries, ``parts``."""
        bags, kernels = self.bags, self.bags.kernels
        with self.clock.span("code"):
            mine, arrived = bags.empty(packet.words), bags.empty(packet.words, rows=self.node.size)
            packet.encode(*self.entries(outside, packet.k), mine[wire.HEADER_WORDS :], kernels)
            bags.seal(mine)
        with self.clock.span("wire"):
            self.node.all_gather(arrived, mine)
        with self.clock.span("code"):
            for rank in range(self.node.size):
                index, value = packet.decode(bags.open(arrived[rank], rank), self.dtype, bags.flags, kernels)
                bags.check(rank)
                self.parts.append(Part(index, value, self.slices.cut, rank))

    def entries(self, outside: Reduced, k: int) -> tuple[Tensor, Tensor]:
        """(k,) positions in the slice, in order, and (k,) values, which hold all that is not zero of the sum."""
        kernels, length = self.bags.kernels, self.slices.length
        dense = outside.total if outside.total is not None else written(outside.parts or (), self.take(length))
        scratch = self.take(length)
        work = kernels.compensate(dense, None, scratch, layout.whole(length, dense.device), k, self.bags.flags)
        found = kernels.select(work, 0, k)
        self.space.give(dense, scratch)
        return found

    def gather_dense(self, outside: Reduced) -> None:
        """All slices' sums written out, ``total``."""
        length, size = self.slices.length, self.node.size
        words = wire.HEADER_WORDS + length * self.dtype.itemsize // wire.WORD
        with self.clock.span("code"):
            buffers = [self.space.take(rows * words, torch.int32, self.grad.device) for rows in (1, size)]
            mine, arrived = buffers[0], buffers[1].view(size, words)
            own = payloads(mine.view(1, words), self.dtype)[0]
            own.copy_(outside.total) if outside.total is not None else written(outside.parts or (), own)
            self.bags.seal(mine)
        with self.clock.span("wire"):
            self.node.all_gather(arrived, mine)
        with self.clock.span("code"):
            self.total = self.take(self.n)
            for rank, part in enumerate(payloads(arrived, self.dtype)):
                self.bags.open(arrived[rank], rank)
                self.slices.put(part, rank, self.total)
        self.space.give(*buffers)

    # ---- afterwards ------------------------------------------------------------------------------------------------

    def owed(self, inner: Tensor | None, outer: Tensor | None) -> Tensor | None:
        """The next residual: what ``inner`` left of this rank's own, and what ``outer`` left of its slice."""
        if outer is None:
            return nothing_owed(self.grad, self.space) if inner is None else inner
        if inner is None:
            inner = self.take(self.n).zero_()
            self.slices.put(outer, self.node.rank, inner)
        else:
            self.slices.add(outer, self.node.rank, inner)
        return inner

    def sent(self, inner: Tensor | None, outer: Tensor | None) -> Tensor | None:
        """Positions whose mass left by ``inner`` (None: all) and is in the sum of its slice."""
        inner, outer = positions(inner), positions(outer)
        if outer is None:
            return inner
        found: list[Tensor] = []
        for rank in range(self.node.size):
            if rank == self.node.rank:
                local = outer
            elif self.total is None:
                local = self.parts[rank].index[self.parts[rank].value != 0]
            else:
                row = self.slices.take(self.total, rank, self.take(self.slices.length))
                local = row.nonzero().flatten()
                self.space.give(row)
            found.append(self.slices.cut.to_global(local, rank))
        index = torch.cat(found)
        index = index[index < self.n].sort().values
        return index if inner is None else index[torch.isin(index, inner, assume_unique=True)]
