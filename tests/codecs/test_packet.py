"""Packets: sizes known beforehand, everything read back, whatever the density."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparcomm import wire
from sparcomm.codecs.packet import Packet
from sparcomm.dtypes import WIRE_DTYPES
from sparcomm.kernels import kernels_for


@given(st.data(), st.sampled_from(list(WIRE_DTYPES.values())), st.sampled_from([torch.float32, torch.float64]))
def test_round_trip(data: st.DataObject, width: torch.dtype, dtype: torch.dtype) -> None:
    m = data.draw(st.integers(1, 3000))
    k = data.draw(st.integers(0, m))
    index = torch.randperm(m, generator=torch.Generator().manual_seed(m * k))[:k].sort().values
    value = torch.randn(k, generator=torch.Generator().manual_seed(k), dtype=dtype)
    packet, flags = Packet(k, m, width), torch.zeros(1, dtype=torch.uint8)
    kernels = kernels_for(value)
    out = torch.full((packet.words,), -1, dtype=torch.int32)
    decoded = packet.encode(index, value, out, kernels)
    got_index, got_value = packet.decode(out, dtype, flags, kernels)
    assert torch.equal(got_index, index)
    assert torch.equal(got_value, decoded)
    assert got_value.dtype == dtype
    assert torch.equal(decoded, value.to(width).to(dtype))
    assert not flags.any()


@pytest.mark.parametrize("density", [1e-4, 1e-3, 0.01, 0.1, 0.2])
def test_index_bits_are_near_the_entropy(density: float) -> None:
    m = 1_000_000
    packet = Packet(round(density * m), m, torch.float32)
    entropy = -math.log2(density) - (1 - density) / density * math.log2(1 - density)
    assert packet.index_words * 32 <= (entropy + 0.65) * packet.k + 62  # two parts, each rounded up to a word


@pytest.mark.parametrize(("k", "m"), [(25, 100), (50, 100), (99, 100), (300, 1000), (999, 1000)])
def test_dense_index_sets_take_a_bitmap_at_most(k: int, m: int) -> None:
    assert Packet(k, m, torch.float32).index_words <= wire.bitmap_words(m)


@pytest.mark.parametrize(("k", "m"), [(0, 100), (100, 100), (1, 1)])
def test_no_index_is_sent_where_there_is_no_choice(k: int, m: int) -> None:
    assert Packet(k, m, torch.float16).index_words == 0


@given(st.integers(1, 60), st.data())
def test_damaged_words_stay_in_bounds(k: int, data: st.DataObject) -> None:
    m = data.draw(st.integers(k, 400))
    packet, flags = Packet(k, m, torch.float32), torch.zeros(1, dtype=torch.uint8)
    raw = data.draw(st.binary(min_size=4 * packet.words, max_size=4 * packet.words))
    words = torch.frombuffer(bytearray(raw), dtype=torch.int32)
    index, value = packet.decode(words, torch.float32, flags, kernels_for(words))
    assert len(index) == len(value) == k
    assert ((index >= 0) & (index < m)).all()
    assert flags.any() or (index.diff() > 0).all()
