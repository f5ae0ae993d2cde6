"""Top-k with error feedback over an all-gather: the plain way to send sparse gradients.

Source: Aji & Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP 2017; error feedback after Stich
et al., "Sparsified SGD with Memory", NeurIPS 2018. Every rank sends its own k largest entries to every other, and all
add them up in rank order. Cost: ceil(log2 p) rounds (Bruck) and (p-1)·k entries a rank, so the bytes grow with p where
SparDL's do not; nothing is dropped after the first selection.

Deviations: exactly k entries (ties at the lowest index), Elias-Fano indices, narrow values whose rounding error stays
in the residual.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from sparcomm import layout, wire
from sparcomm.algorithms.base import Algorithm, Cost, Part, SparseAlgorithm, State, Summed
from sparcomm.codecs.packet import Packet
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.dense import log2_ceil
from sparcomm.density import check_density, quota
from sparcomm.dtypes import WIRE_DTYPES, wire_dtype, working_dtype
from sparcomm.sparse import Sparse
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
        return Packet(quota(self.density, n), n, self.values)

    def _sparse_cost(self, n: int, size: int) -> Cost:
        bag = wire.WORD * (wire.HEADER_WORDS + self._packet(n).words)
        return Cost(log2_ceil(size), log2_ceil(size), (size - 1) * bag)

    def _sparse_kept(self, n: int, size: int) -> int:
        return size * quota(self.density, n)

    def _sparse_reduce(
        self, grad: Tensor, residual: Tensor | None, state: State, bags: Bags, transport: Transport
    ) -> Summed:
        n, dtype, kernels = grad.numel(), working_dtype(grad.dtype), bags.kernels
        one, packet = layout.whole(n, grad.device), self._packet(n)
        out = state.workspace.take(n, dtype, grad.device)
        with state.clock.span("select"):
            work = kernels.compensate(grad, residual, out, one, packet.k, bags.flags)
            index, value = kernels.select(work, 0, packet.k)
        with state.clock.span("code"):
            bag = bags.empty(packet.words)
            kernels.deduct(work, 0, packet.encode(index, value, bag[wire.HEADER_WORDS :], kernels).value)
            kernels.settle(work, 0, index)
            bags.seal(bag)
            arrived = bags.empty(packet.words, rows=transport.size)
        with state.clock.span("wire"):
            transport.all_gather(arrived, bag)
        with state.clock.span("code"):
            lists: list[Sparse] = []
            for rank in range(transport.size):
                entries = packet.decode(bags.open(arrived[rank], rank), dtype, bags.flags, kernels)
                bags.check(rank)
                lists.append(Sparse(*entries, n))
            # Merging p lists one after the other takes about p²k/2 steps, which must not exceed a pass over n.
            if state.wants_total or transport.size**2 * packet.k > n:
                total = state.workspace.take(n, dtype, grad.device).zero_()
                for s in lists:
                    kernels.add(total, s.index, s.value, one, 0, bags.flags)
            else:
                united = functools.reduce(kernels.merge_sum, lists)
                bags.note_nonfinite(united.value)
                total = [Part(united.index, united.value, one, 0)]
        return Summed(total, out, index if state.wants_sent else None)
