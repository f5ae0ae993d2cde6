"""S2Reducer: what is lossless is, what sketches leave behind comes later or does not, and sizes follow the union."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparcomm.algorithms.base import field_kinds, get_field, set_field
from sparcomm.algorithms.dense import Dense
from sparcomm.algorithms.s2 import S2Reducer, S2State
from sparcomm.algorithms.s2.decoders import capacity, unit_exponent
from sparcomm.algorithms.s2.plan import Plan
from sparcomm.errors import ConfigError
from sparcomm.transport import sim
from sparcomm.transport.base import Transport
from support.sums import normals, owed, simulate, with_residual

CPU = torch.device("cpu")


def rows_of(n: int, width: int, rows: list[int], rank: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal values in those rows of ``width``, zeros elsewhere."""
    x = torch.zeros(-(-n // width), width)
    if rows:
        x[rows] = scale * normals(len(rows) * width, rank, seed).view(-1, width)
    return x.view(-1)[:n].clone()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


SUPPORTS = {
    "disjoint": [[0, 3], [1, 7], [2, 12]],
    "overlapping": [[0, 3, 12], [3, 5], [0, 5, 12]],
    "equal": [[1, 2, 12]] * 3,
    "one has nothing": [[], [4, 12], [4]],
    "nobody has anything": [[]] * 3,
    "full": [list(range(13))] * 3,
}


@pytest.mark.parametrize("granularity", [1, 8, 5, 1000])
@pytest.mark.parametrize("support", SUPPORTS.values(), ids=SUPPORTS)
def test_natural_zeros_give_the_bits_of_the_dense_sum(support: list[list[int]], granularity: int) -> None:
    n = 12 * 8 + 3  # the last row is cut off
    gradients = [[rows_of(n, 8, support[r], r, step) for r in range(3)] for step in range(3)]
    dense = simulate(Dense(), gradients)
    link = {"latency": 1e-3, "bandwidth": 1e9}
    for algorithm in (S2Reducer(None, "compact", granularity), S2Reducer(None, "auto", granularity, **link)):
        for (done, *_), (expected, *_) in zip(simulate(algorithm, gradients), dense, strict=True):
            for step, (mine, theirs) in enumerate(zip(done, expected, strict=True)):
                if algorithm.decoder == "compact" or step == 0:  # later ones may peel
                    assert same_bits(mine.total, theirs.total)
                    assert mine.residual is None
                    assert mine.sent is None
                assert torch.allclose(mine.total, theirs.total, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_any_support_gives_the_bits_of_the_dense_sum(data: st.DataObject) -> None:
    size, width, n = (data.draw(st.integers(1, most)) for most in (4, 40, 150))
    rows = [data.draw(st.lists(st.integers(0, (n - 1) // 8), unique=True).map(sorted)) for _ in range(size)]
    gradients = [[rows_of(n, 8, rows[r], r, 1) for r in range(size)]]
    (dense, *_), *_ = simulate(Dense(), gradients)
    ranks = simulate(S2Reducer(None, "compact", width), gradients)
    assert all(same_bits(done[0].total, dense[0].total) for done, *_ in ranks)
    keys = {i // width for r in range(size) for i in gradients[0][r].nonzero().view(-1).tolist()}
    assert [state.union for _, state, _ in ranks] == [len(keys)] * size


def test_negative_zeros_are_zeros() -> None:
    """They make no key, and differ from the dense sum's in their sign only."""
    gradients = [[rows_of(99, 8, [1, 3 + r], r, 1) for r in range(3)]]
    masked = [[x * torch.where(x == 0, -1.0, 1.0) for x in gradients[0]]]
    (dense, *_), *_ = simulate(Dense(), masked)
    assert dense[0].total[0].signbit()
    for (done, state, _), (plain, *_) in zip(
        simulate(S2Reducer(None, "compact", 8), masked), simulate(S2Reducer(None, "compact", 8), gradients), strict=True
    ):
        assert torch.equal(done[0].total, dense[0].total)
        assert same_bits(done[0].total[:8], plain[0].total[:8])
        assert state.union == 4


# ---- peel ------------------------------------------------------------------------------------------------------------


def quantised(x: Tensor, exponent: int) -> Tensor:
    return (x.double() * 2.0**-exponent).round()  # ties to even


def peeled_sums(algorithm: S2Reducer, gradients: list[list[Tensor]]) -> list[list[Any]]:
    """Runs it, and holds that every step that could peel gives the sum of integers, and keeps what rounding left."""
    size, n = len(gradients[0]), gradients[0][0].numel()
    ranks = simulate(algorithm, gradients)
    for step in range(1, len(gradients)):
        before: list[S2State] = [done[step - 1].state for done, *_ in ranks]
        assert all((s.union, s.crest, s.peak) == (before[0].union, before[0].crest, before[0].peak) for s in before)
        assert before[0].peak is not None
        exponent = unit_exponent(before[0].peak, size, torch.float32)
        fed = [with_residual(gradients[step][r], ranks[r][0][step - 1].residual) for r in range(size)]
        assert algorithm.planner(n, torch.float32, size).plan(before[0]).way == "peel"
        integers = [quantised(x, exponent) for x in fed]
        assert all((q.abs() <= capacity(size)).all() for q in integers)
        expected = (sum(integers, torch.zeros(n).double()) * 2.0**exponent).float()
        for (done, *_), x, q in zip(ranks, fed, integers, strict=True):
            assert torch.equal(done[step].total, expected)
            assert torch.equal(owed(done[step].residual, x), x - (q * 2.0**exponent).float())
            assert torch.equal(done[step].sent, (q != 0).nonzero().view(-1))
    return ranks


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("granularity", [1, 16])
def test_peeling_gives_the_sum_of_integers(size: int, granularity: int) -> None:
    rows = [[(7 * r + 5 * i) % 125 for i in range(8)] for r in range(size)]
    gradients = [[rows_of(1995, 16, rows[r], r, step) for r in range(size)] for step in range(4)]
    ranks = peeled_sums(S2Reducer(None, "peel", granularity), gradients)
    rounds = 0 if size == 1 else 1 + (size - 1).bit_length()
    assert ranks[0][2][0].rounds == 2 * rounds, "the first step goes compactly"
    assert rounds in [t.rounds for t in ranks[0][2]][1:], "no step peeled to the end"


@pytest.mark.parametrize("ratio", [0.05, 0.9])
def test_what_does_not_peel_travels_by_itself(ratio: float) -> None:
    size, rows = 3, [list(range(2 * r, 40 + 2 * r)) for r in range(3)]
    gradients = [[rows_of(800, 16, rows[r], r, step) for r in range(size)] for step in range(3)]
    ranks = peeled_sums(S2Reducer(None, "peel", 16, ratio=ratio), gradients)
    assert [t.rounds for t in ranks[0][2]] == [6, 6, 6]


def test_values_that_outgrow_the_integers_are_summed_as_they_are() -> None:
    size, n, rows = 3, 800, [[1, 9], [1, 20], [4, 20]]
    scales = (1.0, 1.0, 1e6, 1e6, 1e3)
    gradients = [[rows_of(n, 16, rows[r], r, step, s) for r in range(size)] for step, s in enumerate(scales)]
    ranks = simulate(S2Reducer(None, "peel", 16), gradients)
    for step, scale in enumerate(scales):
        before = [None if step == 0 else done[step - 1].residual for done, *_ in ranks]
        fed = [with_residual(g, r) for g, r in zip(gradients[step], before, strict=True)]
        total = ranks[0][0][step].total
        assert all(same_bits(done[step].total, total) and bool(done[step].ok) for done, *_ in ranks)
        left = sum(owed(done[step].residual, total).double() for done, *_ in ranks)
        assert torch.allclose(sum(x.double() for x in fed), total.double() + left, rtol=1e-6, atol=1e-6 * scale)
        if step in (0, 2):
            assert torch.equal(total, fed[0] + fed[1] + fed[2])  # bits of the dense sum
            assert not left.any()
    assert [t.rounds for t in ranks[0][2]] == [6, 3, 6, 3, 3]
    peaks = [r.state.peak for r in ranks[0][0]]
    assert peaks[2] - peaks[1] in (19, 20, 21)
    assert peaks[4] == peaks[3] - 1, "falls by one a step"


@pytest.mark.parametrize("feedback", [True, False])
def test_after_one_step_of_huge_values_those_as_before_are_told_apart_again(feedback: bool) -> None:
    """Also where for a step all of them are less than half a unit, and nothing can be sent."""
    size, n = 3, 4000
    scales = (1.0, 1e20, 1.0, 1.0, 1.0)
    gradients = [[rows_of(n, 8, [1, 2 + r], r, step, s) for r in range(size)] for step, s in enumerate(scales)]
    ranks = simulate(S2Reducer(None, "peel", 8, error_feedback=feedback), gradients)
    assert [t.rounds for t in ranks[0][2]] == [6, 6, 3, 3, 3]
    for step in (3, 4):
        before = [owed(done[step - 1].residual, gradients[0][0]) for done, *_ in ranks]
        fed = sum(with_residual(g, r) for g, r in zip(gradients[step], before, strict=True))
        assert torch.allclose(ranks[0][0][step].total, fed, atol=2e-3)


@pytest.mark.parametrize(("size", "dtype"), [(16, torch.float32), (2, torch.float64)])
def test_what_would_round_to_infinity_is_summed_as_it_is(size: int, dtype: torch.dtype) -> None:
    top = torch.finfo(dtype).max
    gradients = [[torch.zeros(4000, dtype=dtype) for _ in range(size)] for _ in range(2)]
    for by_rank in gradients:
        by_rank[0][3], by_rank[1][3], by_rank[1][5] = top, -top / 2, top
    for done, *_ in simulate(S2Reducer(None, "peel"), gradients):
        assert all(bool(r.ok) for r in done)
        assert torch.equal(done[1].total, sum(gradients[1], torch.zeros(4000, dtype=dtype)))
        assert not owed(done[1].residual, done[1].total).any()


def test_keys_of_what_rounding_left_do_not_travel() -> None:
    """Else the union would grow to all rows that were ever used."""
    size, n = 2, 8000
    gradients = [[rows_of(n, 8, [100 * step + 3 * r + i for i in range(20)], r, step) for r in range(2)]
                 for step in range(8)]  # fmt: skip
    ranks = simulate(S2Reducer(None, "peel", 8), gradients)
    assert [r.state.union for r in ranks[0][0]] == [23] * 8
    assert all(ranks[rank][0][-1].residual.count_nonzero() > 20 * 8 for rank in range(size))


# ---- sketches --------------------------------------------------------------------------------------------------------


def test_keys_of_what_rounding_left_wait_while_magnitudes_fall() -> None:
    n, width, size = 4096, 4, 3
    gradients = [
        [rows_of(n, width, [(50 * step + 7 * i + rank) % 1024 for i in range(7)], rank, step, 2.0 ** (-step % 8))
         for rank in range(size)]
        for step in range(16)
    ]  # fmt: skip
    for done, _, _ in simulate(S2Reducer(decoder="peel", granularity=width), gradients):
        assert max(reduced.state.union for reduced in done) <= 7 * size
        assert 0 < float(done[-1].residual.abs().max()) < 1e-5


def fed_constantly(algorithm: S2Reducer, steps: int, marks: tuple[int, ...]) -> tuple[dict[int, float], float]:
    """(norm of the summed residual after the steps ``marks``, relative error of the mean of all totals).

    Every rank has the same gradient in every step. Both are in terms of the norm of the gradients' sum.
    """
    size, width, n = 3, 4, 400
    rows = [[i for i in range(100) if (i + r) % 3] for r in range(size)]
    gradients = [rows_of(n, width, rows[r], r, 1) for r in range(size)]
    whole = sum(gradients, torch.zeros(n)).double()

    def rank(transport: Transport) -> tuple[Tensor, dict[int, Tensor]]:
        state, residual, kept = algorithm.init(n, torch.float32, CPU, size), None, dict[int, Tensor]()
        delivered = torch.zeros(n, dtype=torch.float64)
        for step in range(steps):
            done = algorithm.reduce(gradients[transport.rank], residual, state, step, transport)
            residual, state = done.residual, done.state
            delivered += done.total
            if step + 1 in marks:
                kept[step + 1] = owed(residual, delivered).double().clone()
        return delivered, kept

    ranks = sim.run(size, rank).results
    assert all(torch.equal(r[0], ranks[0][0]) for r in ranks)
    norm = float(whole.norm())
    left = {mark: float(sum(kept[mark] for _, kept in ranks).norm()) / norm for mark in marks}  # type: ignore[union-attr]
    return left, float((ranks[0][0] / steps - whole).norm()) / norm


def test_a_projection_with_new_hashes_delivers_everything_in_the_end() -> None:
    left, error = fed_constantly(S2Reducer(None, "projection", 4, adaptive=False, union=1.0), 250, (50, 250))
    assert left[250] < 1.5 * left[50]
    assert left[250] < 4
    assert error < 0.02


def test_the_published_ways_do_not() -> None:
    """The plain estimate is no contraction on a small table, and what a fixed hash cannot tell apart is never sent."""
    plain = S2Reducer(None, "mean", 4, adaptive=False, union=1.0, ratio=0.5)
    left, _ = fed_constantly(plain, 20, (5, 20))
    assert left[20] > 100 * left[5]
    fixed = S2Reducer(None, "projection", 4, adaptive=False, union=1.0, fixed_seed=42)
    left, error = fed_constantly(fixed, 100, (50, 100))
    assert left[100] == pytest.approx(2 * left[50], rel=0.05)
    assert error > 0.3


def test_medians_of_several_rows_are_better_than_one_row_of_as_many_cells() -> None:
    """On large tables; on small ones they are no better, and never keep what they miss."""
    gradients = [[rows_of(4000, 1, list(range(0, 4000, 4)), r, 1) for r in range(2)]]
    whole = gradients[0][0] + gradients[0][1]
    errors = []
    for rows in (1, 3, 5):
        algorithm = S2Reducer(None, "median", rows=rows, ratio=8.0, adaptive=False, union=0.25)
        ((done, *_), _) = simulate(algorithm, gradients)
        errors.append(float((done[0].total - whole).square().sum() / whole.square().sum()))
    assert errors[0] == pytest.approx(0.125, abs=0.05)
    assert max(errors[1:]) < 0.08


def test_a_singleton_of_a_projection_is_exact() -> None:
    gradients = [[rows_of(64, 8, [3], 0, 1), rows_of(64, 8, [3], 1, 1)]]
    ranks = simulate(S2Reducer(None, "projection", 8, adaptive=False, union=1.0), gradients)
    assert torch.equal(ranks[0][0][0].total, gradients[0][0] + gradients[0][1])
    assert not any(done[0].residual.any() for done, *_ in ranks)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["projection", "mean", "median"])
@pytest.mark.parametrize("density", [0.02, None])
def test_traffic_is_cost_and_the_table_follows_the_union(decoder: str, density: float | None) -> None:
    size, n, width = 4, 16000, 16
    # Five steps in which ranks agree, then five in which they do not.
    rows = [[[(step < 5 or r) * 40 + i for i in range(20)] for r in range(size)] for step in range(10)]
    gradients = [[rows_of(n, width, rows[step][r], r, step) for r in range(size)] for step in range(10)]
    algorithm = S2Reducer(density, decoder, width, error_feedback=False)
    ranks = simulate(algorithm, gradients)
    states = [algorithm.init(n, torch.float32, CPU, size), *(r.state for r in ranks[0][0])]
    for step, state in enumerate(states[:-1]):
        cost, counted = algorithm.cost(n, torch.float32, size, state), ranks[0][2][step]
        if step or density is not None:
            assert (counted.rounds, counted.messages, counted.bytes_sent) == tuple(cost)
        else:
            assert counted.bytes_sent < cost.bytes_sent  # by the union, which nobody knew
    unions = [state.union for state in states[1:]]
    assert unions == [20] * 5 + [80] * 5
    sent = [t.bytes_sent for t in ranks[0][2]]
    assert sent[2] == sent[3] == sent[5] < sent[7] / 3
    assert all([d.state.union for d in done] == unions for done, *_ in ranks)


def test_a_table_for_too_many_keys_is_cut_to_what_the_dense_sum_sends() -> None:
    n, size = 1000, 4
    gradients = [[normals(n, r, step) for r in range(size)] for step in range(3)]
    algorithm = S2Reducer(0.3, "projection", ratio=3.0)
    dense = Dense().cost(n, torch.float32, size).bytes_sent
    sent = [t.bytes_sent for t in simulate(algorithm, gradients)[0][2]]
    assert all(0.9 * dense < b <= dense for b in sent)


def test_near_full_gradients_are_sent_densely_and_only_as_long_as_they_are() -> None:
    n, size = 2000, 3
    gradients = [[normals(n, r, step) for r in range(size)] for step in range(3)]
    gradients += [[rows_of(n, 8, [r, 5], r, step) for r in range(size)] for step in range(3, 6)]
    for decoder in ("compact", "peel"):
        ranks = simulate(S2Reducer(None, decoder), gradients)
        sent = [t.bytes_sent for t in ranks[0][2]]
        dense = Dense().cost(n, torch.float32, size).bytes_sent
        assert sent[1] == sent[2] == sent[3] == dense
        assert all(torch.equal(ranks[0][0][i].total, sum(gradients[i], torch.zeros(n))) for i in range(4))
        assert sent[4] < dense / 8


def test_auto_takes_what_is_faster_on_the_link() -> None:
    n, size = 1 << 20, 8

    def way(latency: float, bandwidth: float, union: int = 2000) -> str:
        auto = S2Reducer(None, "auto", 64, latency=latency, bandwidth=bandwidth)
        state = S2State(union=union, crest=union, peak=0)
        return auto.planner(n, torch.float32, size).plan(state).way

    assert way(1e-6, 1e7) == "compact"  # fewest bytes
    assert way(1e-2, 1e9) == "peel"  # fewest rounds
    assert way(1e-2, 1e9, 16000) == "dense"
    assert way(1e-6, 1e7, 16384) == "dense"
    fresh = S2Reducer(None, "auto", 64).planner(n, torch.float32, size)
    assert fresh.plan(None) == fresh.plan(S2State(union=2000, peak=0)) == Plan("compact")  # no link measured
    measured = S2State(union=2000, crest=2000, peak=0, latency=1e-2, bandwidth=1e9, measured=size)
    assert fresh.plan(measured).way == "peel"


def test_the_bound_covers_what_a_step_turns_to_when_it_has_measured_another_number_of_ranks() -> None:
    algorithm, moved = S2Reducer(None, "auto", 64), S2State(union=2000, crest=2000, peak=0, measured=4)
    there = S2State(union=2000, crest=2000, peak=0, latency=1.0, bandwidth=1e12, measured=8)
    unknown, peels = (algorithm.planner(1 << 20, torch.float32, 8).cost(state) for state in (moved, there))
    assert algorithm.planner(1 << 20, torch.float32, 8).plan(there).way == "peel"
    assert all(most >= spent for most, spent in zip(unknown, peels, strict=True))


def test_a_density_near_one_is_dense_by_sizes_alone() -> None:
    for decoder in ("compact", "peel", "auto", "projection"):
        assert S2Reducer(1.0, decoder).delivers_all(1000, torch.float32, 4)
    assert not S2Reducer(None, "peel").delivers_all(1000, torch.float32, 4)
    assert S2Reducer(None, "compact").delivers_all(1000, torch.float32, 4)


# ---- state and settings ----------------------------------------------------------------------------------------------


def test_a_state_that_was_saved_goes_on_as_if_nothing_had_happened() -> None:
    size, n = 3, 2000
    gradients = [[rows_of(n, 8, [(step + 9 * r) % 250, 7], r, step) for r in range(size)] for step in range(6)]
    for algorithm in (S2Reducer(None, "peel", 8), S2Reducer(0.05, "projection", 8, selector="gaussiank"),
                      S2Reducer(None, "auto", 8)):  # fmt: skip

        def rank(transport: Transport, restart: bool, algorithm: S2Reducer = algorithm) -> list[Tensor]:
            state, residual, totals = algorithm.init(n, torch.float32, CPU, size), None, []
            for step in range(6):
                if restart and step == 3:
                    fresh = algorithm.init(n, torch.float32, CPU, size)
                    for name, kind in field_kinds(state):
                        if kind != "derived":
                            set_field(fresh, name, copy.deepcopy(get_field(state, name)))
                    state = fresh
                done = algorithm.reduce(gradients[step][transport.rank], residual, state, step, transport)
                residual, state = done.residual, done.state
                totals.append(done.total)
            return totals

        straight, resumed = (sim.run(size, lambda t, r=r: rank(t, r)).results for r in (False, True))
        assert all(same_bits(a, b) for x, y in zip(straight, resumed, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(("fields", "message"), [
    ({"decoder": "best"}, "must be one of 'auto', 'compact'"),
    ({"density": 0.0}, "density=0.0"),
    ({"granularity": 0}, "granularity=0: must be a whole number of at least 1"),
    ({"decoder": "peel", "rows": 4}, "with decoder='peel' there is no choice"),
    ({"decoder": "mean", "rows": True}, "rows=True"),
    ({"decoder": "mean", "ratio": 0.0}, "ratio=0.0: must be a finite number above 0"),
    ({"decoder": "compact", "ratio": 1.0}, "has no table"),
    ({"decoder": "median", "rows": 3, "error_feedback": True}, "a median of several rows is not linear"),
    ({"decoder": "mean", "union": 0.1}, "only looked at with adaptive=False"),
    ({"decoder": "mean", "adaptive": False}, "say by union="),
    ({"decoder": "mean", "adaptive": False, "union": 1.5}, "at most 1"),
    ({"decoder": "compact", "adaptive": False}, "leave it out"),
    ({"selector": "gaussiank"}, "chooses nothing without a density"),
    ({"fixed_seed": -1}, "fixed_seed=-1"),
    ({"error_feedback": 1}, "error_feedback=1: must be True or False"),
    ({"decoder": "peel", "latency": 1.0}, "only looked at with decoder='auto'"),
    ({"latency": 1.0}, "give both"),
    ({"latency": math.inf, "bandwidth": 1.0}, "latency=inf"),
])  # fmt: skip
def test_settings_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        S2Reducer(**fields)


def test_what_it_says_of_itself() -> None:
    several = S2Reducer(None, "median", rows=3)
    assert (several.feedback, several.conserves) == (False, False)
    assert S2Reducer(None, "median").conserves
    assert S2Reducer(0.1, "projection", adaptive=False).static
    assert not S2Reducer(0.1, "projection").static
    assert not S2Reducer(0.1, "peel", adaptive=False).static
    assert not S2Reducer(0.1, "peel", error_feedback=False).conserves
    assert S2Reducer(None, "compact", error_feedback=False).conserves
    with pytest.raises(ConfigError, match="must come from this algorithm's init"):
        sim.run(1, lambda t: S2Reducer().reduce(torch.ones(3), None, Dense().init(3, torch.float32, CPU, 1), 0, t))
