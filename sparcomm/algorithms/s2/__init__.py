"""S2 Reducer: gradients that are zero but for some keys, as a bitmap that is ORed and a sketch that is summed.

Source: Ge, Sheng et al., "S2 Reducer: High-Performance Sparse Communication to Accelerate Distributed Deep Learning"
(arXiv 2110.02140): of non-zeros only, count-sketch and bitmap are all-reduced, and every rank decodes the sketch where
the bitmap says. ``peel`` after Li et al., "Accelerating Distributed Deep Learning using Lossless Homomorphic
Compression" (arXiv 2402.07529), ``compact`` after Fei et al., "Efficient Sparse Collective Communication" (OmniReduce,
SIGCOMM 2021).

Cost: chunk i of bitmap and table travel in one message to rank i, which adds and ORs them in rank order, and in one
message from there: 1 + ceil(log2 p) rounds, 2(p-1)/p · (table + K/8) bytes a rank for K keys, however many ranks there
are. ``compact`` takes twice the rounds and the union's values instead of the table.

Deviations, each for a reason:
- The table follows the union that was counted last, not a guess of the density; leaks and everything else that a
  decoder does not tell stay in the residual, on all of the union.
- The hash is new in every step. With the published one, fixed, what the table cannot hold is never sent
  (``fixed_seed`` brings that back, for comparison).
- ``projection`` divides by how many keys share a cell, which all ranks know from the union: the error feedback of the
  plain estimate diverges where tables are small, that of the projection does not. ``median`` over several rows is not
  linear, so that nothing can be said of what is left: it refuses error feedback.
- ``peel`` sums integers with an exponent that all ranks share: exact, whatever the order, the same bits everywhere.
  Published peeling is of floats, whose rounding errors grow along chains. Keys that do not peel, and values that have
  outgrown the exponent, are summed by themselves.
- The bitmap has one bit a key, not a float32; the rules and bags are those of all algorithms here.

Without a selector ``compact`` gives the bits of the ordered dense all-reduce, but that a zero may be 0.0 where it is
-0.0 there: -0.0 counts as zero, and a rank that has only zeros at a key of the union adds 0.0.

A key is a block of consecutive elements of the flat gradient, such as an embedding's row. Rows that do not start at a
multiple of ``granularity`` there touch two keys each. Without a selector and with a decoder that leaves a residual, the
keys of that residual count as non-zero, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparcomm.algorithms.base import Algorithm, Cost, SparseAlgorithm, State, Summed
from sparcomm.algorithms.s2 import settings
from sparcomm.algorithms.s2.plan import Planner
from sparcomm.algorithms.s2.run import Run
from sparcomm.algorithms.s2.settings import DECODERS, EXACT
from sparcomm.algorithms.s2.state import S2State
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.dense import dense_traffic
from sparcomm.dtypes import working_dtype
from sparcomm.errors import ConfigError
from sparcomm.selectors import Selector, make_selector
from sparcomm.transport.base import Link, Transport

__all__ = ["DECODERS", "S2Reducer", "S2State"]


@dataclass(frozen=True)
class S2Reducer(SparseAlgorithm):
    """Sketches of the non-zero keys, summed and decoded on the union of all ranks' keys.

    Args:
        density: keys kept, as a share of all, in (0, 1]; None: all keys that are not zero, and no selector.
        decoder: "compact" (the union first, then its values), "peel" (exact, of integers), "auto": whichever of these
            takes less time by ``cost()``, or the dense all-reduce if without a selector little was zero; "projection",
            "mean" or "median": a count-sketch, whose error stays in the residual.
        granularity: consecutive elements that make a key: 1, a block, or an embedding's row.
        rows: of the table; default 1. "peel" has 3.
        ratio: cells of the table per key of the union; default 0.5 for a sketch, 1.3 to 1.5 for "peel".
        adaptive: the table follows the union counted in the last step. False: it is made for the largest union that
            the density allows, or for ``union``, so that sizes are known beforehand.
        union: with adaptive=False the union that is expected, as a share of all keys.
        error_feedback: keep what was not delivered; default True, but for "median" of several rows, which cannot.
        selector: what chooses the keys at a density, by their largest element: "topk" or "gaussiank".
        fixed_seed: one hash for all steps, as published: what the table cannot hold is then never sent. For comparison.
        allow_sync: let the host wait for a device to know the union, which NCCL needs where sizes follow the data.
        latency: seconds a message takes, for decoder="auto"; None = measured in the first step.
        bandwidth: bytes per second of the slowest rank's link, for decoder="auto"; None = measured.
    """

    name: ClassVar[str] = "s2"
    density: float | None = None
    decoder: str = field(default="auto", metadata={"choices": DECODERS})
    granularity: int = 1
    rows: int | None = None
    ratio: float | None = None
    adaptive: bool = True
    union: float | None = None
    error_feedback: bool | None = None
    selector: str | Selector = "topk"
    fixed_seed: int | None = None
    allow_sync: bool = False
    latency: float | None = None
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "selector", str(make_selector(self.selector)))  # plain, as configurations compare it
        settings.check(self)

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def chooser(self) -> Selector:
        """The selector as an object."""
        return make_selector(self.selector)

    @property
    def table_rows(self) -> int:
        """Rows of a count-sketch."""
        return 1 if self.rows is None else self.rows

    @property
    def feedback(self) -> bool:
        """Whether what was not delivered is kept."""
        if self.error_feedback is None:
            return not (self.decoder == "median" and self.table_rows > 1)
        return self.error_feedback

    @property
    def counts_bits(self) -> bool:
        """Whether it has to know how large values are."""
        return self.decoder in ("peel", "auto")

    @property
    def conserves(self) -> bool:
        """With error feedback; and where all is sent as it is."""
        return self.feedback or (self.decoder == "compact" and self.density is None)

    @property
    def exact(self) -> bool:
        """Unless it divides."""
        return not self.coarse or (self.decoder != "projection" and self.table_rows == 1)

    @property
    def coarse(self) -> bool:
        """Of a count-sketch."""
        return self.decoder not in EXACT

    @property
    def static(self) -> bool:
        """A count-sketch of fixed size is; peeling may leave something over, and all others follow the data."""
        return self.coarse and not self.adaptive

    @property
    def agreed(self) -> bool:
        """Always, if the host may wait: what sizes follow is shared."""
        return self.static or self.allow_sync

    @property
    def remedy(self) -> str:
        """What NCCL takes."""
        return "allow_sync=True, which makes the host wait, or decoder='projection' with a density and adaptive=False"

    @classmethod
    def cases(cls, size: int) -> list[Algorithm]:
        """Every decoder, keys of one element and of several, tables of fixed size and such as follow the union."""
        found: list[Algorithm] = [
            cls(0.1, "projection", adaptive=False, granularity=4),
            cls(0.1, "projection"),
            cls(0.1, "mean", adaptive=False, ratio=2.0),
            cls(0.1, "median", rows=3, ratio=3.0, granularity=4),
            cls(0.1, "peel", granularity=4, ratio=1.3),
            cls(None, "peel"),
            cls(0.1, "compact"),
            cls(None, "auto", granularity=4, latency=1e-9, bandwidth=1e6),
        ]
        return [*found, cls(1.0, "peel")] if size < 5 else found

    def init(self, n: int, dtype: torch.dtype, device: torch.device, size: int) -> S2State:
        """A fresh state."""
        return S2State()

    def link(self, state: State | None, size: int) -> Link | None:
        """What "auto" goes by, if it is known."""
        if self.latency is not None and self.bandwidth is not None:
            return Link(self.latency, self.bandwidth)
        if isinstance(state, S2State) and state.measured == size:
            return Link(state.latency, state.bandwidth)
        return None

    # ---- sizes -------------------------------------------------------------------------------------------------------

    def planner(self, n: int, dtype: torch.dtype, size: int) -> Planner:
        """What decides how steps of such vectors go."""
        return Planner(self, n, dtype, size)

    def _is_dense(self, n: int, dtype: torch.dtype, size: int) -> bool:
        return self.planner(n, dtype, size).is_dense()

    def delivers_all(self, n: int, dtype: torch.dtype, size: int) -> bool:
        """Without a selector by ``compact``; and where the dense all-reduce takes over whatever comes."""
        return (self.density is None and self.decoder == "compact") or super().delivers_all(n, dtype, size)

    def cost(self, n: int, dtype: torch.dtype, size: int, state: State | None = None) -> Cost:
        """Exact for a step that starts from ``state`` and decodes a sketch, or is dense; for the others a bound."""
        if n == 0:
            return Cost(0, 0, 0)
        planner = self.planner(n, dtype, size)
        if planner.is_dense():
            return Cost(*dense_traffic(n, working_dtype(dtype).itemsize, size))
        return Cost(*planner.cost(state))

    def _sparse_cost(self, n: int, size: int, state: State | None = None) -> Cost:
        return self.cost(n, torch.float32, size, state)

    def _sparse_kept(self, n: int, size: int) -> int:
        planner = self.planner(n, torch.float32, size)
        return planner.keys.elements(planner.bound)

    # ---- the reduce --------------------------------------------------------------------------------------------------

    def _sparse_reduce(
        self, grad: Tensor, residual: Tensor | None, state: State, bags: Bags, transport: Transport
    ) -> Summed:
        if not isinstance(state, S2State):
            raise ConfigError(f"state is a {type(state).__name__}, must come from this algorithm's init")
        size = transport.size
        if self.decoder == "auto" and size > 1 and self.link(state, size) is None:
            link = transport.measure()
            # In place: the link belongs to no step, and a step that is dropped must not make ranks measure it again.
            state.latency, state.bandwidth, state.measured = link.latency, link.bandwidth, size
        planner = self.planner(grad.numel(), grad.dtype, size)
        return Run(self, planner, planner.plan(state), grad, residual, state, bags, transport).reduce()
