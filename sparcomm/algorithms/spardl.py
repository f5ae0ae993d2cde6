"""SparDL: sparse all-reduce by Spar-Reduce-Scatter and an all-gather, for any number of ranks.

Source: Zhao et al., "SparDL: Distributed Deep Learning Training with Efficient Sparse Communication", ICDE 2024
(arXiv 2304.00737): Spar-Reduce-Scatter, "optimised": a block is cut to its quota just before it is sent, never earlier;
global residual collection. The vector is cut into p blocks; rank r ends up owning the sum of block r, cut to k/p
entries, and all ranks gather all blocks.

Cost: 2·ceil(log2 p) rounds of one message, 2·(p-1)/p·k entries sent by each rank (``schedule="log"``), or 1 +
ceil(log2 p) rounds with the same entries (``"direct"``).

Deviations, each for a reason:
- Blocks are dealt tiles, not contiguous pieces (layout.py): a fixed quota per contiguous block misses most of the mass
  when layers differ in scale. ``layout="contiguous"`` is the paper's.
- All blocks of a round travel in one message, which the paper promises and its code does not do.
- Indices are Elias-Fano coded, values may be narrow, and the rounding error stays in the sender's residual.
- ``schedule="direct"`` sends every block straight to its owner: no drop at intermediate ranks.
- Where the dense all-reduce sends fewer bytes (tiny vectors, densities near 1) it is used instead.
- Sums under way are kept apart from gradient + residual (kernels' ``Working``), which so is the next residual already,
  but for the positions of the final set: the paper's second dense copy is not needed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.algorithms.base import Algorithm, Cost, Part, SparseAlgorithm, State, Summed, derived
from sparcomm.codecs.packet import Packet
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.dense import log2_ceil
from sparcomm.density import block_quota, check_density
from sparcomm.dtypes import WIRE_DTYPES, wire_dtype, working_dtype
from sparcomm.errors import ConfigError
from sparcomm.layout import LAYOUTS, SHAPES, Layout
from sparcomm.transport.base import Transport

SCHEDULES = ("log", "direct")
RESIDUALS = ("global", "partial", "local")


def log_schedule(blocks: int) -> list[tuple[int, int]]:
    """(gap, count) of every Spar-Reduce-Scatter round: a rank r sends blocks r+gap .. r+gap+count-1 to rank r+gap.

    Block numbers are modulo ``blocks``. After a round only blocks closer than its gap are still to be sent, so a block
    leaves once, after everything routed through this rank has been merged into it (paper, section on SRS).
    """
    rounds: list[tuple[int, int]] = []
    live = blocks
    for s in reversed(range(log2_ceil(blocks))):
        rounds.append((1 << s, live - (1 << s)))
        live = 1 << s
    return rounds


@dataclass
class SparDLState(State):
    """State of one unit: the cut of its vector."""

    layout: Layout | None = derived(default=None)


@dataclass(frozen=True)
class SparDL(SparseAlgorithm):
    """Spar-Reduce-Scatter and all-gather with global residual collection.

    Args:
        density: k / n, in (0, 1]; every one of the p blocks keeps max(1, round(k/p)) entries.
        schedule: "log" (ceil(log2 p) one-message rounds) or "direct" (one all_to_all) before the all-gather.
        layout: "dealt" tiles or the paper's "contiguous" blocks.
        residuals: "global" collects every dropped value; "partial" leaves out what intermediate ranks drop, "local"
            keeps only what was never sent (both lose gradient mass; for comparison, paper's names PRES and LRES).
        values: width of the values sent: "float32", "bfloat16" or "float16".
    """

    name: ClassVar[str] = "spardl"
    density: float = 0.01
    schedule: str = field(default="log", metadata={"choices": SCHEDULES})
    layout: str = field(default="dealt", metadata={"choices": tuple(LAYOUTS)})
    residuals: str = field(default="global", metadata={"choices": RESIDUALS})
    values: str = field(default="float32", metadata={"choices": tuple(WIRE_DTYPES)})

    def __post_init__(self) -> None:
        check_density(self.density)
        wire_dtype(self.values)
        for name, allowed in (("schedule", SCHEDULES), ("layout", tuple(LAYOUTS)), ("residuals", RESIDUALS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(map(repr, allowed))}")

    @property
    def conserves(self) -> bool:
        """With ``residuals="global"`` only."""
        return self.residuals == "global"

    @classmethod
    def cases(cls, size: int) -> list[Algorithm]:
        """Every layout, schedule and value width at densities from one element to all; each residual rule."""
        densities = (1e-9, 0.01, 0.1, 0.3, 1.0)
        grid = product(densities, SCHEDULES, LAYOUTS, ("float32", "bfloat16", "float16"))
        full = [cls(d, schedule=s, layout=b, values=v) for d, s, b, v in grid]
        return [*full, *(replace(cls(0.1, schedule=s), residuals=r) for s in SCHEDULES for r in RESIDUALS[1:])]

    def init(self, n: int, dtype: torch.dtype, device: torch.device, size: int) -> SparDLState:
        """A fresh state for gradients of n elements over ``size`` ranks."""
        return SparDLState(layout=LAYOUTS[self.layout](n, size, device))

    def packet(self, n: int, size: int, blocks: int = 1) -> Packet:
        """How a bag of ``blocks`` blocks is coded (n elements, ``size`` ranks)."""
        return _packet(self.density, self.layout, self.values, n, size, blocks)

    def _sparse_cost(self, n: int, size: int) -> Cost:
        last = wire.WORD * (wire.HEADER_WORDS + self.packet(n, size).words)
        gather = (size - 1) * last
        if self.schedule == "direct":
            rounds, messages, scatter = min(1, size - 1), size - 1, (size - 1) * last
        else:
            bags = [self.packet(n, size, count).words + wire.HEADER_WORDS for _, count in log_schedule(size)]
            rounds, messages, scatter = len(bags), len(bags), wire.WORD * sum(bags)
        return Cost(rounds + log2_ceil(size), messages + log2_ceil(size), scatter + gather)

    def _sparse_kept(self, n: int, size: int) -> int:
        return size * self.packet(n, size).k

    def _sparse_reduce(
        self, grad: Tensor, residual: Tensor | None, state: State, bags: Bags, transport: Transport
    ) -> Summed:
        n, size = grad.numel(), transport.size
        cut = state.layout if isinstance(state, SparDLState) else None
        if cut is None or (cut.numel, cut.blocks) != (n, size):
            raise ConfigError(f"state was made for another vector or group: {n} elements over {size} ranks asked for")
        run = _Run(self, grad, residual, state, bags, transport, cut)
        if size > 1:
            run.scatter_log() if self.schedule == "log" else run.scatter_direct()
        parts = run.gather()
        final = [part.index for part in parts]
        with state.clock.span("select"):
            run.collect_residuals(final, self.residuals)
            sent = run.sent(final, self.residuals) if state.wants_sent else None
        return Summed(parts, run.out, sent)


@functools.lru_cache(maxsize=4096)
def _packet(density: float, layout: str, values: str, n: int, size: int, blocks: int) -> Packet:
    """Made once: a step asks for it dozens of times."""
    tile, rounds = SHAPES[layout](n, size)
    length = tile * rounds
    return Packet(blocks * block_quota(density, n, size, length), blocks * length, values)


class _Run:
    """One ``reduce`` under way: the sums, what was chosen of each block, and the next residual, ``out``."""

    def __init__(
        self, algorithm: SparDL, grad: Tensor, residual: Tensor | None, state: State, bags: Bags, transport: Transport,
        cut: Layout,
    ) -> None:  # fmt: skip
        self.algorithm, self.cut = algorithm, cut
        self.bags, self.transport, self.clock, self.kernels = bags, transport, state.clock, bags.kernels
        self.chosen: list[Tensor | None] = [None] * cut.blocks
        self.dtype = working_dtype(grad.dtype)
        self.out = state.workspace.take(grad.numel(), self.dtype, grad.device)
        with self.clock.span("select"):
            share = self.packet(1).k
            self.work = self.kernels.compensate(grad, residual, self.out, cut, share, bags.flags)

    def packet(self, blocks: int) -> Packet:
        """How a bag of ``blocks`` blocks is coded."""
        return self.algorithm.packet(self.cut.numel, self.cut.blocks, blocks)

    def pack(self, blocks: list[int], bag: Tensor) -> None:
        """Cuts each of ``blocks`` to its quota, moves what was chosen into ``bag``, and seals it."""
        packet = self.packet(len(blocks))
        share = packet.k // len(blocks)
        with self.clock.span("select"):
            selected = [self.kernels.select(self.work, b, share) for b in blocks]
            index, value = [i for i, _ in selected], [v for _, v in selected]
        with self.clock.span("code"):
            joined = torch.cat([i + at * self.cut.length for at, i in enumerate(index)]) if len(index) > 1 else index[0]
            values = torch.cat(value) if len(value) > 1 else value[0]
            decoded = packet.encode(joined, values, bag[wire.HEADER_WORDS :], self.kernels).value
            for at, (i, b) in enumerate(zip(index, blocks, strict=True)):
                self.kernels.deduct(self.work, b, decoded[at * share : (at + 1) * share])
                self.chosen[b] = i
            self.bags.seal(bag)

    def merge(self, blocks: list[int], bag: Tensor, source: int) -> None:
        """Adds the content of a bag from rank ``source`` to ``blocks``."""
        with self.clock.span("code"):
            packet = self.packet(len(blocks))
            share = packet.k // len(blocks)
            index, value = packet.decode(self.bags.open(bag, source), self.dtype, self.bags.flags, self.kernels)
            for at, b in enumerate(blocks):
                part = slice(at * share, (at + 1) * share)
                self.kernels.merge(self.work, b, index[part] - at * self.cut.length if at else index[part], value[part])
            self.bags.check(source)

    def scatter_log(self) -> None:
        """Spar-Reduce-Scatter in ceil(log2 p) rounds of one bag each way."""
        rank, size = self.transport.rank, self.transport.size
        for gap, count in log_schedule(size):
            away = [(rank + gap + c) % size for c in range(count)]
            mine = [(rank + c) % size for c in range(count)]
            words = self.packet(count).words
            send, recv = self.bags.empty(words), self.bags.empty(words)
            self.pack(away, send)
            with self.clock.span("wire"):
                self.transport.exchange(send, (rank + gap) % size, recv, (rank - gap) % size)
            self.merge(mine, recv, (rank - gap) % size)

    def scatter_direct(self) -> None:
        """Every block straight to its owner, in one all_to_all."""
        rank, size = self.transport.rank, self.transport.size
        send = self.bags.empty(self.packet(1).words, rows=size)
        recv = torch.empty_like(send)
        send[rank].zero_()  # the own slot never leaves, but its bytes are copied
        for b in range(size):
            if b != rank:
                self.pack([b], send[b])
        with self.clock.span("wire"):
            self.transport.all_to_all(recv, send)
        for source in range(size):
            if source != rank:
                self.merge([rank], recv[source], source)

    def gather(self) -> list[Part]:
        """Cuts the own block's sum and all-gathers all blocks: the final entries, by block."""
        size, packet = self.transport.size, self.packet(1)
        mine, bags = self.bags.empty(packet.words), self.bags.empty(packet.words, rows=self.transport.size)
        self.pack([self.transport.rank], mine)
        with self.clock.span("wire"):
            self.transport.all_gather(bags, mine)
        with self.clock.span("code"):
            parts: list[Part] = []
            for b in range(size):
                index, value = packet.decode(self.bags.open(bags[b], b), self.dtype, self.bags.flags, self.kernels)
                self.bags.check(b)
                parts.append(Part(index, value, self.cut, b))
        return parts

    def collect_residuals(self, final: list[Tensor], rule: str) -> None:
        """Turns ``out`` into the next residual (paper: global residual collection).

        A position outside the final set reached nobody: every rank keeps its own share, as ``out`` has it, which also
        covers what intermediate ranks had merged there. Inside it, a rank keeps what it did not pass on.
        """
        for b, keep in enumerate(final):
            chosen = self.chosen[b]
            assert chosen is not None  # every block is sent once, or owned
            if rule != "global":  # nobody keeps what others had sent and was dropped on the way
                keep = chosen if rule == "local" else chosen[torch.isin(chosen, keep, assume_unique=True)]
            self.kernels.settle(self.work, b, keep)

    def sent(self, final: list[Tensor], rule: str) -> Tensor:
        """Sorted global positions whose own mass left this rank for good."""
        parts: list[Tensor] = []
        for b, keep in enumerate(final):
            chosen = self.chosen[b]
            assert chosen is not None
            local = chosen if rule == "local" else chosen[torch.isin(chosen, keep, assume_unique=True)]
            parts.append(self.cut.to_global(local, b))
        index = torch.cat(parts)
        return index[index < self.cut.numel].sort().values  # without padding
