"""Gaussian-k: the published rule to the letter, and what the guard makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparcomm.bench.distributions import known
from sparcomm.kernels import cpu
from sparcomm.layout import dealt, whole
from sparcomm.selectors import Memo
from sparcomm.selectors.gaussiank import SAMPLES, GaussianK
from sparcomm.selectors.topk import TopK

N = 100_000
PUBLISHED = GaussianK(guard=False)


def published(u: torch.Tensor, k: int, adjust: int) -> torch.Tensor:
    """The rule as the paper has it, one step at a time: positions."""
    n = u.numel()
    z = torch.special.ndtri(torch.tensor(1 - k / n / 2, dtype=torch.float64))
    threshold = float(u.double().mean() + z * u.double().std(correction=0))
    mask = u.abs() > threshold
    for _ in range(adjust):
        mask = u.abs() > threshold
        if mask.sum() < 2 * k / 3:
            threshold *= 0.5
        elif mask.sum() > 4 * k / 3:
            threshold *= 1.5
        else:
            break
    return mask.nonzero().view(-1)


@pytest.mark.parametrize("adjust", [0, 1, 3, 5])
@pytest.mark.parametrize("density", [1e-3, 1e-2, 0.3])
@pytest.mark.parametrize("name", ["normal", "laplace", "student3", "lognormal", "constant", "spike", "zeros"])
def test_without_the_guard_it_is_the_published_rule(name: str, density: float, adjust: int) -> None:
    x, k = known()[name](20_000, 3), round(density * 20_000)
    found = GaussianK(guard=False, adjust=adjust)(x, k).index
    wanted = published(x, k, adjust)
    # Moments differ in their last bits, and with them the threshold: an element may lie between.
    assert abs(found.numel() - wanted.numel()) <= 1
    assert torch.equal(found, wanted) or len(set(found.tolist()) ^ set(wanted.tolist())) == 1


def test_without_the_guard_exactly_k_are_the_first_above_the_threshold() -> None:
    x = known()["normal"](N, 0)
    over = PUBLISHED(x, 1000).index
    for k, kept in ((300, 300), (1000, 1000), (5000, over.numel())):
        flags, one = torch.zeros(1, dtype=torch.uint8), whole(N)
        index, value = PUBLISHED.start(cpu, x, None, None, one, 1000, flags, Memo()).take(0, k)
        first = over[:kept] if kept <= over.numel() else over
        assert index.numel() == k
        assert set(first.tolist()) <= set(index.tolist())
        assert torch.equal(index[value != 0], first)


@given(
    density=st.sampled_from([1e-4, 1e-3, 1e-2, 1e-1, 0.5, 1.0]),
    name=st.sampled_from(sorted(known())),
    every=st.sampled_from([1, 4]),
    seed=st.integers(0, 50),
)
def test_the_guard_keeps_the_count(density: float, name: str, every: int, seed: int) -> None:
    selector, memo, k = GaussianK(reestimate_every=every), Memo(), round(density * N)
    for step in range(3):
        found = selector(known()[name](N, seed + step), k, memo).index.numel()
        assert 2 * k <= 3 * found <= 4 * k


@pytest.mark.parametrize("name", ["constant", "zeros"])
def test_where_nothing_stands_out_the_first_k_are_picked(name: str) -> None:
    assert torch.equal(GaussianK()(known()[name](N, 0), 100).index, torch.arange(100))


def test_few_non_zeros_are_picked_with_zeros() -> None:
    x = torch.zeros(N)
    x[torch.tensor([5, 77_777, 99_999])] = torch.tensor([1.0, -2.0, 3.0])
    assert GaussianK()(x, 10).index.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 77_777, 99_999]
    assert GaussianK()(x, 3).index.tolist() == [5, 77_777, 99_999]


def test_a_normal_vector_is_cut_at_the_threshold() -> None:
    x = known()["normal"](N, 0)
    found = GaussianK()(x, 1000).index
    assert found.numel() != 1000  # by luck alone
    assert not torch.equal(found, TopK()(x, 1000).index)


class Watched:
    """The CPU kernels, noting what is called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return getattr(cpu, name)


def pick(selector: GaussianK, x: torch.Tensor, k: int, memo: Memo) -> tuple[list[str], int]:
    """What was called to pick k, and how many were."""
    kernels: Any = Watched()
    choice = selector.start(kernels, x, None, None, whole(x.numel()), k, torch.zeros(1, dtype=torch.uint8), memo)
    return kernels.calls, choice.pick(0, k)[0].numel()


