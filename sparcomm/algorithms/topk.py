"""Top-k with error feedback over an all-gather: the plain way to send sparse gradients.

Source: Aji & Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP 2017; error feedback after Stich
et al., "Sparsified SGD with Memory", NeurIPS 2018. Every rank sends its own k largest entries to every other, and all
add them up in rank order. Cost: ceil(log2 p) rounds (Bruck) and (p-1)·k entries a rank, so the bytes grow with p where
SparDL's do not; nothing is dropped after the first selection.

Deviations: exactly k entries (ties at the lowest index), Elias-Fano indices, narrow values whose rounding error stays
in the residual.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from sparcomm import layout, wire
from sparcomm.algorithms.base import Algorithm, Cost, SparseAlgorithm, State
from sparcomm.codecs.packet import Packet
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.dense import log2_ceil
from sparcomm.density import check_density, quota
from sparcomm.dtypes import WIRE_DTYPES, wire_dtype
from sparcomm.memory import compensate
from sparcomm.transport.base import Transport


@dataclass(frozen=True)
class TopKAllGather(SparseAlgorithm):
    """Each rank's k largest entries by magnitude, all-gathered and summed.

    Args:
        density: k / n, in (0, 1]; k is at least 1.
        values: width of the values sent: "float32", "bfloat16" or "float16".
    """

    name: ClassVar[str] = "topk"
    density: float = 0.01
    values: str = field(default="float32", metadata={"choices": tuple(WIRE_DTYPES)})

    def __post_init__(self) -> None:
        check_density(self.density)
        wire_dtype(self.values)

    @property
    def conserves(self) -> bool:
        """Always: what is not sent stays in the residual."""
        return True

    @classmethod
    def cases(cls, size: int) -> list[Algorithm]:
        """Every value width at densities from one element to all."""
        base = [cls(density=d) for d in (1e-9, 0.01, 0.1, 0.3, 1.0)]
        return [replace(c, values=v) for c in base for v in ("float32", "bfloat16", "float16")]

    def _packet(self, n: int) -> Packet:
        return Packet(quota(self.density, n), n, wire_dtype(self.values))

    def _sparse_cost(self, n: int, size: int) -> Cost:
        bag = wire.WORD * (wire.HEADER_WORDS + self._packet(n).words)
        return Cost(log2_ceil(size), log2_ceil(size), (size - 1) * bag)

    def _sparse_kept(self, n: int, size: int) -> int:
        return size * quota(self.density, n)

    def _sparse_reduce(
        self, grad: Tensor, residual: Tensor | None, state: State, total: Tensor, bags: Bags, transport: Transport
    ) -> tuple[Tensor, Tensor | None]:
        n, dtype, kernels = grad.numel(), total.dtype, bags.kernels
        one, packet = layout.whole(n, grad.device), self._packet(n)
        out = state.workspace.take(n, dtype, grad.device)
        with state.clock.span("select"):
            stats = compensate(grad, residual, out, one, bags.flags)
            index = kernels.select(out, packet.k, stats, one, 0)
        with state.clock.span("code"):
            bag = bags.empty(packet.words)
            value = packet.encode(index, kernels.gather(out, index, one, 0), bag[wire.HEADER_WORDS :], kernels)
            kernels.subtract(out, index, value, one, 0)
            bags.seal(bag)
            arrived = bags.empty(packet.words, rows=transport.size)
        with state.clock.span("wire"):
            transport.all_gather(arrived, bag)
        with state.clock.span("code"):
            total.zero_()
            for rank in range(transport.size):
                entries = packet.decode(bags.open(arrived[rank], rank), dtype, bags.flags, kernels)
                bags.check(rank)
                kernels.merge(total, *entries, one, 0, None, bags.flags)
        return out, index if state.wants_sent else None
