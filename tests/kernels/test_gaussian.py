"""Gaussian-k's thresholds, against the loop by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sparcomm.errors import SparcommError
from support.kernels import WORKING, data, thinned


def by_hand(x: torch.Tensor, z: float, wanted: float, doubt: float, times: int) -> list[float]:
    values = [float(v) for v in x.tolist()]
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    threshold = counted = mean + z * deviation
    for _ in range(times):
        counted, found = threshold, sum(abs(v) > threshold for v in values)
        if found < 2 / 3 * wanted - doubt:
            threshold *= 0.5
        elif found > 4 / 3 * wanted + doubt:
            threshold *= 1.5
        else:
            break
    return [counted, threshold]


@pytest.mark.parametrize("n", [1, 31, 33, 5000, 17_001])
@pytest.mark.parametrize("dtype", WORKING)
def test_thresholds_are_those_of_the_rule(kernels: Any, dtype: torch.dtype, n: int) -> None:
    for kind in ("normal", "spread"):
        x = data(kind, n, dtype) + 0.25
        cases = [
            (z, share, doubt, times)
            for z, share in ((2.5, 0.01), (0.1, 0.01), (6.0, 0.2))  # right, too many, too few
            for doubt, times in ((0.0, 3), (0.0, 0), (0.1 * share * n, 1), (2.0 * n, 5))
        ]
        for z, share, doubt, times in thinned(kernels, cases, 5, (dtype, n, kind)):
            got = kernels.gaussian(x, z, share * n, doubt, times)
            assert (got.dtype, got.shape) == (torch.float64, (2,))
            assert got.tolist() == pytest.approx(by_hand(x, z, share * n, doubt, times), rel=1e-9, abs=1e-12)
            assert torch.equal(got, kernels.gaussian(x, z, share * n, doubt, times))


def test_what_all_share_does_not_drown_what_they_differ_in(kernels: Any) -> None:
    x = 1e8 + data("normal", 4000, torch.float64)
    counted, _ = kernels.gaussian(x, 1.0, 4000, 0.0, 0).tolist()
    assert counted == pytest.approx(float(x.mean() + x.std(correction=0)), abs=1e-5)
    assert kernels.gaussian(torch.full((4000,), 0.1), 3.0, 1, 0.0, 0)[0].item() == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_thresholds_of_what_is_not_finite_are_not_finite(kernels: Any, bad: float) -> None:
    for n in (100, 17_000):
        x = data("normal", n, torch.float32)
        x[n // 2] = bad
        assert not kernels.gaussian(x, 1.0, 10, 0.0, 3).isfinite().any()


@pytest.mark.parametrize("x", [torch.empty(0), torch.ones(4, 2), torch.ones(8)[::2], torch.ones(4).half()])
def test_vectors_that_have_no_moments(kernels: Any, x: torch.Tensor) -> None:
    with pytest.raises(SparcommError, match="moments of"):
        kernels.gaussian(x, 1.0, 1, 0.0, 3)
