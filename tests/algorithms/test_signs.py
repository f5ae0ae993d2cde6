"""MajorityVote against votes counted by hand; what the sign methods owe: all of the rest, and never more and more."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparcomm
from sparcomm.algorithms import Algorithm
from sparcomm.algorithms.majority_vote import MajorityVote, SignumState
from sparcomm.algorithms.onebit import OneBitAllReduce
from sparcomm.collectives.dense import dense_traffic
from sparcomm.collectives.signs import Cut, scale_of
from sparcomm.errors import ConfigError
from sparcomm.kernels.bits import noise
from sparcomm.kernels.interface_bits import RULES
from sparcomm.seeds import mixed
from sparcomm.transport import sim
from support.sums import integers, normals, simulate

EF_VOTE, EF_MASKED = (
    MajorityVote(scale=True, error_feedback=True),
    MajorityVote(mask=True, scale=True, error_feedback=True),
)


# ---- the vote --------------------------------------------------------------------------------------------------------


def ruled(rule: str, seed: int, n: int) -> list[int]:
    """+1 or -1: what a rule says at every element of the whole vector."""
    words = noise(torch.arange(math.ceil(n / 32)), seed).tolist()
    fixed = {"positive": 1, "negative": -1}.get(rule)
    return [fixed or 1 - 2 * (words[i // 32] >> (i % 32) & 1) for i in range(n)]


def by_hand(algorithm: MajorityVote, gradients: Sequence[Tensor], step: int) -> Tensor:
    """The sum that must come out, one element after the other."""
    n, p = len(gradients[0]), len(gradients)
    chunk = 32 * math.ceil(math.ceil(n / 32) / p)
    total = torch.zeros(n)
    of_zeros, of_ties = ruled(algorithm.zero, mixed(step, 0, 0), n), ruled(algorithm.tie, mixed(step, 0, 1), n)
    for i in range(n):
        values = [float(g[i]) for g in gradients]
        if algorithm.mask:
            votes = [1 if v > 0 else -1 for v in values if v]
        else:
            votes = [(1 if v > 0 else -1) if v else of_zeros[i] for v in values]
        if not votes:
            continue
        verdict = sum(votes) and (1 if sum(votes) > 0 else -1)
        worth = float(p)
        if algorithm.scale:
            start = i // chunk * chunk
            parts = [g[start : start + chunk].abs().double() for g in gradients]
            counts = [max(int(part.count_nonzero()), 1) if algorithm.mask else len(part) for part in parts]
            worth = sum(float(scale_of(part.sum() / count)) for part, count in zip(parts, counts, strict=True))
        total[i] = (verdict or of_ties[i]) * worth
    return total


@st.composite
def ballots(draw: st.DrawFn) -> tuple[MajorityVote, list[Tensor], int]:
    p = draw(st.integers(1, 9))
    n = draw(st.sampled_from(sorted({1, 31, 32, 33, 64, 32 * p - 1, 32 * p, 32 * p + 1})))
    made = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    values = torch.tensor(draw(st.sampled_from([[-1.0, 1.0], [-1.0, 0.0, 1.0], [0.0], [-3.0, -0.0, 0.0, 0.0, 0.5]])))
    gradients = [values[torch.randint(len(values), (n,), generator=made)] for _ in range(p)]
    rules = (draw(st.sampled_from(RULES)) for _ in range(2))
    return MajorityVote(*rules, mask=draw(st.booleans()), scale=draw(st.booleans())), gradients, draw(st.integers(0, 9))


@settings(max_examples=60)
@given(ballots())
def test_the_majority_wins(drawn: tuple[MajorityVote, list[Tensor], int]) -> None:
    algorithm, gradients, step = drawn

    def rank(transport: Any) -> Tensor:
        grad = gradients[transport.rank]
        state = algorithm.init(len(grad), grad.dtype, grad.device, transport.size)
        reduced = algorithm.reduce(grad, None, state, step, transport)
        assert reduced.ok
        assert reduced.residual is None
        return reduced.total

    wanted = by_hand(algorithm, gradients, step)
    for total in sim.run(len(gradients), rank).results:
        assert torch.equal(total, wanted)


@pytest.mark.parametrize("field", ["zero", "tie"])
def test_alternate_is_even_handed_the_same_everywhere_and_changes(field: str) -> None:
    n, steps = 320, 100
    zeros = [torch.zeros(n)] * 4
    tied = [torch.ones(n), -torch.ones(n)] * 2
    ranks = simulate(MajorityVote(), [zeros if field == "zero" else tied] * steps)
    totals = torch.stack([r.total for r in ranks[0][0]])
    assert all(torch.equal(totals, torch.stack([r.total for r in done])) for done, _, _ in ranks)
    assert (totals.abs() == 4).all()
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(totals))
    # Means of `steps` fair coins, and of n: six deviations of each.
    assert totals.mean(0).abs().max() < 4 * 6 / steps**0.5
    assert totals.mean(1).abs().max() < 4 * 6 / n**0.5


def test_zeros_and_ties_are_not_decided_alike() -> None:
    """p = 2, one rank has a gradient and the other none: its vote must count for more than nothing."""
    n, steps = 320, 100
    totals = torch.stack([r.total for r in simulate(MajorityVote(), [[torch.zeros(n), torch.ones(n)]] * steps)[0][0]])
    assert 0.4 < float(totals.mean()) / 2 < 0.6


def test_the_only_rank_with_a_gradient_is_heard_with_a_mask() -> None:
    gradients = [torch.zeros(100) for _ in range(5)]
    gradients[3][7], gradients[3][8] = -2.0, 1.0
    for done, _, _ in simulate(MajorityVote(mask=True), [gradients]):
        wanted = torch.zeros(100)
        wanted[7], wanted[8] = -5.0, 5.0
        assert torch.equal(done[0].total, wanted)


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4, 8, 16])
def test_bytes_are_one_bit_an_element_and_phase(size: int) -> None:
    n = 1_000_000
    words = -(-(n // 32) // size)
    dense = dense_traffic(n, 4, size)[2]
    for mask, scale in itertools.product((False, True), repeat=2):
        sent = MajorityVote(mask=mask, scale=scale).cost(n, torch.float32, size).bytes_sent
        assert sent == 2 * (size - 1) * (16 + 4 * scale + 4 * words * (1 + mask))
        assert dense >= (15 if mask else 30) * sent
    assert OneBitAllReduce().cost(n, torch.bfloat16, size) == MajorityVote(scale=True).cost(n, torch.float32, size)


@given(st.integers(1, 2000), st.integers(1, 13))
def test_chunks_are_whole_words_and_cover_all(n: int, size: int) -> None:
    cut = Cut(n, size, scaled=True, masked=True)
    spans = [cut.elements(rank) for rank in range(size)]
    assert [i for span in spans for i in range(span.start, span.stop)] == list(range(n))
    assert all(span.start in (32 * cut.first(r), n) for r, span in enumerate(spans))
    assert all(cut.used(r) <= cut.words for r in range(size))


# ---- scales ----------------------------------------------------------------------------------------------------------


def test_scales_have_eight_bits_and_are_finite() -> None:
    assert float(scale_of(torch.tensor(1 / 3, dtype=torch.float64))) == 0.333984375
    assert float(scale_of(torch.tensor(0.0, dtype=torch.float64))) == 0.0
    largest = float(scale_of(torch.tensor(1e300, dtype=torch.float64)))
    assert largest == torch.finfo(torch.bfloat16).max
    assert scale_of(torch.tensor(float("nan"))).isnan()


@pytest.mark.parametrize("algorithm", [EF_VOTE, OneBitAllReduce()])
def test_one_rank_is_ef_sign_sgd(algorithm: Algorithm) -> None:
    """p = 1: x - mean|x|·sgn x stays, as published."""
    gradients = [[normals(70, 0, step)] for step in range(3)]
    ((done, _, traffic),) = simulate(algorithm, gradients)
    residual = torch.zeros(70)
    for (grad,), reduced in zip(gradients, done, strict=True):
        x = grad + residual
        total = scale_of(x.abs().double().mean()) * x.sign()
        residual = x - total
        assert torch.equal(reduced.total, total)
        assert torch.equal(reduced.residual, residual)
    assert all(t.bytes_sent == 0 for t in traffic)


def test_both_sides_by_hand() -> None:
    """p = 2, one word each: rank 0 owns the first, and adds what rank 1's signs say to its own exact values."""
    a, b = torch.zeros(64), torch.zeros(64)
    a[:32], b[:32] = 1.0, -2.0
    a[0], b[1], b[32:] = 100.0, 2.0, 1.0
    (first, _, _), (second, _, _) = simulate(OneBitAllReduce(), [[a, b]])
    v = a[:32] + 2.0 * b[:32].sign()
    scale = scale_of(v.abs().double().mean())
    assert torch.equal(first[0].total[:32], scale * v.sign())
    assert torch.equal(first[0].residual[:32], v - scale * v.sign())
    assert torch.equal(second[0].residual[:32], torch.zeros(32))
    assert torch.equal(second[0].total[32:], torch.ones(32))
    assert not first[0].residual[32:].any()


