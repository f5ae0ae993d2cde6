"""Packets: sizes known or bounded beforehand, everything read back, whatever the density, and no bytes do harm."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparcomm import wire
from sparcomm.codecs.packet import INDICES, ROUNDINGS, VALUES, Packet, check_values
from sparcomm.dtypes import WIRE_DTYPES
from sparcomm.errors import ConfigError, SparcommError
from support.codes import disturbed, index_sets, sizes, words_of
from support.kernels import IMPLEMENTATIONS, WORKING, increasing, same

KINDS = [
    (values, rounding, indices)
    for values, rounding, indices in itertools.product(VALUES, ROUNDINGS, INDICES)
    if rounding == "nearest" or values in ("bfloat16", "int8")
]
CPU = IMPLEMENTATIONS["cpu"]


@st.composite
def packets(draw: st.DrawFn) -> tuple[Packet, Tensor, Tensor]:
    """A packet with an index set and values that fit it."""
    k, m = draw(sizes(1 << 20))
    index = draw(index_sets(k, m))
    dtype = draw(st.sampled_from(WORKING))
    value = torch.randn(k, generator=torch.Generator().manual_seed(k * m), dtype=dtype)
    if draw(st.booleans()):
        value = value * torch.logspace(-44, 38, k, dtype=torch.float64).to(dtype)
    return Packet(k, m, *draw(st.sampled_from(KINDS))), index, value


def encoded(packet: Packet, index: Tensor, value: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(words that were written, decoded values), the same from every implementation."""
    answers: list[tuple[Tensor, Tensor]] = []
    for kernels in IMPLEMENTATIONS.values():
        out = torch.full((packet.words,), -1, dtype=torch.int32)
        decoded, used = packet.encode(index, value, out, kernels, seed)
        assert used == packet.words if packet.static else used <= packet.words
        answers.append((out[:used], decoded))
    assert all(torch.equal(words, answers[0][0]) and same(decoded, answers[0][1]) for words, decoded in answers)
    return answers[0]


@given(packets(), st.integers(0, (1 << 32) - 1))
@settings(max_examples=200)
def test_round_trip(case: tuple[Packet, Tensor, Tensor], seed: int) -> None:
    packet, index, value = case
    words, decoded = encoded(packet, index, value, seed)
    assert decoded.dtype == value.dtype
    for kernels in IMPLEMENTATIONS.values():
        flags = torch.zeros(1, dtype=torch.uint8)
        got_index, got_value = packet.decode(words, value.dtype, flags, kernels)
        assert not flags
        assert torch.equal(got_index, index)
        assert same(got_value, decoded)


@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize("values", WIRE_DTYPES)
def test_values_are_rounded_to_their_width(values: str, indices: str) -> None:
    value = torch.randn(101, generator=torch.Generator().manual_seed(1))
    _, decoded = encoded(Packet(101, 1000, values, indices=indices), increasing(101, 1000), value)
    assert torch.equal(decoded, value.to(WIRE_DTYPES[values]).to(value.dtype))


@pytest.mark.parametrize("values", ["bfloat16", "int8"])
@pytest.mark.parametrize("dtype", WORKING)
def test_stochastic_rounding_is_right_on_average(values: str, dtype: torch.dtype) -> None:
    k, seeds = 320, 400
    value = torch.linspace(0.5, 0.999, k, dtype=dtype)
    packet = Packet(k, 1000, values, "stochastic")
    out = torch.empty(packet.words, dtype=torch.int32)
    errors = torch.stack([packet.encode(torch.arange(k), value, out, CPU, s).value - value for s in range(seeds)])
    unit = 2.0**-8 if values == "bfloat16" else 2.0**-7
    assert float(errors.abs().max()) < unit
    assert float(errors.mean().abs()) < 5 * unit / 2 / (k * seeds) ** 0.5
    assert not torch.equal(errors[0], errors[1])


@pytest.mark.parametrize(
    ("values", "largest"), [("bfloat16", torch.finfo(torch.bfloat16).max), ("int8", 127 * 2.0**121)]
)
def test_stochastic_rounding_of_float64_saturates(values: str, largest: float) -> None:
    value = torch.tensor([1e300, -1e300, float("inf"), float("nan")], dtype=torch.float64)
    _, decoded = encoded(Packet(4, 4, values, "stochastic"), torch.arange(4), value)
    rest = [largest, 0.0] if values == "int8" else [math.inf, math.nan]
    assert same(decoded, torch.tensor([largest, -largest, *rest], dtype=torch.float64))


@pytest.mark.parametrize("density", [1e-4, 1e-3, 0.01, 0.1, 0.2])
def test_index_bits_are_near_the_entropy(density: float) -> None:
    m = 1_000_000
    packet = Packet(round(density * m), m)
    entropy = -math.log2(density) - (1 - density) / density * math.log2(1 - density)
    assert packet.index_words * 32 <= (entropy + 0.65) * packet.k + 62  # two parts, each rounded up to a word


