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

import torch
from torch import Tensor

from sparcomm import layout, wire
from sparcomm.algorithms.base import Algorithm, Cost, Reduced, State
from sparcomm.codecs.packet import Packet
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.dense import dense_traffic, log2_ceil, ordered_all_reduce
from sparcomm.density import check_density, quota
from sparcomm.dtypes import WIRE_DTYPES, wire_dtype, working_dtype
from sparcomm.kernels import kernels_for
from sparcomm.memory import compensate, compensated, nothing_owed
from sparcomm.transport.base import Transport


@dataclass(frozen=True)
class TopKAllGather(Algorithm):
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

    def _is_dense(self, n: int, dtype: torch.dtype, size: int) -> bool:
        return dense_traffic(n, working_dtype(dtype).itemsize, size)[2] < self._sparse_cost(n, size).bytes_sent

    def _sparse_cost(self, n: int, size: int) -> Cost:
        bag = wire.WORD * (wire.HEADER_WORDS + self._packet(n).words)
        return Cost(log2_ceil(size), log2_ceil(size), (size - 1) * bag)

    def cost(self, n: int, dtype: torch.dtype, size: int, state: State | None = None) -> Cost:
        """Exact: the all-gather's, or the dense all-reduce's where that sends fewer bytes."""
        if n == 0:
            return Cost(0, 0, 0)
        if self._is_dense(n, dtype, size):
            return Cost(*dense_traffic(n, working_dtype(dtype).itemsize, size))
        return self._sparse_cost(n, size)

    def kept(self, n: int, size: int) -> int:
        """At most k of every rank."""
        return min(n, size * quota(self.density, n)) if n else 0

    def _reduce(self, grad: Tensor, residual: Tensor | None, state: State, step: int, transport: Transport) -> Reduced:
        n, dtype = grad.numel(), working_dtype(grad.dtype)
        kernels = kernels_for(grad)
        bags = Bags(kernels, state.unit, step, grad.device, state.damage)
        total = state.workspace.take(n, dtype, grad.device)
        if self._is_dense(n, grad.dtype, transport.size):
            x = compensated(grad, residual)
            ordered_all_reduce(x, total, bags, transport, state.clock, state.workspace)
            state.damage = bags.damage()
            return Reduced(total, nothing_owed(grad, state.workspace), None, state, bags.ok())
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
        state.damage = bags.damage()
        return Reduced(total, out, index if state.wants_sent else None, state, bags.ok())
