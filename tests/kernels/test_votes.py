"""Signs, votes between them, and what becomes of zeros and ties, element by element."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparcomm import wire
from sparcomm.kernels import bits, cpu
from sparcomm.kernels.interface_bits import RULES, Rule
from support.bitmaps import (
    WIDE,
    WORD,
    as_payloads,
    bitmap_for,
    bits_of,
    in_any_number_of_parts,
    poisoned,
    random_words,
    words_of,
)
from support.kernels import GRADIENTS, IMPLEMENTATIONS, KINDS, WORKING, data, same

SIZES = (0, 1, 31, 32, 33, 63, 64, 65, 300)
VOTERS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 33)


def ruled(rule: Rule, i: int, seed: int, first: int) -> int:
    """What a rule says at element i."""
    if rule != "alternate":
        return int(rule == "negative")
    return int(bits.noise(torch.tensor([first + i // 32]), seed)) >> i % 32 & 1


def packed(kernels: Any, x: Tensor, zero: Rule, seed: int = 3, first: int = WIDE) -> tuple[Tensor, int]:
    """Signs without ``present``, and flags."""
    out, flags = bitmap_for(x.numel()), torch.zeros(1, dtype=torch.uint8)
    kernels.pack_signs(x, zero, seed, first, out, None, flags)
    return out, int(flags)


@pytest.mark.parametrize("zero", RULES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", GRADIENTS)
def test_signs_of_all_numbers(kernels: Any, dtype: torch.dtype, kind: str, zero: Rule) -> None:
    for m in SIZES:
        x = data(kind, m, dtype)
        before = x.clone()
        minus, some = x.signbit().int().tolist(), (x != 0).int().tolist()
        status = 0 if bool(x.isfinite().all()) else wire.NONFINITE
        out, flags = packed(kernels, x, zero)
        expected = [s if some[i] else ruled(zero, i, 3, WIDE) for i, s in enumerate(minus)]
        assert torch.equal(out, words_of(expected))
        assert flags == status
        present, flag = bitmap_for(m), torch.tensor([wire.DAMAGED], dtype=torch.uint8)
        kernels.pack_signs(x, zero, 3, 5, out, present, flag)
        assert torch.equal(out, words_of([a & b for a, b in zip(minus, some, strict=True)]))
        assert torch.equal(present, words_of(some))
        assert int(flag) == status | wire.DAMAGED, "flags are added"
        assert same(x, before)


@pytest.mark.parametrize("dtype", GRADIENTS)
def test_one_zero_or_one_bad_element_anywhere_is_seen(kernels: Any, dtype: torch.dtype) -> None:
    m = 130
    for at in (0, 1, 31, 32, 63, 64, 127, 128, 129):
        for value in (0.0, -0.0, float("inf"), -float("inf"), float("nan"), -torch.finfo(dtype).max):
            x = torch.full((m,), torch.finfo(dtype).tiny, dtype=dtype)
            x[at] = value
            out, flags = packed(kernels, x, "negative")
            negative = value == 0 or bool(x[at].signbit())
            assert [i for i, bit in enumerate(bits_of(out)) if bit] == [at] * negative
            assert flags == (0 if math.isfinite(value) else wire.NONFINITE)


def test_a_nan_has_the_sign_that_its_bits_say(kernels: Any) -> None:
    x = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert bool(x.isnan().all())
    assert bits_of(packed(kernels, x, "positive")[0])[:5] == [0, 1, 0, 1, 0]


def counted(rows: list[list[int]], may: list[list[int]] | None, tie: Rule, seed: int, first: int) -> list[int]:
    """The verdict at every position."""
    found: list[int] = []
    for i, column in enumerate(zip(*rows, strict=True)):
        votes = [v for r, v in enumerate(column) if may is None or may[r][i]]
        yes, no = sum(votes), len(votes) - sum(votes)
        found.append(0 if not votes else ruled(tie, i, seed, first) if yes == no else int(yes > no))
    return found


@pytest.mark.parametrize("tie", RULES)
@pytest.mark.parametrize("count", VOTERS)
def test_the_majority_wins(kernels: Any, count: int, tie: Rule) -> None:
    rows, may = as_payloads(random_words(count, 5)), as_payloads(random_words(count, 5, seed=1))
    may[:, 1] = 0  # nobody votes
    may[1:, 2] = 0  # one
    may[:, 3] &= random_words(count, seed=2)
    rows[:, 4] = rows[:1, 4]  # all agree
    before = rows.clone(), may.clone()
    ballots, allowed = [bits_of(r) for r in rows], [bits_of(r) for r in may]
    out, voted = poisoned(5), poisoned(5)
    kernels.vote(rows, None, tie, 7, WIDE, out, None)
    assert torch.equal(out, words_of(counted(ballots, None, tie, 7, WIDE)))
    kernels.vote(rows, may, tie, 7, WIDE, out, voted)
    assert torch.equal(out, words_of(counted(ballots, allowed, tie, 7, WIDE)))
    assert torch.equal(voted, words_of([int(any(column)) for column in zip(*allowed, strict=True)]))
    assert torch.equal(rows, before[0])
    assert torch.equal(may, before[1])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(drawn=st.data(), count=st.integers(1, 9), tie=st.sampled_from(RULES), seed=st.integers(0, (1 << 32) - 1))
@settings(max_examples=60)
def test_any_votes_are_counted_right(name: str, drawn: st.DataObject, count: int, tie: Rule, seed: int) -> None:
    kernels, size = IMPLEMENTATIONS[name], drawn.draw(st.integers(0, 2))
    words = st.lists(WORD, min_size=count * size, max_size=count * size)
    rows, may = (torch.tensor(drawn.draw(words), dtype=torch.int32).view(count, size) for _ in range(2))
    first = drawn.draw(st.integers(0, 1 << 40))
    ballots, allowed = [bits_of(r) for r in rows], [bits_of(r) for r in may]
    united = words_of([int(any(column)) for column in zip(*allowed, strict=True)])
    place, other = drawn.draw(st.integers(0, count - 1)), drawn.draw(st.integers(0, count - 1))
    copied = rows.clone()
    kernels.vote(copied, None, tie, seed, first, copied[place], None)  # in place of a row
    assert torch.equal(copied[place], words_of(counted(ballots, None, tie, seed, first)))
    kernels.vote(rows, may, tie, seed, first, rows[place], may[other])
    assert torch.equal(rows[place], words_of(counted(ballots, allowed, tie, seed, first)))
    assert torch.equal(may[other], united)


@pytest.mark.parametrize("size", [255, 256, 257, 700])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 300])
def test_long_rows_and_many_voters(count: int, size: int) -> None:
    rows, may = as_payloads(random_words(count, size)), random_words(count, size, seed=1)
    results: list[Tensor] = []
    for k in IMPLEMENTATIONS.values():
        out, verdict, voted = poisoned(size), poisoned(size), poisoned(size)
        k.vote(rows, None, "alternate", 7, (1 << 32) - 3, out, None)
        k.vote(rows, may, "alternate", 7, 5, verdict, voted)
        results.append(torch.stack([out, verdict, voted]))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("may", [None, -1])
@pytest.mark.parametrize("name", [n for n in IMPLEMENTATIONS if n != "reference"])  # which would take minutes
def test_as_many_voters_as_there_may_be(name: str, may: int | None) -> None:
    count = 65535
    rows, out = torch.zeros(count, 1, dtype=torch.int32), poisoned(1)
    rows[: count // 2] = 0b01
    rows[: count // 2 + 1] |= 0b10
    present = None if may is None else torch.full((1, 1), may, dtype=torch.int32).expand(count, 1)
    IMPLEMENTATIONS[name].vote(rows, present, "negative", 0, 0, out, None if may is None else poisoned(1))
    assert out.tolist() == [0b10]


def test_unused_bits_that_nobody_sets_stay_zero(kernels: Any) -> None:
    for count in (1, 2, 3, 4):
        for tie in RULES:
            rows, out = torch.full((count, 1), 0b111, dtype=torch.int32), poisoned(1)
            kernels.vote(rows, None, tie, 0, 0, out, None)
            assert out.tolist() == [0b111]


@pytest.mark.parametrize("seed", [0, 1, 77])
def test_alternate_is_a_fair_coin_for_every_bit_and_seed(kernels: Any, seed: int) -> None:
    words = 2000
    rows = torch.stack([torch.zeros(words, dtype=torch.int32), torch.full((words,), -1, dtype=torch.int32)])
    out, other = poisoned(words), poisoned(words)
    kernels.vote(rows, None, "alternate", seed, 0, out, None)
    kernels.vote(rows, None, "alternate", seed + 1, 0, other, None)
    n = 32 * words
    for coin in (out, out ^ other, out[1:] ^ out[:-1]):  # also from one seed, or word, to the next
        assert abs(int(kernels.popcount(coin)) - n / 2) < 5 * n**0.5 / 2
    by_bit = kernels.unpack(out, n).view(words, 32).sum(0)
    assert bool(((by_bit - words / 2).abs() < 5 * words**0.5 / 2).all())
    zeros = torch.zeros(n)
    assert torch.equal(packed(kernels, zeros, "alternate", seed, 0)[0], out), "zeros and ties toss the same coin"


@pytest.mark.parametrize("first", [0, 4, (1 << 32) - 3, WIDE])
def test_a_vector_may_be_cut_into_pieces_of_whole_words(kernels: Any, first: int) -> None:
    x, rows, may = data("zero", 32 * 9 - 5, torch.float32), random_words(4, 9), random_words(4, 9, seed=1)
    x[::5] = 1
    signs, _ = packed(kernels, x, "alternate", 5, first)
    whole, verdict, voted = poisoned(9), poisoned(9), poisoned(9)
    kernels.vote(rows, None, "alternate", 5, first, whole, None)
    kernels.vote(rows, may, "alternate", 5, first, verdict, voted)
    for a, b in ((0, 1), (1, 4), (4, 9)):
        assert torch.equal(packed(kernels, x[32 * a : 32 * b], "alternate", 5, first + a)[0], signs[a:b])
        out, anybody = poisoned(b - a), poisoned(b - a)
        kernels.vote(rows[:, a:b], None, "alternate", 5, first + a, out, None)
        assert torch.equal(out, whole[a:b])
        kernels.vote(rows[:, a:b], may[:, a:b], "alternate", 5, first + a, out, anybody)
        assert torch.equal(out, verdict[a:b])
        assert torch.equal(anybody, voted[a:b])


@pytest.mark.parametrize("scale", [0.0, 0.3, -2.0, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", WORKING)
def test_signs_become_numbers(kernels: Any, dtype: torch.dtype, scale: float) -> None:
    for m in SIZES:
        words, may = (random_words(wire.bitmap_words(m), seed=seed) for seed in range(2))
        minus, some = (torch.tensor(bits_of(w)[:m], dtype=torch.bool) for w in (words, may))
        start = data("special", m, dtype)
        for present in (None, may):
            expected = torch.tensor([-scale if bit else scale for bit in minus.tolist()], dtype=dtype)
            if present is not None:
                expected = torch.where(some, expected, 0.0)
            out, added = torch.full((m,), 99.0, dtype=dtype), start.clone()
            kernels.spread_signs(words, present, torch.tensor(scale, dtype=dtype), out)
            kernels.add_signs(words, present, torch.tensor(scale, dtype=dtype), added)
            assert same(out, expected)
            assert same(added, start + expected)


@pytest.mark.parametrize("dtype", GRADIENTS)
@pytest.mark.parametrize("m", [*SIZES, 70_000])
def test_the_sum_of_magnitudes(kernels: Any, dtype: torch.dtype, m: int) -> None:
    for kind in ("normal", "zero", "tiny", "spread"):
        x = data(kind, m, dtype)
        found = kernels.absolute_sum(x)
        assert (found.dtype, found.shape) == (torch.float64, ())
        if bool(x.isfinite().all()):
            assert float(found) == pytest.approx(math.fsum(map(abs, x.tolist())), rel=1e-13)
        assert torch.equal(found, kernels.absolute_sum(x)) or bool(found.isnan())
    for bad in (float("nan"), -float("inf")):
        if m:
            x = torch.ones(m, dtype=dtype)
            x[m // 2] = bad
            assert not bool(kernels.absolute_sum(x).isfinite())


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    m, x = 900_001, data("spread", 900_001, torch.float32)
    x[::3] = 0
    rows, may = random_words(5, 700), random_words(5, 700, seed=1)

    def call() -> list[Tensor]:
        flags = torch.zeros(3, 1, dtype=torch.uint8)
        signs, present, apart = (bitmap_for(m) for _ in range(3))
        cpu.pack_signs(x, "alternate", 3, 9, signs, None, flags[0])
        cpu.pack_signs(x, "alternate", 3, 9, apart, present, flags[1])
        cpu.pack_signs(torch.where(torch.arange(m) == m - 2, float("nan"), x), "positive", 3, 9, apart, None, flags[2])
        out, verdict, voted = (poisoned(700) for _ in range(3))
        cpu.vote(rows, None, "alternate", 3, 9, out, None)
        cpu.vote(rows, may, "alternate", 3, 9, verdict, voted)
        numbers, added, scale = torch.empty(m), x.clone(), torch.tensor(0.7)
        cpu.spread_signs(signs, None, scale, numbers)
        cpu.add_signs(signs, present, scale, added)
        return [signs, present, apart, flags, out, verdict, voted, numbers, added, cpu.absolute_sum(x)]

    in_any_number_of_parts(monkeypatch, call)
    assert call()[3].flatten().tolist() == [0, 0, wire.NONFINITE]
