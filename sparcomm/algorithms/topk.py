"""Top-k with error feedback over an all-gather: the plain way to send sparse gradients.

Source: Aji & Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP 2017; error feedback after Stich
et al., "Sparsified SGD with Memory", NeurIPS 2018. Every rank sends its own k largest entries to every other, and all
add them up in rank order. Cost: ceil(log2 p) rounds (Bruck) and (p-1)·k entries a rank, so the bytes grow with p where
SparDL's do not; nothing is dropped after the first selection.

Deviations: exactly k entries (ties at the lowest index) with an exact selector, Elias-Fano or Golomb-Rice indices,
narrow values whose rounding error stays in the residual. A selector that picks by a threshold sends as many as it
finds: their number stands in front of them, and bags are as long as they have to be, which NCCL cannot do.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparcomm import layout, wire
from sparcomm.algorithms.base import Algorithm, Cost, Part, SparseAlgorithm, State, Summed, private, sent_at
from sparcomm.clock import Range
from sparcomm.codecs.packet import INDICES, ROUNDINGS, VALUES, Packet, check_values
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.dense import log2_ceil
from sparcomm.collectives.variable import gather_bags
from sparcomm.density import check_density, quota
from sparcomm.dtypes import working_dtype
from sparcomm.errors import DamagedBag
from sparcomm.seeds import mixed
from sparcomm.selectors import Memo, Selector, make_selector
from sparcomm.sparse import Sparse
from sparcomm.transport.base import Transport


@dataclass
class TopKState(State):
    """State of one unit.

    Attributes:
        memo: what the selector remembers, as ``Memo.state`` gives it: what it picks depends on that.
    """

    memo: dict[str, Any] = private(default_factory=lambda: Memo().state())


@dataclass(frozen=True)
class TopKAllGather(SparseAlgorithm):
    """Each rank's k largest entries by magnitude, all-gathered and summed.

    Args:
        density: k / n, in (0, 1]; k is at least 1.
        values: width of the values sent: "float32", "bfloat16", "float16" or "int8" (blocks of 32 with a shared power
            of two).
        rounding: of narrow values: "nearest", or "stochastic" (bfloat16 and int8).
        indices: "elias-fano" (sizes known beforehand, any backend) or "rice" (Golomb-Rice: some 5 % shorter, of varying
            length, hence not on NCCL).
        selector: what chooses the entries: "topk" (exactly k) or "gaussiank" (by a threshold: 2k/3 to 4k/3 of them, of
            varying number, hence not on NCCL), with options as in "gaussiank(reestimate_every=4)".
    """

    name: ClassVar[str] = "topk"
    density: float = 0.01
    values: str = field(default="float32", metadata={"choices": VALUES})
    rounding: str = field(default="nearest", metadata={"choices": ROUNDINGS})
    indices: str = field(default="elias-fano", metadata={"choices": INDICES})
    selector: str | Selector = "topk"

    def __post_init__(self) -> None:
        check_density(self.density)
        check_values(self.values, self.rounding, self.indices)
        object.__setattr__(self, "selector", str(make_selector(self.selector)))  # plain, as configurations compare it

    @property
    def chooser(self) -> Selector:
        """The selector as an object."""
        return make_selector(self.selector)

    @property
    def conserves(self) -> bool:
        """Always: what is not sent stays in the residual."""
        return True

    @property
    def static(self) -> bool:
        """Whether the selector picks exactly k, and these are coded in as many bits whatever they are."""
        return self.chooser.fixed and self.indices != "rice"

    @classmethod
    def cases(cls, size: int) -> list[Algorithm]:
        """Every value width, code and selector at densities from one element to all."""
        densities = (1e-9, 0.01, 0.1, 0.3, 1.0)
        found: list[Algorithm] = [cls(d, values=v) for d in densities for v in VALUES]
        found += [cls(0.1, values=v, rounding="stochastic") for v in ("bfloat16", "int8")]
        selectors = ("gaussiank", "gaussiank(guard=False)", "gaussiank(reestimate_every=2)")
        found += [cls(d, selector=s) for d in (1e-9, 0.1, 1.0) for s in selectors]
        return [
            *found,
            *(replace(cls(d), indices="rice", selector=s) for d in (0.1, 1.0) for s in ("topk", "gaussiank")),
        ]

    def init(self, n: int, dtype: torch.dtype, device: torch.device, size: int) -> TopKState:
        """A fresh state."""
        return TopKState()

    # ---- sizes -------------------------------------------------------------------------------------------------------

    def _packet(self, n: int, k: int | None = None) -> Packet:
        return Packet(quota(self.density, n) if k is None else k, n, self.values, self.rounding, self.indices)

    def _most(self, n: int) -> int:
        return self.chooser.most(quota(self.density, n), n)

    def _words(self, n: int) -> int:
        """Words of the longest payload."""
        if self.chooser.fixed:
            return self._packet(n).words
        most = self._most(n)
        # All n need no indices, so nearly all may take more; and fewer may need a word more to fill up their halves.
        return 2 + max(self._packet(n, k).words for k in {most, min(most, n - 1)})

    def _sparse_cost(self, n: int, size: int, state: State | None = None) -> Cost:
        bag = wire.WORD * (wire.HEADER_WORDS + self._words(n))
        return Cost(log2_ceil(size), log2_ceil(size), (size - 1) * bag)

    def _usual_bytes(self, n: int, size: int) -> int:
        return (size - 1) * wire.WORD * (wire.HEADER_WORDS + self._packet(n).words)

    def _sparse_kept(self, n: int, size: int) -> int:
        return size * self._most(n)

    # ---- the reduce --------------------------------------------------------------------------------------------------

    def _sparse_reduce(
        self, grad: Tensor, residual: Tensor | None, state: State, bags: Bags, transport: Transport
    ) -> Summed:
        n, dtype, kernels = grad.numel(), working_dtype(grad.dtype), bags.kernels
        one, k = layout.whole(n, grad.device), quota(self.density, n)
        memo = Memo.from_state(state.memo) if isinstance(state, TopKState) else Memo()
        out = state.workspace.take(n, dtype, grad.device)
        with state.clock.span("select"):
            choice = self.chooser.start(kernels, grad, residual, out, one, k, bags.flags, memo)
            index, value = choice.pick(0, k)
            after = replace(state, memo=memo.state()) if isinstance(state, TopKState) else state
        with state.clock.span("code"):
            bag, decoded = self._coded(n, index, value, bags, transport.rank)
            with Range("settle"):
                kernels.deduct(choice.work, 0, decoded)
                kernels.settle(choice.work, 0, index)
            sent = sent_at(index, decoded != 0, n) if state.wants_sent else None  # a zero takes nothing away
        with state.clock.span("wire"):
            arrived = self._gathered(n, bag, bags, transport)
        with state.clock.span("code"):
            lists = [Sparse(*self._decoded(n, arrived[r], r, dtype, bags), n) for r in range(transport.size)]
            # Merging p lists one after the other takes about p²k/2 steps, which must not exceed a pass over n, and a
            # device's host would have to wait for how long each is.
            if state.wants_total or transport.size**2 * k > n or grad.device.type != "cpu":
                total = state.workspace.take(n, dtype, grad.device).zero_()
                for s in lists:
                    kernels.add(total, s.index, s.value, one, 0, bags.flags)
            else:
                united = functools.reduce(kernels.merge_sum, lists)
                bags.note_nonfinite(united.value)
                total = [Part(united.index, united.value, one, 0)]
        return Summed(total, out, sent, after)

    def _coded(self, n: int, index: Tensor, value: Tensor, bags: Bags, rank: int) -> tuple[Tensor, Tensor]:
        """(sealed bag, values as they will be read)."""
        ahead = 0 if self.chooser.fixed else 1
        packet, start = self._packet(n, index.numel()), wire.HEADER_WORDS + ahead
        bag = bags.empty(ahead + packet.words)
        if ahead:
            bag[wire.HEADER_WORDS] = index.numel()
        coded = packet.encode(index, value, bag[start:], bags.kernels, mixed(bags.step, bags.unit, rank))
        bag = bag[: start + coded.words]
        bags.seal(bag)
        return bag, coded.value

    def _gathered(self, n: int, bag: Tensor, bags: Bags, transport: Transport) -> Tensor | list[Tensor]:
        if not self.static:
            return gather_bags(bags, transport, bag, self._words(n))
        arrived = bags.empty(self._packet(n).words, rows=transport.size)
        transport.all_gather(arrived, bag)
        return arrived

    def _decoded(self, n: int, bag: Tensor, source: int, dtype: torch.dtype, bags: Bags) -> tuple[Tensor, Tensor]:
        payload, k = bags.open(bag, source, variable=not self.static), quota(self.density, n)
        if not self.chooser.fixed:
            k = int(payload[0]) if payload.numel() else -1
            payload = payload[1:]
            packet = self._packet(n, k) if 0 <= k <= self._most(n) else None
            if packet is None or payload.numel() > packet.words or (packet.static and payload.numel() < packet.words):
                raise DamagedBag(
                    f"step {bags.step}, unit {bags.unit}: rank {source} sent {payload.numel()} words for {k} entries"
                )
        found = self._packet(n, k).decode(payload, dtype, bags.flags, bags.kernels)
        bags.check(source)
        return found
