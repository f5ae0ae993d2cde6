"""Stochastic rounding to bfloat16: to a neighbour, unbiased, and nothing that bfloat16 can hold is ever touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparcomm.errors import SparcommError
from support.kernels import IMPLEMENTATIONS, KINDS, SIZES, data, same

LARGEST = torch.finfo(torch.bfloat16).max


def rounded(kernels: Any, x: Tensor, seed: int) -> Tensor:
    out = torch.full(x.shape, float("nan"), dtype=torch.bfloat16)
    kernels.round_stochastic(x, out, seed)
    return out


def below(x: Tensor) -> Tensor:
    """The neighbour towards zero, x itself if bfloat16 can hold it."""
    return (x.view(torch.int32) & -0x10000).view(torch.float32)


def above(x: Tensor) -> Tensor:
    """The neighbour away from zero, x itself if bfloat16 can hold it, the largest finite value beyond that."""
    bits = x.view(torch.int32)
    up = torch.where(bits & 0xFFFF == 0, bits, (bits & -0x10000) + 0x10000).view(torch.float32)
    return up.clamp(-LARGEST, LARGEST)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_to_one_of_the_two_neighbours(kernels: Any, kind: str, n: int) -> None:
    x = data(kind, n, torch.float32)
    before, finite = x.clone(), x.isfinite()
    for seed in (0, 1, 0xFFFFFFFF):
        got = rounded(kernels, x, seed)
        exact = got.to(torch.float32)
        assert same(x, before)
        assert same(got[~finite], x[~finite].to(torch.bfloat16))
        assert torch.equal(exact.signbit()[finite], x.signbit()[finite])
        low, high = below(x), above(x)
        assert bool(((exact == low) | (exact == high))[finite].all())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(bits=st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=100), seed=st.integers(0, (1 << 32) - 1))
@settings(max_examples=100)
def test_arbitrary_bits(name: str, bits: list[int], seed: int) -> None:
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    got = rounded(IMPLEMENTATIONS[name], x, seed)
    finite = x.isfinite()
    assert torch.equal(got.isfinite(), finite)
    assert same(got[~finite], x[~finite].to(torch.bfloat16))
    exact = got.to(torch.float32)
    assert bool(((exact == below(x)) | (exact == above(x)))[finite].all())
    assert same(got, rounded(IMPLEMENTATIONS["reference"], x, seed))


def test_every_bfloat16_value_stays_as_it_is(kernels: Any) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)
    for seed in range(4):
        assert same(rounded(kernels, every.to(torch.float32), seed), every)


def test_finite_values_never_become_infinite(kernels: Any) -> None:
    x = torch.tensor([torch.finfo(torch.float32).max, LARGEST]).repeat(1000)
    x = torch.cat([x, -x])
    assert torch.equal(rounded(kernels, x, 3).to(torch.float32), torch.where(x > 0, LARGEST, -LARGEST))


@pytest.mark.parametrize("value", [1.001, -3.7e-3, 1.9e-39, 255.3])
def test_unbiased_over_positions(kernels: Any, value: float) -> None:
    n = 1 << 20
    x = torch.full((n,), value)
    unit = float((above(x) - below(x))[0].abs())
    mean = rounded(kernels, x, 11).to(torch.float64).mean().item()
    # A fair choice between two values ``unit`` apart deviates by at most unit / 2; five standard errors.
    assert abs(mean - x[0].item()) < 5 * unit / 2 / n**0.5


def test_unbiased_and_independent_over_seeds() -> None:
    kernels = IMPLEMENTATIONS["cpu"]
    n, seeds = 2000, 2000
    x = data("normal", n, torch.float32)
    unit = (above(x) - below(x)).abs().to(torch.float64)
    mean = torch.zeros(n, dtype=torch.float64)
    previous, together = torch.zeros(n, dtype=torch.float64), 0.0
    for seed in range(seeds):  # neighbours, as steps would be if nobody hashed them
        error = (rounded(kernels, x, seed).to(torch.float64) - x) / unit
        mean += error / seeds
        together += float((error * previous).mean()) / seeds
        previous = error
    assert float(mean.abs().max()) < 5.5 * 0.5 / seeds**0.5
    assert float(mean.square().mean()) ** 0.5 < 0.5 / seeds**0.5
    assert abs(together) < 5 * 0.25 / (n * seeds) ** 0.5


def test_the_seed_and_the_position_decide(kernels: Any) -> None:
    x = data("normal", 3000, torch.float32)
    first = rounded(kernels, x, 5)
    assert same(rounded(kernels, x, 5), first)
    assert same(rounded(kernels, x[:700], 5), first[:700])
    # With the discarded part f uniform in [0, 1), two independent roundings differ with probability 2 E[f(1-f)] = 1/3.
    assert 850 < int((rounded(kernels, x, 6) != first).sum()) < 1150
    assert int((rounded(kernels, torch.full((3000,), 1.001), 5) == 1.0).sum()) not in (0, 3000)


def test_other_dtypes_and_shapes_are_refused(kernels: Any) -> None:
    x, out = torch.ones(4), torch.empty(4, dtype=torch.bfloat16)
    for wrong in ((x.double(), out), (x, out.to(torch.float16)), (x[:3], out)):
        with pytest.raises(SparcommError, match="must be float32 to bfloat16, of one shape"):
            kernels.round_stochastic(*wrong, 0)
