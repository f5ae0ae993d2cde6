"""int8 values: scales as documented, exact where they must be, unbiased when asked, finite whatever arrives."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparcomm import wire
from sparcomm.errors import SparcommError
from support.kernels import IMPLEMENTATIONS, KINDS, SIZES, WORKING, data, same

LARGEST = torch.finfo(torch.float32).max
SEEDS = (None, 0, 1, 0xFFFFFFFF)


def quantized(kernels: Any, value: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, code, decoded)."""
    scale = torch.full((wire.scales(value.numel()),), 99, dtype=torch.uint8)
    code = torch.full((value.numel(),), -128, dtype=torch.int8)
    return scale, code, kernels.quantize(value, scale, code, seed)


def by_hand(group: list[float]) -> tuple[int, list[int]]:
    """The scale byte and codes of float32 values, in exact arithmetic."""
    largest = max((abs(v) for v in group if math.isfinite(v)), default=0.0)
    exponent = max(-134, math.frexp(largest)[1] - 1 - 6) if largest else -134
    codes: list[int] = []
    for v in group:
        if math.isfinite(v):
            codes.append(max(-127, min(127, round(Fraction(v) / Fraction(2) ** exponent))))
        else:
            codes.append(0 if math.isnan(v) else int(math.copysign(127, v)))
    return exponent + 134, codes


@pytest.mark.parametrize("n", SIZES[:-1])
@pytest.mark.parametrize("kind", KINDS)
def test_bit_for_bit_the_documented_code(kernels: Any, kind: str, n: int) -> None:
    for factor in (1.0, 1e-44, 1e-38, 1e36):
        value = data(kind, n, torch.float32) * factor
        before = value.clone()
        scale, code, decoded = quantized(kernels, value)
        assert same(value, before)
        for group in range(wire.scales(n)):
            part = slice(wire.GROUP * group, wire.GROUP * (group + 1))
            byte, codes = by_hand(value[part].tolist())
            assert int(scale[group]) == byte
            assert code[part].tolist() == codes
            assert decoded[part].tolist() == [c * 2.0 ** (byte - 134) for c in codes]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", WORKING)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_the_sender_knows(kind: str, dtype: torch.dtype, seed: int | None) -> None:
    value = data(kind, 500, dtype)
    results = [quantized(kernels, value, seed) for kernels in IMPLEMENTATIONS.values()]
    for other in results[1:]:
        assert all(map(same, results[0], other))
    scale, code, decoded = results[0]
    assert decoded.dtype == dtype
    assert bool(decoded.isfinite().all())
    for kernels in IMPLEMENTATIONS.values():
        flags = torch.zeros(1, dtype=torch.uint8)
        assert same(kernels.dequantize(scale, code, dtype, flags), decoded)
        assert not flags
    scale.zero_()
    assert same(results[1][2], decoded), "decoded values must not live in the message"


@given(st.lists(st.integers(-127, 127), max_size=100), st.sampled_from(SEEDS), st.sampled_from(WORKING))
def test_small_integers_are_exact(values: list[int], seed: int | None, dtype: torch.dtype) -> None:
    value = torch.tensor(values, dtype=dtype)
    for kernels in IMPLEMENTATIONS.values():
        assert torch.equal(quantized(kernels, value, seed)[2], value)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
@settings(max_examples=200)
def test_what_is_left_is_exact_and_small(values: list[float]) -> None:
    value = torch.tensor(values, dtype=torch.float32)
    scale, _, decoded = quantized(IMPLEMENTATIONS["cpu"], value)
    left = value - decoded
    for v, d, rest, byte in zip(
        values, decoded.tolist(), left.tolist(), scale.repeat_interleave(32).tolist(), strict=False
    ):
        assert Fraction(v) == Fraction(d) + Fraction(rest)
        assert abs(rest) <= 2.0 ** (byte - 134) * (1 if abs(d) == 127 * 2.0 ** (byte - 134) else 0.5)


@given(
    bits=st.lists(st.integers(-(1 << 31), (1 << 31) - 1), max_size=70),
    seed=st.one_of(st.none(), st.integers(0, (1 << 32) - 1)),
    dtype=st.sampled_from(WORKING),
)
@settings(max_examples=200)
def test_arbitrary_bits(bits: list[int], seed: int | None, dtype: torch.dtype) -> None:
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(dtype)
    results = [quantized(kernels, value, seed) for kernels in IMPLEMENTATIONS.values()]
    for other in results[1:]:
        assert all(map(same, results[0], other))
    scale, code, decoded = results[0]
    assert bool((code >= -127).all())
    assert bool(decoded.isfinite().all())
    finite = value.isfinite()
    worth = 2.0 ** (scale.to(torch.float64) - 134).repeat_interleave(32)[: len(bits)]
    assert bool(((value.to(torch.float64) - decoded).abs() <= worth)[finite].all())


