"""Golomb-Rice codes of indices: the documented bits, as short as such a code can be, and safe on any bytes."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparcomm import wire
from sparcomm.errors import SparcommError
from sparcomm.kernels import cpu
from support.codes import arbitrary_codes, check_any_words, decode, encode, index_sets, sizes
from support.kernels import IMPLEMENTATIONS, increasing

LENGTHS = [
    (k, m) for m in (1, 2, 31, 32, 33, 1000, 5000) for k in sorted({1, 2, 31, 32, 33, m // 100, m // 2, m - 1}) if k < m
]


def rice_by_hand(index: list[int], m: int) -> list[int]:
    """The shortest code as a string of bits, cut into words."""
    if len(index) in (0, m):
        return []
    gaps = [b - a - 1 for a, b in zip([-1, *index], index, strict=False)]
    codes: list[str] = []
    for low in range(m.bit_length()):
        if sum(g >> low for g in gaps) > 1 << 16:
            continue  # far from the shortest
        lows = [format(g % (1 << low), f"0{low}b")[::-1] if low else "" for g in gaps]
        codes.append(format(low, "06b")[::-1] + "".join(lows) + "".join("0" * (g >> low) + "1" for g in gaps))
    bits = min(codes, key=len)  # the first of the shortest
    bits += "0" * (-len(bits) % 32)
    return [int(bits[i : i + 32][::-1], 2) for i in range(0, len(bits), 32)]


@pytest.mark.parametrize(
    ("k", "m"), [*LENGTHS, (0, 9), (9, 9), (1, 1 << 33), (7, 1 << 33), (300, (1 << 33) + 5), (40, 1 << 43)]
)
def test_bit_for_bit_the_documented_code(kernels: Any, k: int, m: int) -> None:
    for index in (increasing(k, m), torch.arange(k), torch.arange(m - k, m)):
        words = encode(kernels, "rice", index, m)
        assert [w & 0xFFFFFFFF for w in words.tolist()] == rice_by_hand(index.tolist(), m)
        decoded, flags = decode(kernels, "rice", words, k, m)
        assert torch.equal(decoded, index)
        assert flags == 0


@given(st.data())
@settings(max_examples=200)
def test_round_trip_of_any_indices(data: st.DataObject) -> None:
    k, m = data.draw(sizes(1 << 50))
    index = data.draw(index_sets(k, m))
    words = [encode(kernels, "rice", index, m) for kernels in IMPLEMENTATIONS.values()]
    assert all(torch.equal(words[0], other) for other in words[1:])
    assert check_any_words("rice", words[0], k, m) == 0
    assert torch.equal(decode(cpu, "rice", words[0], k, m)[0], index)


@given(case=arbitrary_codes(("rice",)))
@settings(max_examples=400)
def test_any_words_are_safe(case: tuple[str, torch.Tensor, int, int]) -> None:
    check_any_words(*case)


@pytest.mark.parametrize("k", [1, 300, 500, 999])
def test_never_longer_than_a_bitmap_and_its_header(kernels: Any, k: int) -> None:
    m = 1000
    assert wire.rice_words(k, m) <= wire.words(m + wire.RICE_HEADER)
    assert encode(kernels, "rice", increasing(k, m), m).numel() <= wire.rice_words(k, m)
    if k >= 500:  # no low bits: bit i of what follows the header is index i
        words = encode(kernels, "rice", torch.arange(m - k, m), m)
        value = sum((w & 0xFFFFFFFF) << 32 * n for n, w in enumerate(words.tolist()))
        assert value == sum(1 << i + wire.RICE_HEADER for i in range(m - k, m))


def test_a_longer_code_of_the_same_indices_is_refused() -> None:
    """One low bit too many: every index can be read, but no encoder writes it so."""
    bits = format(3, "06b")[::-1] + "".join(format(g % 8, "03b")[::-1] for g in (1, 1, 1)) + "111"
    words = torch.tensor([int(bits[::-1], 2)], dtype=torch.int32)
    assert check_any_words("rice", words, 3, 100) == wire.DAMAGED


def test_a_word_too_many_and_an_index_too_large_are_refused() -> None:
    k, m = 40, 1000
    index = torch.arange(k)
    words = encode(cpu, "rice", index, m)
    assert words.numel() < wire.rice_words(k, m)
    assert check_any_words("rice", words, k, m) == 0
    assert check_any_words("rice", torch.cat([words, words.new_zeros(1)]), k, m) == wire.DAMAGED
    index[-1] = m
    words = encode(cpu, "rice", index, m + 1)
    assert words.numel() <= wire.rice_words(k, m)
    assert check_any_words("rice", words, k, m + 1) == 0
    assert check_any_words("rice", words, k, m) == wire.DAMAGED


@pytest.mark.parametrize("density", [1e-4, 1e-3, 0.01, 0.1, 0.2])
def test_within_two_percent_of_the_entropy(density: float) -> None:
    m = 1_000_000
    k = round(density * m)
    out = torch.empty(wire.rice_words(k, m), dtype=torch.int32)
    used = cpu.rice_encode(increasing(k, m), m, out)
    entropy = -math.log2(density) - (1 - density) / density * math.log2(1 - density)
    assert 32 * used <= 1.04 * entropy * k + 64
    assert used <= wire.elias_fano_words(k, m)


def test_no_word_of_ones_takes_long() -> None:
    k, m = 100_000, 10_000_000
    decode(cpu, "rice", torch.zeros(1, dtype=torch.int32), 1, 9)  # compiles
    for fill in (-1, 0, 0x55555555):
        words = torch.full((wire.rice_words(k, m),), fill, dtype=torch.int32)
        start = time.process_time()
        assert decode(cpu, "rice", words, k, m)[1] == wire.DAMAGED
        assert time.process_time() - start < 1


@pytest.mark.parametrize("wrong", [[0, 0], [1, 0], [-1, 3], [3, 100], [(1 << 63) - 1, -(1 << 63)]])
def test_disorder_is_an_error(wrong: list[int]) -> None:
    with pytest.raises(SparcommError, match="strictly increasing, from 0 to below m=100"):
        cpu.rice_encode(torch.tensor(wrong), 100, torch.empty(wire.rice_words(2, 100), dtype=torch.int32))
    with pytest.raises(SparcommError, match="strictly increasing, from 0 to below m=2"):
        cpu.rice_encode(torch.tensor(wrong), 2, torch.empty(0, dtype=torch.int32))


def test_impossible_sizes_are_refused(kernels: Any) -> None:
    flags, words = torch.zeros(1, dtype=torch.uint8), torch.zeros(9, dtype=torch.int32)
    with pytest.raises(SparcommError, match="in 9 words: needs 1"):
        kernels.rice_encode(torch.arange(3), 100, words)
    for k, m in ((101, 100), (1, 1 << 60)):
        with pytest.raises(SparcommError, match=f"k={k} indices below m={m}: needs 0 <= k <= m < 2\\^60"):
            kernels.rice_decode(words, k, m, flags)
