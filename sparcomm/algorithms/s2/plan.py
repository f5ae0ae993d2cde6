"""How one step goes: by a table of which size, by the compacted union, or densely. Of shared numbers only."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from sparcomm.algorithms.s2.sizes import PEEL_ROWS, Keys, Traffic, Trip, compact_traffic, peel_columns, plus
from sparcomm.algorithms.s2.state import S2State
from sparcomm.collectives.dense import dense_traffic
from sparcomm.density import quota
from sparcomm.dtypes import working_dtype
from sparcomm.transport.base import Link

if TYPE_CHECKING:
    from sparcomm.algorithms.base import State
    from sparcomm.algorithms.s2 import S2Reducer

HEADROOM = 1.1  # a table is made for so many times the keys that were last counted
DENSE, COMPACT, PEEL = "dense", "compact", "peel"


class Plan(NamedTuple):
    """What a step does.

    Attributes:
        way: "dense", "compact", or how the table is decoded: "median", "mean", "projection" or "peel".
        rows, columns: of the table, if there is one.
    """

    way: str
    rows: int = 0
    columns: int = 0


class Planner:
    """Plans for one algorithm, vector and group."""

    def __init__(self, algorithm: S2Reducer, n: int, dtype: torch.dtype, size: int) -> None:
        self.algorithm, self.size = algorithm, size
        self.itemsize = working_dtype(dtype).itemsize
        self.keys = Keys(n, min(algorithm.granularity, n))
        self.natural = algorithm.density is None
        self.quota = self.keys.count if algorithm.density is None else quota(algorithm.density, self.keys.count)
        self.bound = min(self.keys.count, size * self.quota)  # of the union
        self.dense = dense_traffic(n, self.itemsize, size)

    # ---- sizes -------------------------------------------------------------------------------------------------------

    def trip(self, plan: Plan, width: int | None = None) -> Trip:
        """The round trip of a table; or, for the other ways, of the bitmap alone."""
        lanes = plan.rows * plan.columns * (self.keys.width if width is None else width)
        exact = plan.way == PEEL
        return Trip(lanes, 4 if exact else self.itemsize, self.keys.words, exact or not lanes, self.size)

    def compact(self, union: int) -> Traffic:
        """What the compacted union costs."""
        return compact_traffic(self.keys, union, self.itemsize, self.size, peak=True)

    def table(self, way: str, union: int) -> Plan:
        """A table for ``union`` keys."""
        ratio = self.algorithm.ratio
        if way == PEEL:
            return Plan(way, PEEL_ROWS, peel_columns(union, ratio))
        rows = self.algorithm.table_rows
        return Plan(way, rows, max(1, math.ceil((0.5 if ratio is None else ratio) * union / rows)))

    # ---- what is expected -------------------------------------------------------------------------------------------

    def expected(self, way: str, state: State | None) -> int | None:
        """Keys that a table is made for; None: nobody can say yet."""
        algorithm = self.algorithm
        if algorithm.union is not None:
            return min(self.bound, max(1, math.ceil(algorithm.union * self.keys.count)))
        if algorithm.adaptive and isinstance(state, S2State) and state.union >= 0:
            seen = state.crest if way == PEEL else state.union
            return min(self.bound, max(1, math.ceil(HEADROOM * seen)))
        return None if self.natural else self.bound

    def is_dense(self) -> bool:
        """Whether the dense all-reduce sends fewer bytes at this density whatever happens: a matter of sizes alone."""
        algorithm = self.algorithm
        if self.natural:
            return False
        if algorithm.density == 1 and algorithm.coarse:
            return True
        least = self.quota  # of the union: all ranks have the same keys
        if not algorithm.adaptive or algorithm.union is not None:
            least = self.expected(algorithm.decoder, None) or least
        ways = (COMPACT, PEEL) if algorithm.decoder == "auto" else (algorithm.decoder,)
        costs = [self.compact(least) if w == COMPACT else self.trip(self.table(w, least)).traffic for w in ways]
        return self.dense[2] < min(cost[2] for cost in costs)

    def plan(self, state: State | None) -> Plan:
        """The way of a step that starts from ``state`` (None: a fresh one), where ``is_dense`` does not hold."""
        way = self.algorithm.decoder
        if way == "auto":
            way = self.fastest(state)
        if way == DENSE:
            return Plan(DENSE)
        expected = None if way == COMPACT else self.expected(way, state)
        if expected is not None and (way != PEEL or (isinstance(state, S2State) and state.peak is not None)):
            plan = self.table(way, expected)
            if self.trip(plan).traffic[2] <= self.dense[2] or self.size == 1 or self.algorithm.static:
                return plan
            if way != PEEL and not self.natural:
                return self.cut(plan)
        return Plan(DENSE) if self.is_full(state) else Plan(COMPACT)

    def is_full(self, state: State | None) -> bool:
        """Whether of a gradient without a selector so little was zero that the bitmap did not pay."""
        known = self.natural and isinstance(state, S2State) and state.union >= 0
        return known and isinstance(state, S2State) and self.compact(state.union)[2] > self.dense[2]

    def cut(self, plan: Plan) -> Plan:
        """A table for more keys than the dense all-reduce has bytes for: as large as that allows."""
        spare = self.keys.words * 4 // self.itemsize + 2 * self.size
        room = max(0, self.keys.numel - spare) // (plan.rows * self.keys.width)
        return plan._replace(columns=min(plan.columns, max(1, room)))

    def fastest(self, state: State | None) -> str:
        """Of the exact ways the one that takes the least time on the link."""
        link = self.algorithm.link(state, self.size)
        known = isinstance(state, S2State) and state.union >= 0 and state.peak is not None
        if link is None or not known:
            return COMPACT
        assert isinstance(state, S2State)
        found = {COMPACT: self.compact(state.union)}
        expected = self.expected(PEEL, state)
        if expected is not None:
            found[PEEL] = self.trip(self.table(PEEL, expected)).traffic
        if self.natural:
            found[DENSE] = self.dense
        return min(found, key=lambda way: _seconds(found[way], link))

    # ---- cost --------------------------------------------------------------------------------------------------------

    def usual(self, state: S2State) -> Traffic:
        """What a step sends whose union is as large as the last one's, and whose table, if it is peeled, peels."""
        plan = self.plan(state)
        if plan.way == DENSE:
            return self.dense
        return self.compact(state.union) if plan.way == COMPACT else self.trip(plan).traffic

    def cost(self, state: State | None) -> Traffic:
        """Exact for a table that is not peeled, and densely; else the most that can come."""
        plan = self.plan(state)
        if plan.way == DENSE:
            return self.dense
        if plan.way == COMPACT:
            whole, table = self.compact(self.bound), self.unforeseen(state)
            if table is None:
                return whole
            peel = self.peel(table)
            return max(whole[0], peel[0]), max(whole[1], peel[1]), max(whole[2], peel[2])
        return self.trip(plan).traffic if plan.way != PEEL else self.peel(plan)

    def unforeseen(self, state: State | None) -> Plan | None:
        """What an "auto" step may turn to once it has measured the link: with a state from another number of ranks."""
        if self.algorithm.decoder != "auto" or not isinstance(state, S2State) or state.peak is None:
            return None
        expected = None if self.algorithm.link(state, self.size) else self.expected(PEEL, state)
        return None if expected is None else self.table(PEEL, expected)

    def peel(self, plan: Plan) -> Traffic:
        """The most that a table to be peeled costs: all its keys may be left."""
        rest = dense_traffic(self.keys.elements(self.bound), self.itemsize, self.size)
        return plus(self.trip(plan).traffic, rest)


def _seconds(traffic: Traffic, link: Link) -> float:
    return traffic[0] * link.latency + traffic[2] / link.bandwidth
