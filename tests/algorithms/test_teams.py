"""SparDL in teams: the paper's costs, the same sums on all ranks, nothing lost, and an h that adapts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparcomm import wire
from sparcomm.algorithms.dense import Dense
from sparcomm.algorithms.spardl import SparDL, SparDLState, log_schedule
from sparcomm.algorithms.spardl.schedule import Scheme, schemes
from sparcomm.algorithms.spardl.width import moved
from sparcomm.errors import ConfigError
from sparcomm.layout import LAYOUTS, Layout
from sparcomm.seeds import mixed
from sparcomm.transport import sim
from sparcomm.transport.base import Link
from support.sums import integers, normals, owed, simulate, with_residual

TEAMS = [(p, s.teams, s.sag) for p in range(2, 17) for s in schemes(p) if s.teams > 1]


def log2_ceil(x: int) -> int:
    return (x - 1).bit_length()


@pytest.mark.parametrize(("size", "teams", "sag"), TEAMS)
def test_mass_replicas_and_traffic(size: int, teams: int, sag: str) -> None:
    """Three steps of small integers: bit for bit."""
    n, algorithm = 600, SparDL(0.1, teams=teams, sag=sag)
    gradients = [[integers(n, rank, step) for rank in range(size)] for step in range(3)]
    ranks = simulate(algorithm, gradients)
    for step in range(3):
        reduced = [done[step] for done, _, _ in ranks]
        before = [done[step - 1] if step else None for done, _, _ in ranks]
        total = reduced[0].total
        assert all(torch.equal(r.total, total) for r in reduced)
        put_in = sum(with_residual(g, b and b.residual) for g, b in zip(gradients[step], before, strict=True))
        assert torch.equal(put_in, total + sum(owed(r.residual, total) for r in reduced))
        cost = algorithm.cost(n, torch.float32, size, before[0] and before[0].state)
        for _, _, booked in ranks:
            assert (booked[step].rounds, booked[step].messages, booked[step].bytes_sent) == tuple(cost)


@pytest.mark.parametrize(("size", "teams", "sag"), TEAMS)
def test_rounds_and_volumes_are_the_papers(size: int, teams: int, sag: str) -> None:
    """Volumes as entries: every packet's k, headers and codes apart."""
    n, algorithm = 960_000, SparDL(0.01, teams=teams, sag=sag)
    blocks = size // teams
    cost = algorithm.cost(n, torch.float32, size)
    assert cost.rounds == cost.messages == 2 * log2_ceil(blocks) + log2_ceil(teams)
    quota = algorithm.packet(n, blocks).k
    low = max(1, quota // teams)
    meet = log2_ceil(teams) * quota if sag == "r-sag" else (teams - 1) * low
    entries = 2 * (blocks - 1) * quota + meet
    k = algorithm.kept(n, size)
    if sag == "r-sag":
        assert entries * size == k * (2 * (size - teams) + teams * log2_ceil(teams))
    else:
        assert entries * size <= k * (2 * size - teams - 1)
    bits = 8 * (cost.bytes_sent - 4 * wire.HEADER_WORDS * cost.messages)
    assert 32 + 8 < bits / entries < 32 + 9 + log2_ceil(teams)  # lists of h entries are sparser: more bits an index


class Reference:
    """The same with a dense vector for everything: all ranks at once, one step without residuals."""

    def __init__(self, cut: Layout, size: int, scheme: Scheme, quota: int, width: int) -> None:
        self.cut, self.size, self.scheme, self.quota, self.width = cut, size, scheme, quota, width
        local = torch.arange(cut.length)
        self.where = [w[w < cut.numel] for w in (cut.to_global(local, b) for b in range(cut.blocks))]

    def top(self, x: Tensor, b: int, k: int, among: Tensor | None = None) -> Tensor:
        """Global positions of a block's k largest, of those where ``among`` is set, then of the others in order."""
        where = self.where[b]
        key = [(-(x[j].abs().item() if among is None or among[j] else -1.0), i) for i, j in enumerate(where.tolist())]
        return where[torch.tensor([i for _, i in sorted(key)[:k]], dtype=torch.int64)]

    def scatter(self, acc: list[Tensor]) -> None:
        """Spar-Reduce-Scatter in a team; changes ``acc``."""
        blocks = self.cut.blocks
        for gap, count in log_schedule(blocks):
            bags = []
            for r in range(blocks):
                tops = [self.top(acc[r], (r + gap + c) % blocks, self.quota) for c in range(count)]
                bags.append([(top, acc[r][top].clone()) for top in tops])
                for top in tops:
                    acc[r][top] = 0
            for r, bag in enumerate(bags):
                for top, value in bag:
                    acc[(r + gap) % blocks][top] += value

    def reduce(self, put_in: list[Tensor], step: int = 0, unit: int = 0) -> tuple[Tensor, list[Tensor]]:
        acc = [x.clone() for x in put_in]
        blocks, teams = self.cut.blocks, self.scheme.teams
        for t in range(teams):
            self.scatter(acc[t * blocks : (t + 1) * blocks])
        total = torch.zeros_like(put_in[0])
        for b in range(blocks):
            owners = [acc[t * blocks + b] for t in range(teams)]
            quota = self.width if self.scheme.adaptive else self.quota
            held, has = [], []
            for x in owners:
                top = self.top(x, b, quota)
                one, mask = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool)
                one[top], mask[top], x[top] = x[top], True, 0.0
                held.append(one)
                has.append(mask)
            rounds = [teams] if self.scheme.adaptive else [2 << j for j in range(log2_ceil(teams))]
            for copies in rounds:
                for first in range(0, teams, copies):
                    members = [first + i * (copies // 2) for i in range(2)] if len(rounds) > 1 else range(copies)
                    whole, mask = sum(held[t] for t in members), sum(has[t].int() for t in members) > 0
                    top = self.top(whole, b, self.quota, mask)
                    rest = whole.clone()
                    rest[top] = 0
                    owners[first + mixed(step, unit, b, copies) % copies] += rest
                    kept, left = torch.zeros_like(whole), torch.zeros_like(mask)
                    kept[top], left[top] = whole[top], True
                    for t in range(first, first + copies):
                        held[t], has[t] = kept, left
            total += held[0]
            outside = self.where[b][~has[0][self.where[b]]]
            for x, own in zip(acc, put_in, strict=True):
                x[outside] = own[outside]
        return total, acc


@pytest.mark.parametrize(("size", "teams", "sag"), [t for t in TEAMS if t[0] in (2, 4, 6, 8, 9, 12)])
@pytest.mark.parametrize("schedule", ["log"])
def test_equals_the_dense_formulation(size: int, teams: int, sag: str, schedule: str) -> None:
    n, algorithm = 500, SparDL(0.06, teams=teams, sag=sag, schedule=schedule)
    blocks = size // teams
    quota = algorithm.packet(n, blocks).k
    reference = Reference(LAYOUTS["dealt"](n, blocks), size, Scheme(teams, sag), quota, max(1, quota // teams))
    gradients = [[normals(n, r, step) for r in range(size)] for step in range(2)]
    ranks, left = simulate(algorithm, gradients), [torch.zeros(n) for _ in range(size)]
    for step, by_rank in enumerate(gradients):
        total, left = reference.reduce([g + r for g, r in zip(by_rank, left, strict=True)], step)
        for rank, (done, _, _) in enumerate(ranks):
            torch.testing.assert_close(done[step].total, total, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(done[step].residual, left[rank], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", ["bfloat16", "int8"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(("size", "teams", "sag"), [(8, 4, "r-sag"), (6, 3, "b-sag"), (4, 4, "b-sag"), (8, 8, "r-sag")])
def test_what_copies_round_off_is_kept_once(size: int, teams: int, sag: str, values: str, rounding: str) -> None:
    algorithm = SparDL(0.05, teams=teams, sag=sag, values=values, rounding=rounding)
    gradients = [[normals(3000, r, step) for r in range(size)] for step in range(3)]
    ranks = simulate(algorithm, gradients)
    delivered = sum(r.total.double() for r in ranks[0][0])
    left = sum(done[-1].residual.double() for done, _, _ in ranks)
    fed = sum(g.double() for by_rank in gradients for g in by_rank)
    assert (fed - delivered - left).abs().max() < 1e-4
    assert all(torch.equal(a.total, b.total) for done, _, _ in ranks for a, b in zip(done, ranks[0][0], strict=True))


@pytest.mark.parametrize(("size", "teams", "sag"), [t for t in TEAMS if t[0] in (4, 6, 8) and t[1] < t[0]])
def test_a_sum_that_overflows_where_teams_meet_is_known_to_all(size: int, teams: int, sag: str) -> None:
    """Every team's own sum is finite."""
    n, algorithm, share = 400, SparDL(0.05, teams=teams, sag=sag), 3e38 / (size // teams)

    def rank(transport: Any) -> bool:
        grad = normals(n, transport.rank, 1)
        grad[37] = share
        return bool(algorithm.reduce(grad, None, algorithm.init(n, grad.dtype, grad.device, size), 0, transport).ok)

    assert sim.run(size, rank).results == [False] * size


@pytest.mark.parametrize(("size", "teams", "sag"), [(8, 4, "r-sag"), (8, 8, "r-sag"), (6, 3, "b-sag"), (8, 4, "b-sag")])
def test_what_a_keeper_owes_of_its_own_has_not_been_sent(size: int, teams: int, sag: str) -> None:
    n, algorithm = 400, SparDL(0.2, teams=teams, sag=sag)
    for seed in range(6):
        gradients = [[normals(n, r, seed) for r in range(size)]]
        for done, _, _ in simulate(algorithm, gradients):
            assert not done[0].residual[done[0].sent].any()


@pytest.mark.parametrize("teams", [1, 2, 4])
def test_stochastic_rounding_differs_between_steps_and_ranks(teams: int) -> None:
    n = 4000
    algorithm = SparDL(0.1, teams=teams, values="int8", rounding="stochastic")
    same = normals(n, 0, 1)

    def rank(transport: Any) -> list[Tensor]:
        state = algorithm.init(n, same.dtype, same.device, 4)
        return [algorithm.reduce(same, None, state, step, transport).residual for step in range(2)]

    left = sim.run(4, rank).results
    assert not torch.equal(left[0][0], left[0][1])
    assert not any(torch.equal(left[0][0], other[0]) for other in left[1:])


# ---- the width of B-SAG ------------------------------------------------------------------------------------------


@given(
    quota=st.integers(1, 5000), teams=st.integers(2, 16), blocks=st.integers(1, 8),
    unions=st.lists(st.floats(0, 1), min_size=1, max_size=60),
)  # fmt: skip
def test_the_width_stays_within_its_bounds_whatever_unions_are_seen(
    quota: int, teams: int, blocks: int, unions: list[float]
) -> None:
    state = SparDLState()
    for share in unions:
        width, stride, coasting = moved(state, quota, teams, blocks)
        assert max(1, quota // teams) <= width <= quota
        assert stride
        union = max(1, round(share * blocks * width * teams))
        state = dataclasses.replace(state, width=width, stride=stride, coasting=coasting, union=torch.tensor(union))


@pytest.mark.parametrize("quota", [4, 60, 4000])
def test_the_width_finds_the_quota_even_for_small_blocks(quota: int) -> None:
    """Teams that agree on half of their entries: a union of w·(1 + (d-1)/2) entries."""
    teams, state = 4, SparDLState()
    for _ in range(200):
        width, stride, coasting = moved(state, quota, teams, 1)
        union = round(width * (1 + (teams - 1) / 2))
        state = dataclasses.replace(state, width=width, stride=stride, coasting=coasting, union=torch.tensor(union))
    best = quota / (1 + (teams - 1) / 2)
    assert abs(state.width - best) <= max(2, 0.25 * best)


def test_the_width_doubles_its_pace_halves_it_on_the_way_back_and_forgets_it_at_a_bound() -> None:
    state, seen = SparDLState(), []
    for crowded in (False, False, False, False, True, True, False, False, *[True] * 12):
        width, stride, coasting = moved(state, 1000, 4, 2)
        seen.append((width, stride))
        union = torch.tensor(2001 if crowded else 2000)
        state = dataclasses.replace(state, width=width, stride=stride, coasting=coasting, union=union)
        assert moved(dataclasses.replace(state, turn=1), 1000, 4, 2) == (width, stride, coasting)
    assert seen[:9] == [
        (250, 7), (257, 7), (271, 14), (285, 14), (313, 28), (299, -14), (285, -14), (292, 7), (299, 7),
    ]  # fmt: skip
    assert seen[-1] == (250, -1)


def test_the_width_moves_alike_on_all_ranks_and_with_the_teams_agreement() -> None:
    """Equal gradients: unions are no larger than h, which grows to the quota; independent ones: it stays small."""
    size, n, algorithm = 6, 2000, SparDL(0.1, teams=3)
    for same, expect_growth in ((True, True), (False, False)):
        gradients = [[normals(n, 0 if same else r, step) for r in range(size)] for step in range(40)]
        states = [state for _, state, _ in simulate(algorithm, gradients)]
        assert all(isinstance(s, SparDLState) and s.width == states[0].width for s in states)
        quota = algorithm.packet(n, size // 3).k
        assert (states[0].width > 0.5 * quota) == expect_growth


@pytest.mark.parametrize("density", [0.02, 0.3])
def test_however_wide_it_grows_no_step_sends_more_than_the_dense_all_reduce(density: float) -> None:
    """Equal gradients make the width grow to the quota; at the higher density that is too much: dense at once."""
    size, n, algorithm = 8, 4800, SparDL(density, teams=8, sag="b-sag")
    gradients = [[normals(n, 0, step) for _ in range(size)] for step in range(40)]
    dense = Dense().cost(n, torch.float32, size).bytes_sent
    for _, state, booked in simulate(algorithm, gradients):
        assert max(t.bytes_sent for t in booked) <= dense
        assert isinstance(state, SparDLState)
        assert (state.width == 0) == algorithm.delivers_all(n, torch.float32, size) == (density == 0.3)


# ---- which teams ---------------------------------------------------------------------------------------------------


def test_auto_takes_teams_where_rounds_cost_more_than_bytes() -> None:
    size, n = 16, 1_000_000
    near = SparDL(0.01, teams="auto", latency=1e-6, bandwidth=1e6)
    far = SparDL(0.001, teams="auto", latency=0.1, bandwidth=1e9)
    assert near.scheme(n, size).teams == 2  # a round fewer than one team, for the same bytes
    assert far.scheme(n, size).teams == 16
    assert far.cost(n, torch.float32, size).rounds == 4
    assert all(s.sag == "b-sag" for s in [dataclasses.replace(far, sag="b-sag").scheme(n, size)])


class Measured:
    """Counts how often the link is measured."""

    def __init__(self, transport: Any) -> None:
        self._transport, self.count = transport, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def measure(self) -> Link:
        self.count += 1
        return self._transport.measure()


def test_auto_measures_its_link_once_and_remembers_it() -> None:
    algorithm = SparDL(0.01, teams="auto")

    def rank(transport: Any) -> tuple[int, Any, Any]:
        transport = Measured(transport)
        grad = normals(20_000, transport.rank, 1)
        reduced = algorithm.reduce(grad, None, algorithm.init(20_000, grad.dtype, grad.device, 8), 0, transport)
        again = algorithm.reduce(grad, reduced.residual, reduced.state, 1, transport)
        assert transport.count == 1
        return transport.traffic.rounds, reduced.state, again.state

    for link, rounds in ((Link(0.05, 1e9), 2 * 3), (Link(1e-6, 1e5), 2 * 5)):
        for booked, state, again in sim.run(8, rank, link=link).results:
            assert booked == rounds
            assert (state.latency, state.bandwidth) == (link.latency, link.bandwidth)
            assert (again.latency, again.bandwidth) == (link.latency, link.bandwidth)


@pytest.mark.parametrize(("change", "says"), [
    ({"teams": 0}, r"teams=0: must be 'auto' or a number of at least 1"),
    ({"teams": 2.0}, r"teams=2\.0"),
    ({"teams": "many"}, r"teams='many'"),
    ({"teams": True}, r"teams=True"),
    ({"teams": 3, "sag": "r-sag"}, r"teams=3: sag='r-sag' needs a power of two; 'b-sag'"),
    ({"sag": "ring"}, r"sag='ring': must be one of 'auto', 'r-sag', 'b-sag'"),
    ({"latency": 1.0}, r"latency=1\.0: is only looked at with teams='auto'"),
    ({"teams": "auto", "latency": 1.0}, r"give both"),
    ({"teams": "auto", "latency": -1.0, "bandwidth": 1.0}, r"latency=-1\.0: must be a number of at least 0"),
    ({"teams": "auto", "latency": 1.0, "bandwidth": 0.0}, r"bandwidth=0\.0: give both \(above 0"),
])  # fmt: skip
def test_bad_settings_name_the_value_and_the_choices(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SparDL(**change)


@pytest.mark.parametrize("call", ["init", "cost", "check_size"])
def test_teams_that_do_not_divide_the_ranks_are_an_error_that_lists_those_that_do(call: str) -> None:
    algorithm = SparDL(teams=4)
    calls = {
        "init": lambda: algorithm.init(100, torch.float32, torch.device("cpu"), 6),
        "cost": lambda: algorithm.cost(100, torch.float32, 6),
        "check_size": lambda: algorithm.check_size(6),
    }
    with pytest.raises(ConfigError, match=r"teams=4 does not divide 6 ranks: must be one of \[1, 2, 3, 6\], or 'auto'"):
        calls[call]()