def test_a_threshold_is_used_as_often_as_it_may_be() -> None:
    selector, memo, draw = GaussianK(reestimate_every=3), Memo(), known()["normal"]
    sampled = ["sample" in pick(selector, draw(N, seed), 1000, memo)[0] for seed in range(7)]
    assert sampled == [True, False, False, True, False, False, True]


def test_a_miss_gives_the_exact_threshold_at_once() -> None:
    selector, memo, draw = GaussianK(adjust=0, reestimate_every=10), Memo(), known()["laplace"]
    calls, found = pick(selector, draw(N, 0), 100, memo)
    assert (calls[-1], found) == ("select", 100)
    calls, found = pick(selector, draw(N, 0), 100, memo)
    assert "sample" not in calls
    assert (calls[-1], found) == ("above", 100)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_a_floor_that_is_off_is_found_anew_in_the_next_step(factor: float) -> None:
    selector, memo, x = GaussianK(reestimate_every=100), Memo(), known()["normal"](N, 0)
    pick(selector, x, 1000, memo)
    calls, found = pick(selector, factor * x, 1000, memo)
    assert "sample" not in calls
    assert found == 1000
    calls, _ = pick(selector, factor * x, 1000, memo)
    assert "sample" in calls


def test_another_size_is_another_threshold() -> None:
    selector, memo, x = GaussianK(reestimate_every=100), Memo(), known()["normal"](N, 0)
    for k, n in ((1000, N), (999, N), (999, N - 1)):
        assert "sample" in pick(selector, x[:n], k, memo)[0]
        assert "sample" not in pick(selector, x[:n], k, memo)[0]


def test_a_memo_goes_through_its_state() -> None:
    selector, memo, draw = GaussianK(reestimate_every=4), Memo(), known()["student3"]
    for seed in range(2):
        selector(draw(N, seed), 500, memo)
    state = memo.state()
    assert all(value is None or isinstance(value, (int, float)) for value in state.values())
    again = Memo.from_state(state)
    for seed in range(2, 9):
        x = draw(N, seed)
        assert torch.equal(selector(x, 500, memo).index, selector(x, 500, again).index)
        assert memo == again


def test_an_unguarded_threshold_is_reused_without_a_look() -> None:
    selector, memo, draw = GaussianK(guard=False, reestimate_every=3), Memo(), known()["normal"]
    first = selector(draw(N, 0), 1000, memo)
    kept = memo.threshold
    assert kept is not None
    for seed in (1, 2):
        x = draw(N, seed)
        assert torch.equal(selector(x, 1000, memo).index, (x.abs().double() > kept).nonzero().view(-1))
    selector(draw(N, 3), 1000, memo)
    assert memo.threshold != kept
    assert abs(first.index.numel() - 1000) < 333


@pytest.mark.parametrize("density", [1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("name", ["normal", "laplace", "student3", "lognormal"])
def test_the_floor_lets_in_what_may_be_picked_and_little_more(name: str, density: float) -> None:
    x, memo, selector = known()[name](1_000_000, 0), Memo(), GaussianK()
    k = round(density * x.numel())
    pick(selector, x, k, memo)
    assert memo.floor is not None
    reached = int((x.abs() >= memo.floor).sum())
    sampled = SAMPLES * density
    assert 4 * k // 3 <= reached <= k * (4 / 3 + 8 * sampled**-0.5 + 14 / sampled)


def test_blocks_share_a_threshold() -> None:
    layout, x, selector = dealt(N, 4), known()["normal"](N, 0), GaussianK(reestimate_every=2)
    memo, k = Memo(), 250
    for _ in range(2):
        choice = selector.start(cpu, x, None, None, layout, k, torch.zeros(1, dtype=torch.uint8), memo)
        counts = [choice.pick(block, k)[0].numel() for block in range(4)]
        assert all(167 <= count <= 333 for count in counts)
        assert len(set(counts)) > 1


def test_where_exactly_k_are_taken_a_guarded_one_is_exact_top_k() -> None:
    assert GaussianK().taking() == TopK() == TopK().taking()
    for reusing in (GaussianK(guard=False), GaussianK(reestimate_every=2)):
        assert reusing.taking() is reusing
