"""Laws of every selector: what is chosen is in range, distinct, as many as promised, and the right ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparcomm import wire
from sparcomm.dtypes import working_dtype
from sparcomm.errors import GradientError, SparcommError
from sparcomm.kernels import kernels_for
from sparcomm.layout import Layout, contiguous, dealt, whole
from sparcomm.selectors import Memo, Selector, make_selector
from support.kernels import (
    GRADIENTS,
    IMPLEMENTATIONS,
    KINDS,
    WORKING,
    block_of,
    data,
    layouts,
    magnitudes,
    same,
    thinned,
    top,
)

TEXTS = (
    "topk",
    "gaussiank",
    "gaussiank(reestimate_every=3)",
    "gaussiank(adjust=0)",
    "gaussiank(guard=False)",
    "gaussiank(guard=False, reestimate_every=2)",
)
GUARDED = tuple(text for text in TEXTS if "guard" not in text)
LONG = 40_000  # more than are sampled

lengths = st.sampled_from([1, 2, 3, 40, 500, 3000])


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def kernels(request: pytest.FixtureRequest) -> Any:
    return IMPLEMENTATIONS[request.param]


def begin(
    selector: Selector, kernels: Any, x: torch.Tensor, layout: Layout, k: int, memo: Memo | None = None
) -> tuple[Any, torch.Tensor]:
    """The choice of a vector that is only read, and the flags."""
    flags = torch.zeros(1, dtype=torch.uint8)
    return selector.start(kernels, x, None, None, layout, k, flags, Memo() if memo is None else memo), flags


def check(selector: Selector, values: torch.Tensor, k: int, index: torch.Tensor, value: torch.Tensor) -> None:
    """What holds of every pick of k of a block that holds ``values``, padding included."""
    m = values.numel()
    assert index.dtype == torch.int64
    assert value.dtype == values.dtype
    assert index.shape == value.shape
    listed = index.tolist()
    assert listed == sorted(set(listed))
    assert all(0 <= i < m for i in listed)
    assert same(value, values[index])
    assert len(listed) <= selector.most(k, m)
    if selector.fixed:
        assert len(listed) == k
    if selector.most(m, m) == m and getattr(selector, "guard", True):
        assert 3 * len(listed) >= 2 * k


def is_threshold(values: torch.Tensor, index: torch.Tensor) -> bool:
    """Whether nothing that was left out is larger than anything that was picked."""
    left = torch.ones(values.numel(), dtype=torch.bool)
    left[index] = False
    keys = magnitudes(values)
    inside, outside = keys[index.numpy()], keys[left.numpy()]
    return not inside.size or not outside.size or bool(inside.min() >= outside.max())


@pytest.mark.parametrize("text", TEXTS)
@given(
    n=lengths,
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(WORKING),
    name=st.sampled_from(sorted(IMPLEMENTATIONS)),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_picks(text: str, n: int, kind: str, dtype: torch.dtype, name: str, share: float, seed: int) -> None:
    selector, memo, k = make_selector(text), Memo(), round(share * n)
    for step in range(4):
        x = data(kind, n, dtype, seed + step)
        before = x.clone()
        choice, flags = begin(selector, IMPLEMENTATIONS[name], x, whole(n), k, memo)
        index, value = choice.pick(0, k)
        check(selector, x, k, index, value)
        assert is_threshold(x, index)
        if index.numel() == k and getattr(selector, "guard", True):
            assert index.tolist() == top(x, k)
        assert same(x, before)
        assert flags.item() == (0 if x.isfinite().all() else wire.NONFINITE)


@pytest.mark.parametrize("text", GUARDED)
@given(
    n=lengths,
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(WORKING),
    name=st.sampled_from(sorted(IMPLEMENTATIONS)),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_takes_exactly_the_k_largest_of_every_block(
    text: str, n: int, kind: str, dtype: torch.dtype, name: str, share: float, seed: int
) -> None:
    x, selector = data(kind, n, dtype, seed), make_selector(text)
    for layout in layouts(n):
        memo = Memo()
        for _ in range(2):
            k = round(share * layout.length)
            choice, _ = begin(selector, IMPLEMENTATIONS[name], x, layout, k, memo)
            for block in range(layout.blocks):
                values = block_of(x, layout, block)
                index, value = choice.take(block, k)
                assert index.tolist() == top(values, k)
                assert same(value, values[index])


@pytest.mark.parametrize("layout", [whole(LONG), dealt(LONG, 3), contiguous(LONG, 3)], ids=["whole", "dealt", "pieces"])
@pytest.mark.parametrize("kind", ["normal", "zero", "equal", "special", "tiny", "spread"])
@pytest.mark.parametrize("text", TEXTS)
def test_long_vectors_are_estimated_by_a_sample(kernels: Any, text: str, kind: str, layout: Layout) -> None:
    selector, x = make_selector(text), data(kind, LONG, torch.float32)
    where = [layout.to_global(torch.arange(layout.length), b) for b in range(layout.blocks)]
    for density in thinned(kernels, (0.001, 0.05), 2, (text, kind, layout)):
        memo, k = Memo(), max(1, round(density * layout.length))
        for _ in range(3 if "reestimate_every" in text else 2):
            choice, _ = begin(selector, kernels, x, layout, k, memo)
            for block in range(layout.blocks):
                inside = where[block] < LONG
                values = torch.where(inside, x[where[block].clamp(max=LONG - 1)], 0)
                index, value = choice.pick(block, k)
                check(selector, values, k, index, value)
                assert is_threshold(values, index)


@pytest.mark.parametrize("dtype", GRADIENTS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_step_adds_the_residual_and_takes(kernels: Any, text: str, dtype: torch.dtype) -> None:
    n, k, selector, layout = 3000, 11, make_selector(text), dealt(3000, 3)
    working = working_dtype(dtype)
    grad, residual = data("normal", n, dtype), data("spread", n, working, seed=1)
    out, flags = torch.empty(n, dtype=working), torch.zeros(1, dtype=torch.uint8)
    choice = selector.start(kernels, grad, residual, out, layout, k, flags, Memo())
    assert same(out, grad.to(working) + residual)
    extra = torch.tensor([3, 700])
    kernels.merge(choice.work, 1, extra, torch.tensor([1e9, 1e-9], dtype=working))
    for block in range(layout.blocks):
        index, value = choice.take(block, k)
        assert index.numel() == value.numel() == k
        assert (index[1:] > index[:-1]).all()
        assert block != 1 or text not in GUARDED or 3 in index.tolist()
        kernels.deduct(choice.work, block, value)
        kernels.settle(choice.work, block, index)
        left = kernels.gather(out, index, layout, block)
        sent = value != 0  # what fills up is sent as nothing, and stays
        assert not left[sent].any()


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_of_nothing(kernels: Any, text: str) -> None:
    selector = make_selector(text)
    for x, layout in ((torch.empty(0), whole(0)), (torch.ones(9), whole(9)), (torch.ones(9), dealt(9, 3))):
        choice, _ = begin(selector, kernels, x, layout, 0)
        for block in range(layout.blocks):
            assert [t.numel() for t in (choice.pick if block else choice.take)(block, 0)] == [0, 0]
    for x in (torch.empty(0), torch.ones(5)):
        picked = selector(x, 0)
        assert (picked.index.numel(), picked.value.numel(), picked.numel) == (0, 0, x.numel())


@pytest.mark.parametrize("text", TEXTS)
def test_called_by_itself_it_picks_of_any_gradient(text: str) -> None:
    selector = make_selector(text)
    for dtype in GRADIENTS:
        x = data("normal", 3000, dtype)
        picked = selector(x, 100)
        check(selector, x.to(working_dtype(dtype)), 100, picked.index, picked.value)
        assert picked.numel == 3000
        if text in GUARDED:
            assert 67 <= picked.index.numel() <= 133
    assert selector(torch.ones(3), 3).index.numel() in (3, 0)  # without the guard equals are not above their mean


@pytest.mark.parametrize("text", TEXTS)
def test_the_same_again_whatever_else_was_done(text: str) -> None:
    x = data("normal", LONG, torch.float32)
    selector = make_selector(text)
    first = selector(x, 100)
    selector(data("spread", LONG, torch.float32), 7)
    assert torch.equal(first.index, selector(x, 100).index)


@pytest.mark.parametrize("k", [-1, 6])
@pytest.mark.parametrize("text", TEXTS)
def test_more_than_there_are(text: str, k: int) -> None:
    with pytest.raises(SparcommError, match=rf"k={k} must be in \[0, 5\]"):
        make_selector(text)(torch.ones(5), k)


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_no_vector(text: str) -> None:
    selector = make_selector(text)
    for wrong in (torch.ones(2, 2), torch.arange(5), torch.ones(6)[::2]):
        with pytest.raises(GradientError):
            selector(wrong, 1)
    x, flags = torch.ones(5), torch.zeros(1, dtype=torch.uint8)
    for grad, residual in ((x, x), (x.half(), None)):
        with pytest.raises(SparcommError, match="out to sum in"):
            selector.start(kernels_for(x), grad, residual, None, whole(5), 1, flags, Memo())
    with pytest.raises(SparcommError, match="k=-1"):
        selector.start(kernels_for(x), x, None, None, whole(5), -1, flags, Memo())
