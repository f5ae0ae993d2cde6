"""SparDL: sparse all-reduce by Spar-Reduce-Scatter, Spar-All-Gather and an all-gather, for any number of ranks.

Source: Zhao et al., "SparDL: Distributed Deep Learning Training with Efficient Sparse Communication", ICDE 2024
(arXiv 2304.00737): Spar-Reduce-Scatter, "optimised": a block is cut to its quota just before it is sent, never earlier;
global residual collection; teams that meet by Spar-All-Gather. The p ranks are d teams of N = p/d; the vector is cut
into N blocks; the rank at position r of a team ends up owning the team's sum of block r, cut to k_b = k/N entries; the
ranks at the same position of all teams add these up and cut the sum; each team gathers all blocks.

Cost: 2·ceil(log2 N) rounds of one message, and log2 d (R-SAG) or ceil(log2 d) (B-SAG) between teams; entries sent by
each rank: k/p · [2(p-d) + d·log2 d] with R-SAG, 2(p-d)·k/p + (d-1)·h with B-SAG, h between k_b/d and k_b. Without teams
that is 2·(p-1)/p·k. ``schedule="direct"`` has one round instead of ceil(log2 N) in the reduce-scatter, with the same
entries. Two teams save a round for the same bytes; more teams save further rounds and send more.

Deviations, each for a reason:
- Blocks are dealt tiles, not contiguous pieces (layout.py): a fixed quota per contiguous block misses most of the mass
  when layers differ in scale. ``layout="contiguous"`` is the paper's.
- All blocks of a round travel in one message, which the paper promises and its code does not do.
- Indices are Elias-Fano or Golomb-Rice coded, values may be narrow, and the rounding error stays in a residual.
- ``schedule="direct"`` sends every block straight to its owner: no drop at intermediate ranks.
- Where the dense all-reduce sends fewer bytes (tiny vectors, densities near 1) it is used instead.
- Sums under way are kept apart from gradient + residual (kernels' ``Working``), which so is the next residual already,
  but for the positions of the final set: the paper's second dense copy is not needed.
- Teams add up in the order of the teams, and what is cut from a sum that several ranks hold goes whole to one
  (teams.py); the h of B-SAG is repaired (width.py).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.algorithms.base import Algorithm, Cost, SparseAlgorithm, State, Summed
from sparcomm.algorithms.spardl.run import Run
from sparcomm.algorithms.spardl.schedule import SAG, Scheme, log_schedule, schemes
from sparcomm.algorithms.spardl.teams import meet_by_gather, meet_recursive
from sparcomm.algorithms.spardl.width import SparDLState, following, moved, no_union
from sparcomm.codecs.packet import INDICES, ROUNDINGS, VALUES, Packet, check_values
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.dense import dense_traffic, log2_ceil
from sparcomm.density import block_quota, check_density
from sparcomm.errors import ConfigError
from sparcomm.layout import LAYOUTS, SHAPES
from sparcomm.selectors import Memo, Selector, make_selector
from sparcomm.transport.base import Link, Transport

__all__ = ["RESIDUALS", "SCHEDULES", "SparDL", "SparDLState", "log_schedule"]

SCHEDULES = ("log", "direct")
RESIDUALS = ("global", "partial", "local")


@dataclass(frozen=True)
class SparDL(SparseAlgorithm):
    """Spar-Reduce-Scatter, Spar-All-Gather and all-gather with global residual collection.

    Args:
        density: k / n, in (0, 1]; every one of the p / teams blocks keeps max(1, round(k·teams/p)) entries.
        teams: d, a divisor of the number of ranks: more teams, fewer rounds and more bytes; or "auto": what takes the
            least time by ``cost()`` at the link's latency and bandwidth.
        sag: how teams meet: "r-sag" (recursive doubling; d a power of two), "b-sag" (Bruck's all-gather, any d), or
            "auto": with a number of teams r-sag where that is possible, with teams="auto" whichever takes less time.
        schedule: "log" (ceil(log2 N) one-message rounds) or "direct" (one all_to_all) in the reduce-scatter.
        layout: "dealt" tiles or the paper's "contiguous" blocks.
        residuals: "global" collects every dropped value; "partial" leaves out what intermediate ranks drop, "local"
            keeps only what was never sent (both lose gradient mass; for comparison, paper's names PRES and LRES).
        values: width of the values sent: "float32", "bfloat16", "float16" or "int8" (blocks of 32 with a shared power
            of two).
        rounding: of narrow values: "nearest", or "stochastic" (bfloat16 and int8).
        indices: "elias-fano" (sizes known beforehand, any backend) or "rice" (Golomb-Rice: some 5 % shorter, of varying
            length, hence not on NCCL).
        selector: what chooses the entries: "topk" or "gaussiank", with options as in "gaussiank(reestimate_every=4)".
        latency: seconds a message takes, for teams="auto"; None = measured in the first step.
        bandwidth: bytes per second of the slowest rank's link, for teams="auto"; None = measured.
    """

    name: ClassVar[str] = "spardl"
    density: float = 0.01
    teams: int | str = 1
    sag: str = field(default="auto", metadata={"choices": SAG})
    schedule: str = field(default="log", metadata={"choices": SCHEDULES})
    layout: str = field(default="dealt", metadata={"choices": tuple(LAYOUTS)})
    residuals: str = field(default="global", metadata={"choices": RESIDUALS})
    values: str = field(default="float32", metadata={"choices": VALUES})
    rounding: str = field(default="nearest", metadata={"choices": ROUNDINGS})
    indices: str = field(default="elias-fano", metadata={"choices": INDICES})
    selector: str | Selector = "topk"
    latency: float | None = None
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        check_density(self.density)
        check_values(self.values, self.rounding, self.indices)
        choices = (("schedule", SCHEDULES), ("layout", tuple(LAYOUTS)), ("residuals", RESIDUALS), ("sag", SAG))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(map(repr, allowed))}")
        object.__setattr__(self, "selector", str(make_selector(self.selector)))  # plain, as configurations compare it
        self._check_teams()

    def _check_teams(self) -> None:
        d: Any = self.teams
        if d != "auto" and (isinstance(d, bool) or not isinstance(d, int) or d < 1):
            raise ConfigError(f"teams={d!r}: must be 'auto' or a number of at least 1 that divides the number of ranks")
        if self.sag == "r-sag" and isinstance(d, int) and d & (d - 1):
            raise ConfigError(f"teams={d}: sag='r-sag' needs a power of two; 'b-sag' takes any number of teams")
        for name in ("latency", "bandwidth"):
            given = getattr(self, name)
            if given is None:
                continue
            if d != "auto":
                raise ConfigError(f"{name}={given!r}: is only looked at with teams='auto'")
            if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given < float("inf"):
                raise ConfigError(f"{name}={given!r}: must be a number of at least 0")
        if (self.latency is None) != (self.bandwidth is None) or self.bandwidth == 0:
            raise ConfigError(
                f"latency={self.latency!r}, bandwidth={self.bandwidth!r}: give both (above 0 bytes/s) or none"
            )

    @property
    def chooser(self) -> Selector:
        """The selector as an object."""
        return make_selector(self.selector)

    @property
    def conserves(self) -> bool:
        """With ``residuals="global"`` only."""
        return self.residuals == "global"

    @property
    def static(self) -> bool:
        """Unless indices are Rice coded. With B-SAG sizes follow the state, which all ranks know."""
        return self.indices != "rice"

    @classmethod
    def cases(cls, size: int) -> list[Algorithm]:
        """Layouts, schedules, value widths, teams, codes and selectors at densities from one element to all."""
        densities = (1e-9, 0.01, 0.1, 0.3, 1.0)
        found = [cls(d, schedule=s, layout=b) for d, s, b in product(densities, SCHEDULES, LAYOUTS)]
        found += [replace(cls(0.1, schedule=s), residuals=r) for s in SCHEDULES for r in RESIDUALS[1:]]
        found += [cls(d, values=v) for d in densities for v in VALUES[1:]]
        found += [cls(0.1, values=v, rounding="stochastic") for v in ("bfloat16", "int8")]
        found += [cls(d, indices="rice", schedule=s) for d in (0.01, 0.1, 1.0) for s in SCHEDULES]
        found += [
            cls(0.1, selector=s) for s in ("gaussiank", "gaussiank(guard=False)", "gaussiank(reestimate_every=2)")
        ]
        for d, sag in schemes(size)[1:]:
            teams = cls(0.1, teams=d, sag=sag)
            found += [teams, *(replace(teams, density=x) for x in (1e-9, 1.0)), replace(teams, values="int8")]
            found += [replace(teams, schedule="direct", values="bfloat16"), replace(teams, indices="rice")]
            found += [replace(teams, residuals="partial"), replace(teams, values="bfloat16", rounding="stochastic")]
        return [*found, cls(0.1, teams="auto", latency=1.0, bandwidth=1e6), cls(0.1, teams="auto")]

    # ---- sizes -------------------------------------------------------------------------------------------------------

    def check_size(self, size: int) -> None:
        """Raises ConfigError unless ``teams`` divides ``size``."""
        if isinstance(self.teams, int) and size % self.teams:
            divisors = [d for d in range(1, size + 1) if size % d == 0]
            raise ConfigError(f"teams={self.teams} does not divide {size} ranks: must be one of {divisors}, or 'auto'")

    def init(self, n: int, dtype: torch.dtype, device: torch.device, size: int) -> SparDLState:
        """A fresh state for gradients of n elements over ``size`` ranks."""
        self.check_size(size)
        state = SparDLState(union=no_union().to(device))
        if self.teams != "auto":
            state.layout = LAYOUTS[self.layout](n, size // self.scheme(n, size).teams, device)
        return state

    def packet(self, n: int, blocks: int, count: int = 1, quota: int | None = None) -> Packet:
        """How a bag of ``count`` of the ``blocks`` blocks of n elements is coded; ``quota`` entries each, or k_b."""
        return _packet(self.density, self.layout, self.values, self.rounding, self.indices, n, blocks, count, quota)

    def scheme(self, n: int, size: int, state: State | None = None) -> Scheme:
        """The teams of a reduce. With teams="auto" and a link that nobody has measured yet: one team."""
        self.check_size(size)
        if isinstance(self.teams, int):
            sag = self.sag
            if sag == "auto":
                sag = "b-sag" if self.teams & (self.teams - 1) else "r-sag"
            return Scheme(self.teams, sag)
        link = self._link(state, size)
        return Scheme(1) if link is None else _fastest(self, n, size, link)

    def _link(self, state: State | None, size: int) -> Link | None:
        if self.latency is not None and self.bandwidth is not None:
            return Link(self.latency, self.bandwidth)
        if isinstance(state, SparDLState) and state.measured == size:
            return Link(state.latency, state.bandwidth)
        return None

    def widest_cost(self, n: int, size: int, scheme: Scheme) -> Cost:
        """With all that B-SAG may come to send: it starts with few entries, as it knows nothing of the teams yet."""
        return self._scheme_cost(n, size, scheme, SparDLState(width=n, turn=1))

    def _usual_bytes(self, n: int, size: int) -> int:
        # With teams="auto" that of one team, however much is known of the link: it decides before anything is measured.
        return self.widest_cost(n, size, Scheme(1) if self.teams == "auto" else self.scheme(n, size)).bytes_sent

    def _sparse_cost(self, n: int, size: int, state: State | None = None) -> Cost:
        return self._scheme_cost(n, size, self.scheme(n, size, state), state)

    def _scheme_cost(self, n: int, size: int, scheme: Scheme, state: State | None) -> Cost:
        blocks = size // scheme.teams
        last = self._bag(n, blocks)
        rounds, messages, scatter = self._scatter_cost(n, blocks)
        gather = (blocks - 1) * (last + (wire.WORD if scheme.adaptive else 0))
        meet = scheme.rounds * last
        if scheme.adaptive:
            known = state if isinstance(state, SparDLState) else None
            width = self._moved(known, n, scheme, blocks)[0]
            meet = (scheme.teams - 1) * self._bag(n, blocks, quota=width)
        more = scheme.rounds + log2_ceil(blocks)
        return Cost(rounds + more, messages + more, scatter + meet + gather)

    def _moved(self, state: SparDLState | None, n: int, scheme: Scheme, blocks: int) -> tuple[int, int, bool]:
        packet = self.packet(n, blocks)
        teams = 1 if packet.k == packet.m else scheme.teams  # at density 1 nothing is cut
        return moved(state, packet.k, teams, blocks)

    def _scatter_cost(self, n: int, blocks: int) -> Cost:
        if self.schedule == "log":
            bags = [self._bag(n, blocks, count) for _, count in log_schedule(blocks)]
            return Cost(len(bags), len(bags), sum(bags))
        others = blocks - 1
        return Cost(min(1, others) if self.static else others, others, others * self._bag(n, blocks))

    def _bag(self, n: int, blocks: int, count: int = 1, quota: int | None = None) -> int:
        return wire.WORD * (wire.HEADER_WORDS + self.packet(n, blocks, count, quota).words)

    def _sparse_kept(self, n: int, size: int) -> int:
        teams = {s.teams for s in schemes(size)} if self.teams == "auto" else {self.teams}
        self.check_size(size)
        blocks = [size // d for d in teams if isinstance(d, int)]
        return max(b * self.packet(n, b).k for b in blocks)

    # ---- the reduce --------------------------------------------------------------------------------------------------

    def _sparse_reduce(
        self, grad: Tensor, residual: Tensor | None, state: State, bags: Bags, transport: Transport
    ) -> Summed:
        if not isinstance(state, SparDLState):
            raise ConfigError(f"state is a {type(state).__name__}, must come from this algorithm's init")
        n, size = grad.numel(), transport.size
        if self.teams == "auto" and size > 1 and self._link(state, size) is None:
            link = transport.measure()
            # In place: the link belongs to no step, and a step that is dropped must not make ranks measure it again.
            state.latency, state.bandwidth, state.measured = link.latency, link.bandwidth, size
        scheme, after = self.scheme(n, size, state), state
        blocks = size // scheme.teams
        cut = state.layout
        if cut is None or (self.teams == "auto" and cut.blocks != blocks):
            cut = state.layout = LAYOUTS[self.layout](n, blocks, grad.device)
        if (cut.numel, cut.blocks) != (n, blocks):
            raise ConfigError(f"state was made for another vector or group: {n} elements over {size} ranks asked for")
        memo = Memo.from_state(state.memo)
        run = Run(self, scheme, grad, residual, state, memo, cut, bags, transport)
        if blocks > 1:
            run.scatter_log() if self.schedule == "log" else run.scatter_direct()
        if scheme.adaptive:
            move = self._moved(state, n, scheme, blocks)
            parts, union = run.gather(meet_by_gather(run, move[0]), ahead=1)
            assert union is not None
            after = following(state, move, union)
        else:
            parts, _ = run.gather(run.pack([run.team.rank]).bag if scheme.teams == 1 else meet_recursive(run))
        final = [part.index for part in parts]
        with state.clock.span("select"):
            run.collect_residuals(final)
            sent = run.sent(final) if state.wants_sent else None
        remembered = memo.state()
        if remembered != state.memo:
            after = dataclasses.replace(after, memo=remembered)
        return Summed(parts, run.out, sent, after)


@functools.lru_cache(maxsize=4096)
def _fastest(algorithm: SparDL, n: int, size: int, link: Link) -> Scheme:
    """What takes the least time on a link, of what sends no more than the dense all-reduce would; few teams first."""
    dense = dense_traffic(n, 4, size)[2]
    found, least = Scheme(1), float("inf")
    for scheme in schemes(size):
        cost = algorithm.widest_cost(n, size, scheme)
        seconds = cost.rounds * link.latency + cost.bytes_sent / link.bandwidth
        possible = scheme.teams == 1 or (algorithm.sag in ("auto", scheme.sag) and cost.bytes_sent <= dense)
        if possible and seconds < least:
            found, least = scheme, seconds
    return found


@functools.lru_cache(maxsize=4096)
def _packet(
    density: float, layout: str, values: str, rounding: str, indices: str, n: int, blocks: int, count: int,
    quota: int | None,
) -> Packet:  # fmt: skip
    """Made once: a step asks for it dozens of times."""
    tile, rounds = SHAPES[layout](n, blocks)
    length = tile * rounds
    quota = block_quota(density, n, blocks, length) if quota is None else quota
    return Packet(count * quota, count * length, values, rounding, indices)