def test_an_int8_entry_at_one_percent_takes_less_than_17_bits() -> None:
    k, m = 31_250, 3_125_000  # a block of 25 million elements over 8 ranks
    assert 32 * Packet(k, m, "int8").words / k < 16.9
    packet = Packet(k, m, "int8", indices="rice")
    out = torch.empty(packet.words, dtype=torch.int32)
    assert 32 * packet.encode(increasing(k, m), torch.ones(k), out, CPU).words / k < 16.4


@pytest.mark.parametrize(("k", "m"), [(25, 100), (50, 100), (99, 100), (300, 1000), (999, 1000)])
def test_dense_index_sets_take_a_bitmap_at_most(k: int, m: int) -> None:
    assert Packet(k, m).index_words <= wire.bitmap_words(m)


@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize(("k", "m"), [(0, 100), (100, 100), (1, 1), (0, 0)])
def test_no_index_is_sent_where_there_is_no_choice(k: int, m: int, indices: str) -> None:
    packet = Packet(k, m, "float16", indices=indices)
    assert packet.index_words == 0
    assert packet.static


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("k", [0, 1, 2, 3, 31, 32, 33, 64, 65])
def test_values_are_padded_with_zeros_to_whole_words(values: str, k: int) -> None:
    packet = Packet(k, k, values)
    words, _ = encoded(packet, torch.arange(k), torch.ones(k))
    width = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}[values]
    size = k * width + (wire.scales(k) if values == "int8" else 0)
    assert packet.words == packet.value_words == -(-size // 4)
    assert not words.view(torch.uint8)[size:].any()
    if values == "int8":
        raw = words.view(torch.uint8)
        assert raw[: wire.scales(k)].tolist() == [128] * wire.scales(k)  # 64 · 2^(128 - 134)
        assert raw[wire.scales(k) : size].tolist() == [64] * k


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[Packet, Tensor, torch.dtype]:
    """A packet and words for it, true ones that were disturbed or any at all; of any number where that may vary."""
    packet, index, value = draw(packets())
    if draw(st.booleans()):
        words = draw(disturbed(encoded(packet, index, value)[0], resized=not packet.static))
    else:
        words = draw(words_of(packet.words if packet.static else draw(st.integers(0, packet.words + 1))))
    return packet, words, value.dtype


@given(arrivals())
@settings(max_examples=400)
def test_any_words_do_no_harm(case: tuple[Packet, Tensor, torch.dtype]) -> None:
    packet, words, dtype = case
    answers: list[tuple[Tensor, Tensor, int]] = []
    for kernels in IMPLEMENTATIONS.values():
        flags, before = torch.zeros(1, dtype=torch.uint8), words.clone()
        answers.append((*packet.decode(words, dtype, flags, kernels), int(flags)))
        assert torch.equal(words, before)
    (index, value, flags), *others = answers
    for other_index, other_value, other_flags in others:
        assert torch.equal(index, other_index)
        assert same(value, other_value)
        assert flags == other_flags
    assert flags in (0, wire.DAMAGED)
    assert index.shape == value.shape == (packet.k,)
    assert value.dtype == dtype
    assert bool((index.diff() > 0).all())
    assert bool(((index >= 0) & (index < packet.m)).all())
    if packet.values == "int8":
        assert bool(value.isfinite().all())


def test_words_that_cannot_be_of_this_packet_are_an_error() -> None:
    flags = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(SparcommError, match="in 9 words: needs 6"):
        Packet(4, 100).decode(torch.zeros(9, dtype=torch.int32), torch.float32, flags, CPU)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"values": "float8"}, r"values='float8': must be one of 'float32', 'bfloat16', 'float16', 'int8'"),
        ({"rounding": "up"}, "rounding='up': must be one of 'nearest', 'stochastic'"),
        ({"indices": "golomb"}, "indices='golomb': must be one of 'elias-fano', 'rice'"),
        (
            {"rounding": "stochastic"},
            "rounding='stochastic' with values='float32': values must be one of 'bfloat16', 'int8'",
        ),
        ({"rounding": "stochastic", "values": "float16"}, "with values='float16'"),
    ],
)
def test_what_does_not_exist_is_refused(given: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_values(**given)
    with pytest.raises(ConfigError, match=says):
        Packet(3, 9, **given)


@pytest.mark.parametrize(("k", "m"), [(-1, 3), (4, 3)])
def test_impossible_sizes_are_refused(k: int, m: int) -> None:
    with pytest.raises(ConfigError, match=f"k={k}: must be from 0 to m={m}"):
        Packet(k, m)