@given(raw=st.binary(max_size=80), dtype=st.sampled_from(WORKING))
@settings(max_examples=200)
def test_any_bytes_are_finite(raw: bytes, dtype: torch.dtype) -> None:
    k = max(k for k in range(len(raw) + 1) if wire.scales(k) + k <= len(raw))
    both = torch.frombuffer(bytearray(raw) or bytearray(1), dtype=torch.uint8)
    scale, code = both[: wire.scales(k)], both[wire.scales(k) : wire.scales(k) + k].view(torch.int8)
    answers = []
    for kernels in IMPLEMENTATIONS.values():
        flags = torch.zeros(1, dtype=torch.uint8)
        answers.append(kernels.dequantize(scale, code, dtype, flags))
        assert int(flags) == wire.DAMAGED * bool((code == -128).any())
    assert all(same(answer, answers[0]) for answer in answers)
    assert answers[0].dtype == dtype
    assert bool(answers[0].isfinite().all())


def test_what_has_no_code(kernels: Any) -> None:
    inf, nan = float("inf"), float("nan")
    scale, code, _ = quantized(kernels, torch.tensor([inf, 3.0, nan, -inf, *[0.0] * 28, nan, -inf]))
    assert code[:4].tolist() == [127, 96, 0, -127]
    assert code[32:].tolist() == [0, -127]
    assert scale.tolist() == [134 + 1 - 6, 0]
    top = torch.tensor([LARGEST, -LARGEST, 1e300, -1e300], dtype=torch.float64)
    scale, code, decoded = quantized(kernels, top)
    assert scale.tolist() == [255]
    assert code.tolist() == [127, -127, 127, -127]
    assert bool((decoded.abs() == 127 * 2.0**121).all())


@pytest.mark.parametrize("value", [0.3, -77.7, 1e-9, -5e-3, 126.9])
def test_unbiased_over_positions(kernels: Any, value: float) -> None:
    n = 1 << 20
    x = torch.full((n,), value)
    x[:: wire.GROUP] = 100.0  # so that a unit is 1, and what is below 0.5 would be lost to rounding
    mean = quantized(kernels, x, 11)[2].view(-1, wire.GROUP)[:, 1:].to(torch.float64).mean()
    error = 0.5 if abs(value) > 0.1 else (abs(value) ** 0.5 + 1e-3)  # of a choice between two neighbours, 1 apart
    assert abs(float(mean) - float(x[1])) < 5 * error / n**0.5


def test_unbiased_and_independent_over_seeds() -> None:
    n, seeds = 2000, 1000
    x = data("normal", n, torch.float32)
    x[:: wire.GROUP] = 100.0
    mean, previous, together = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64), 0.0
    for seed in range(seeds):
        error = quantized(IMPLEMENTATIONS["cpu"], x, seed)[2].to(torch.float64) - x
        mean += error / seeds
        together += float((error * previous).mean()) / seeds
        previous = error
    assert float(mean.abs().max()) < 5.5 * 0.5 / seeds**0.5
    assert abs(together) < 5 * 0.25 / (n * seeds) ** 0.5


def test_the_seed_and_the_position_decide(kernels: Any) -> None:
    x = data("normal", 3200, torch.float32)
    first = quantized(kernels, x, 5)[1]
    assert torch.equal(quantized(kernels, x, 5)[1], first)
    assert torch.equal(quantized(kernels, x[:640], 5)[1], first[:640])
    assert not torch.equal(quantized(kernels, x, 6)[1], first)


def test_what_does_not_fit_is_refused(kernels: Any) -> None:
    value, scale, code = torch.ones(33), torch.empty(2, dtype=torch.uint8), torch.empty(33, dtype=torch.int8)
    flags = torch.zeros(1, dtype=torch.uint8)
    for wrong in (
        (value, scale[:1], code),
        (value, scale, code.view(torch.uint8)),
        (value, scale.view(torch.int8), code),
    ):
        with pytest.raises(SparcommError, match="must be 2 uint8 and one dimension of int8"):
            kernels.quantize(*wrong, None)
    with pytest.raises(SparcommError, match=r"\[33\] codes of \[32\] values"):
        kernels.quantize(value[1:], scale, code, None)
    with pytest.raises(SparcommError, match="must be 2 uint8"):
        kernels.dequantize(scale[:1], code, torch.float32, flags)
