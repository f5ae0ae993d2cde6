"""Bags: a header that nothing wrong gets past."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparcomm import wire
from sparcomm.collectives.bags import Bags, all_finite
from sparcomm.errors import DamagedBag
from sparcomm.kernels import reference

CPU = torch.device("cpu")


def sealed(bags: Bags, words: int = 5) -> torch.Tensor:
    bag = bags.empty(words)
    bag[wire.HEADER_WORDS :] = torch.arange(words, dtype=torch.int32)
    bags.seal(bag)
    return bag


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_what_was_sealed_opens(unit: int, step: int, words: int) -> None:
    bag = sealed(Bags(reference, unit, step, CPU), words)  # type: ignore[arg-type]
    reader = Bags(reference, unit, step, CPU)  # type: ignore[arg-type]
    assert reader.open(bag, 0).tolist() == list(range(words))
    assert reader.ok()


@given(st.integers(0, 9 * 32 - 1))
def test_any_flipped_bit_is_found(bit: int) -> None:
    bag = sealed(Bags(reference, 3, 77, CPU))  # type: ignore[arg-type]
    raw = bag.view(torch.uint8)
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DamagedBag, match="rank 6"):
        Bags(reference, 3, 77, CPU).open(bag, 6)  # type: ignore[arg-type]


@pytest.mark.parametrize(("unit", "step", "says"), [(3, 78, "step 77 instead of 78"), (4, 77, "unit 3 instead of 4")])
def test_a_bag_of_another_time_or_place_is_refused(unit: int, step: int, says: str) -> None:
    bag = sealed(Bags(reference, 3, 77, CPU))  # type: ignore[arg-type]
    with pytest.raises(DamagedBag, match=says):
        Bags(reference, unit, step, CPU).open(bag, 0)  # type: ignore[arg-type]


def test_status_travels_and_adds_up() -> None:
    sick, healthy = (Bags(reference, 0, 0, CPU) for _ in range(2))  # type: ignore[arg-type]
    sick.note_nonfinite(torch.tensor([1.0, float("inf")]))
    healthy.note_nonfinite(torch.tensor([1.0, 3e38]))
    assert healthy.ok()
    assert not sick.ok()
    healthy.open(sealed(sick), 1)
    assert not healthy.ok()
    again = Bags(reference, 0, 0, CPU)  # type: ignore[arg-type]
    again.open(sealed(healthy), 0)
    assert not again.ok()


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_bad_element_anywhere_is_not_finite(dtype: torch.dtype, bad: float) -> None:
    x = torch.full((1003,), torch.finfo(dtype).max, dtype=dtype)
    x[::2] *= -1
    assert all_finite(x)
    assert all_finite(x[:0])
    for at in (0, 1, 500, 1001, 1002):
        y = x.clone()
        y[at] = bad
        assert not all_finite(y)


def test_what_does_not_decode_is_an_error() -> None:
    bags = Bags(reference, 0, 0, CPU)  # type: ignore[arg-type]
    bags.check(0)
    bags.flags |= wire.DAMAGED
    with pytest.raises(DamagedBag, match="rank 2"):
        bags.check(2)