# ---- error feedback --------------------------------------------------------------------------------------------------

N, LONG = 256, 300


def constant(p: int) -> Any:
    fixed = [normals(N, rank, 0) for rank in range(p)]
    return lambda rank, step: fixed[rank]


def noisy(p: int) -> Any:
    return lambda rank, step: normals(N, rank, step) + 0.3 * normals(N, 99, 0)


def unequal(p: int) -> Any:
    """Ranks and layers of very different magnitudes: what one rank has to say exceeds all others together."""
    layers = 10.0 ** (torch.arange(N) * 3 // N)
    fixed = [normals(N, rank, 0) * layers * (10.0 if rank == 1 else 1.0) for rank in range(p)]
    return lambda rank, step: fixed[rank]


def persistent(p: int) -> Any:
    """All ranks but one say up in every step, with the same magnitude; in one chunk the owner is that one."""
    return lambda rank, step: torch.full((N,), -1.0 if rank == 0 else 1.0)


FEEDS = {"constant": constant, "noisy": noisy, "unequal": unequal, "persistent": persistent}
LASTING = [
    *((2, kind, algorithm) for kind in FEEDS for algorithm in (EF_VOTE, OneBitAllReduce())),
    *((4, kind, EF_VOTE) for kind in ("constant", "unequal")),
    (3, "noisy", EF_MASKED),
    (8, "persistent", EF_VOTE),
]


@pytest.mark.parametrize(("size", "kind", "algorithm"), LASTING)
def test_what_is_owed_stays_bounded_and_what_is_delivered_is_the_sum(
    size: int, kind: str, algorithm: Algorithm
) -> None:
    feed, length = FEEDS[kind](size), LONG if size < 8 else 100

    def rank(transport: Any) -> tuple[Tensor, Tensor, Tensor, list[float]]:
        state, residual = algorithm.init(N, torch.float32, torch.device("cpu"), size), None
        fed, got, owed = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64), []
        for step in range(length):
            grad = feed(transport.rank, step)
            reduced = algorithm.reduce(grad, residual, state, step, transport)
            residual, state = reduced.residual, reduced.state
            fed += grad
            got += reduced.total
            owed.append(float(residual.norm()))
        return fed, got, residual.double(), owed

    ranks = sim.run(size, rank).results
    fed, left = (sum(r[i] for r in ranks) for i in (0, 2))
    delivered, largest = ranks[0][1], max(float(feed(r, 0).norm()) for r in range(size))
    assert float((fed - delivered - left).abs().max()) < 1e-5 * length * largest
    assert float((fed - delivered).norm()) / length < 0.1 * largest
    for _, _, _, owed in ranks:  # four times as much, if it grew in every step alike
        assert max(owed[-length // 4 :]) <= 2 * max(owed[: length // 4]), "what is owed grows"


# ---- momentum --------------------------------------------------------------------------------------------------------


def test_signum_is_the_vote_on_momentum_and_a_dropped_step_leaves_it() -> None:
    n, p, beta = 300, 3, 0.9
    algorithm = MajorityVote(momentum=beta)

    def rank(transport: Any) -> list[Tensor]:
        state, totals = algorithm.init(n, torch.float32, torch.device("cpu"), p), []
        moment = torch.zeros(n)
        for step in range(6):
            grad = normals(n, transport.rank, step)
            assert isinstance(state, SignumState)
            assert torch.equal(state.momentum, moment)
            spoilt = grad.clone()
            spoilt[transport.rank] = float("inf")
            dropped = algorithm.reduce(spoilt, None, state, step, transport)
            assert not dropped.ok
            assert torch.equal(state.momentum, moment)
            reduced = algorithm.reduce(grad, None, state, step, transport)
            assert torch.equal(state.momentum, moment), "what was committed has changed"
            moment = moment.lerp(grad, 1 - beta)
            state = reduced.state
            totals.append(reduced.total)
        return totals

    moments = [torch.zeros(n) for _ in range(p)]  # as Adam's first moment in torch.optim
    results = sim.run(p, rank).results
    for step in range(6):
        moments = [m.lerp(normals(n, r, step), 1 - beta) for r, m in enumerate(moments)]
        wanted = p * sum(m.sign() for m in moments).sign()
        assert all(torch.equal(totals[step], wanted) for totals in results)


def test_steady_steps_with_momentum_live_on_two_buffers() -> None:
    def rank(transport: Any) -> set[int]:
        algorithm, seen = MajorityVote(momentum=0.5), set()
        state = algorithm.init(100, torch.float32, torch.device("cpu"), 2)
        for step in range(8):
            state = algorithm.reduce(integers(100, transport.rank, step), None, state, step, transport).state
            assert isinstance(state, SignumState)
            seen.add(state.momentum.data_ptr())
        return seen

    assert all(len(seen) == 2 for seen in sim.run(2, rank).results)


# ---- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"zero": "up"}, r"zero='up': must be one of 'positive', 'negative', 'alternate'"),
        ({"tie": 1}, r"tie=1: must be one of"),
        ({"mask": 1}, r"mask=1: must be True or False"),
        ({"scale": "yes"}, r"scale='yes': must be True or False"),
        ({"error_feedback": True}, r"error_feedback=True needs scale=True"),
        ({"momentum": 1.0}, r"momentum=1.0: must be a number in \[0, 1\)"),
        ({"momentum": float("nan")}, r"momentum=nan"),
        ({"momentum": True}, r"momentum=True"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MajorityVote(**fields)


@pytest.mark.parametrize("fields", [{"zero": "even"}, {"mask": None}])
def test_what_onebit_refuses(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        OneBitAllReduce(**fields)


def test_by_name() -> None:
    made = sparcomm.algorithm_from_config({"name": "majority-vote", "scale": True, "tie": "negative", "momentum": 0.9})
    assert made == sparcomm.MajorityVote(tie="negative", scale=True, momentum=0.9)
    assert sparcomm.algorithm_from_config({"name": "onebit", "mask": True}) == sparcomm.OneBitAllReduce(mask=True)
    assert not MajorityVote(scale=True).conserves
    assert EF_VOTE.conserves
    assert not MajorityVote(scale=True, error_feedback=True, momentum=0.5).conserves
