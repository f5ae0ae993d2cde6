"""Bits on the wire: index codes, narrow values, checksum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparcomm import wire
from sparcomm.dtypes import WIRE_DTYPES
from sparcomm.errors import SparcommError
from support.codes import CODES, arbitrary_codes, check_any_words, decode, encode
from support.kernels import IMPLEMENTATIONS, KINDS, WORKING, data, increasing, same

LENGTHS = [
    (k, m) for m in (0, 1, 31, 32, 33, 1000, 5000) for k in sorted({0, 1, 31, 32, 33, m // 100, m // 2, m}) if k <= m
]


def elias_fano_by_hand(index: list[int], m: int) -> list[int]:
    """The code as a string of bits."""
    k, low = len(index), wire.low_bits(len(index), m)
    lows = "".join(format(i % (1 << low), f"0{low}b")[::-1] if low else "" for i in index)
    high = ["0"] * max(0, k + ((m - 1) >> low))
    for n, i in enumerate(index):
        high[(i >> low) + n] = "1"
    words: list[int] = []
    for part in (lows, "".join(high)):
        part += "0" * (-len(part) % 32)
        words += [int(part[i : i + 32][::-1], 2) for i in range(0, len(part), 32)]
    return words


@pytest.mark.parametrize(
    ("k", "m"), [*LENGTHS, (1, 1 << 33), (7, 1 << 33), (300, (1 << 33) + 5), (3, 1 << 45), (40, 1 << 43)]
)
def test_elias_fano_is_bit_for_bit_the_documented_code(kernels: Any, k: int, m: int) -> None:
    picks = [increasing(k, m), torch.arange(k), torch.arange(m - k, m)]
    for index in picks:
        words = encode(kernels, "elias_fano", index, m)
        assert [w & 0xFFFFFFFF for w in words.tolist()] == elias_fano_by_hand(index.tolist(), m)
        decoded, flags = decode(kernels, "elias_fano", words, k, m)
        assert torch.equal(decoded, index)
        assert flags == 0


@pytest.mark.parametrize(("k", "m"), LENGTHS)
def test_bitmap_is_bit_for_bit_the_documented_code(kernels: Any, k: int, m: int) -> None:
    index = increasing(k, m)
    words = encode(kernels, "bitmap", index, m)
    expected = [0] * wire.bitmap_words(m)
    for i in index.tolist():
        expected[i // 32] |= 1 << i % 32
    assert [w & 0xFFFFFFFF for w in words.tolist()] == expected
    decoded, flags = decode(kernels, "bitmap", words, k, m)
    assert torch.equal(decoded, index)
    assert flags == 0


@given(case=arbitrary_codes(tuple(CODES)))
@settings(max_examples=300)
def test_decoders_survive_any_words(case: tuple[str, torch.Tensor, int, int]) -> None:
    check_any_words(*case)


def test_low_bits_that_lead_beyond_the_last_position_are_damage() -> None:
    for m in (100, 999, (1 << 43) - 100):
        words = encode(IMPLEMENTATIONS["cpu"], "elias_fano", torch.tensor([m - 1]), m)
        words[: wire.words(wire.low_bits(1, m))] = -1
        unused = 32 * wire.words(wire.low_bits(1, m)) - wire.low_bits(1, m)
        words[wire.words(wire.low_bits(1, m)) - 1] = (1 << (32 - unused)) - 1
        assert check_any_words("elias_fano", words, 1, m) == wire.DAMAGED


@pytest.mark.parametrize("code", CODES)
def test_every_single_flipped_bit_is_noticed_or_is_another_code(kernels: Any, code: str) -> None:
    k, m = 9, 200
    words = encode(kernels, code, increasing(k, m), m)
    noticed = 0
    for bit in range(32 * words.numel()):
        flipped = words.clone()
        flipped[bit // 32] ^= torch.tensor(1 << bit % 32).to(torch.int32)
        check_any_words(code, flipped, k, m)
        noticed += decode(kernels, code, flipped, k, m)[1]
    assert noticed  # a bitmap with one more or one less bit always is


@pytest.mark.parametrize("code", CODES)
def test_codes_of_impossible_sizes_are_refused(kernels: Any, code: str) -> None:
    flags = torch.zeros(1, dtype=torch.uint8)
    words = torch.zeros(CODES[code](3, 100) + 1, dtype=torch.int32)
    with pytest.raises(SparcommError, match=f"in {words.numel()} words"):
        getattr(kernels, f"{code}_decode")(words, 3, 100, flags)
    with pytest.raises(SparcommError, match=f"in {words.numel()} words"):
        getattr(kernels, f"{code}_encode")(torch.arange(3), 100, words)
    with pytest.raises(SparcommError, match="0 <= k <= m"):
        getattr(kernels, f"{code}_decode")(words[:-1], 101, 100, flags)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES.values())
@pytest.mark.parametrize("dtype", WORKING)
def test_narrow_rounds_like_torch_and_saturates(
    kernels: Any, dtype: torch.dtype, wire_dtype: torch.dtype, kind: str
) -> None:
    for scale in (1e-45, 1e-8, 1e-6, 1e-4, 1.0, 1e4, 1e9, 1e36):
        value = data(kind, 2000, dtype) * scale
        before, out = value.clone(), torch.full((2000,), 99.0, dtype=wire_dtype)
        decoded = kernels.narrow(value, out)
        assert same(value, before)
        plain = value.to(torch.float32).to(wire_dtype)
        limit = torch.finfo(wire_dtype).max
        overflown = value.isfinite() & plain.isinf()
        expected = torch.where(overflown, torch.copysign(torch.tensor(limit, dtype=wire_dtype), plain), plain)
        assert same(out, expected)
        assert same(decoded, out.to(dtype))
        assert same(kernels.widen(out, dtype), decoded)
        out.zero_()
        assert same(decoded, expected.to(dtype)), "decoded values must not live in the message"


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES.values())
def test_narrow_at_the_edges_of_rounding(kernels: Any, wire_dtype: torch.dtype) -> None:
    exact = torch.arange(0, 1 << 15, 7, dtype=torch.int16).view(
        torch.bfloat16 if wire_dtype == torch.bfloat16 else torch.float16
    )
    exact = exact[exact.isfinite()].to(torch.float32)
    ties = (exact[1:].to(torch.float64) + exact[:-1].to(torch.float64)) / 2
    edges = torch.tensor([65503.0, 65504.0, 65519.99, 65520.0, 65536.0, 3.3895e38, 3.4e38, 2**-25, 1.1 * 2**-25])
    for value in (exact, ties.to(torch.float32), edges, -edges, torch.nextafter(ties.to(torch.float32), edges[:1])):
        out = torch.empty(value.shape, dtype=wire_dtype)
        kernels.narrow(value, out)
        limit = torch.finfo(wire_dtype).max
        assert same(out, value.to(wire_dtype).clamp(-limit, limit))


def test_empty_values(kernels: Any) -> None:
    assert kernels.narrow(torch.empty(0), torch.empty(0, dtype=torch.float16)).shape == (0,)


def checksum_by_hand(words: list[int]) -> int:
    total = 0
    for i, word in enumerate(words):
        w = ((0 if i == 3 else word) ^ (i * 0x9E3779B9)) & 0xFFFFFFFF
        w = (w ^ (w >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        w = (w ^ (w >> 15)) * 0x846CA68B & 0xFFFFFFFF
        total += w ^ (w >> 16)
    return total & 0xFFFFFFFF


@pytest.mark.parametrize("size", [4, 5, 8, 33, 1000, 100_003])
def test_checksum_is_the_documented_sum(kernels: Any, size: int) -> None:
    words = torch.randint(-(1 << 31), 1 << 31, (size,), generator=torch.Generator().manual_seed(size)).to(torch.int32)
    result = kernels.checksum(words)
    assert result.dtype == torch.int32
    assert result.shape == ()
    assert result.item() & 0xFFFFFFFF == checksum_by_hand(words.tolist())
    changed = words.clone()
    changed[3] = 12345
    assert kernels.checksum(changed) == result, "the place of the checksum itself must not count"


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(words=st.lists(st.integers(-(1 << 31), (1 << 31) - 1), min_size=4, max_size=40), data=st.data())
@settings(deadline=None, max_examples=100)
def test_checksum_notices_any_changed_word(name: str, words: list[int], data: st.DataObject) -> None:
    kernels = IMPLEMENTATIONS[name]
    at = data.draw(st.integers(0, len(words) - 1).filter(lambda i: i != 3))
    other = data.draw(st.integers(-(1 << 31), (1 << 31) - 1).filter(lambda w: w != words[at]))
    changed = [*words[:at], other, *words[at + 1 :]]
    a, b = (kernels.checksum(torch.tensor(w, dtype=torch.int32)) for w in (words, changed))
    assert a != b
