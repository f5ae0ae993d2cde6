"""Bitmaps: packed, counted and united as one would do it bit by bit."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparcomm.errors import SparcommError
from sparcomm.kernels import cpu, reference
from sparcomm.kernels.interface_bits import BitKernels
from support.bitmaps import (
    WORD,
    as_payloads,
    bitmap_for,
    bits_of,
    in_any_number_of_parts,
    poisoned,
    random_words,
    words_of,
)
from support.kernels import GRADIENTS, IMPLEMENTATIONS, KINDS, data

SIZES = (0, 1, 31, 32, 33, 63, 64, 65, 500, 1000)
WIDTHS = (1, 2, 3, 4, 5, 8, 16, 31, 32, 33, 64, 100, 2000)
WORDS = st.lists(WORD, max_size=9).map(lambda w: torch.tensor(w, dtype=torch.int32))
FLOAT32 = torch.float32


@pytest.mark.parametrize("m", SIZES)
def test_a_mask_is_packed_and_unpacked(kernels: Any, m: int) -> None:
    for kind in ("normal", "zero", "special"):
        mask, out = data(kind, m, FLOAT32) > 0, bitmap_for(m)
        kernels.pack(mask, out)
        assert torch.equal(out, words_of([int(b) for b in mask]))
        assert torch.equal(kernels.unpack(out, m), mask)
        if m % 32:
            out[-1] |= -1 << m % 32  # unused bits are nobody's business
            assert torch.equal(kernels.unpack(out, m), mask)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", GRADIENTS)
def test_support_is_of_keys_that_hold_anything(kernels: Any, dtype: torch.dtype, width: int) -> None:
    for n in SIZES:
        for kind in KINDS:
            x = data(kind, n, dtype)
            if kind == "special":
                x = x * (torch.arange(n) % (3 * width) == 2 * width - 1)  # a few; NaN and inf times 0 are NaN, too
            keys = -(-n // width)
            expected = [int(any(v != 0 for v in x[j * width : (j + 1) * width].tolist())) for j in range(keys)]
            out = bitmap_for(keys)
            kernels.support(x, width, out)
            assert torch.equal(out, words_of(expected))


@pytest.mark.parametrize("dtype", GRADIENTS)
@pytest.mark.parametrize("width", [1, 4, 7, 80])
def test_one_element_anywhere_is_support_and_zeros_of_either_sign_are_not(
    kernels: Any, width: int, dtype: torch.dtype
) -> None:
    n = 300
    out = bitmap_for(-(-n // width))
    for at in (0, 1, 63, 64, 255, 256, 298, 299):
        for value in (torch.finfo(dtype).tiny * torch.finfo(dtype).eps, -1.0, float("nan"), float("inf")):
            x = torch.full((n,), -0.0, dtype=dtype)
            kernels.support(x, width, out)
            assert not out.any()
            x[at] = value
            kernels.support(x, width, out)
            assert [j for j, bit in enumerate(bits_of(out)) if bit] == [at // width]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(words=WORDS, extra=st.lists(st.integers(-(1 << 40), 1 << 40), max_size=5))
@settings(max_examples=60)
def test_ones_are_counted_found_and_ranked(name: str, words: Tensor, extra: list[int]) -> None:
    kernels, bits = IMPLEMENTATIONS[name], bits_of(words)
    count, before, found = kernels.popcount(words), kernels.prefix(words), kernels.ones(words)
    assert (count.dtype, count.shape, int(count)) == (torch.int64, (), sum(bits))
    assert torch.equal(before, torch.tensor([sum(bits[: 32 * w]) for w in range(words.numel())], dtype=torch.int64))
    assert torch.equal(found, torch.tensor([i for i, bit in enumerate(bits) if bit], dtype=torch.int64))
    index = torch.tensor([*range(-2, len(bits) + 34), *extra])
    expected = torch.tensor([sum(bits[: max(i, 0)]) for i in index.tolist()])
    assert torch.equal(kernels.rank(words, before, index), expected)
    assert torch.equal(kernels.rank(words, before, found), torch.arange(int(count))), "rank undoes select"


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@given(data=st.data(), count=st.integers(1, 9), size=st.integers(0, 4))
@settings(max_examples=60)
def test_union_of_many(name: str, data: st.DataObject, count: int, size: int) -> None:
    kernels = IMPLEMENTATIONS[name]
    drawn = data.draw(st.lists(st.lists(WORD, min_size=size, max_size=size), min_size=count, max_size=count))
    rows = torch.tensor(drawn, dtype=torch.int32).view(count, size)
    expected = words_of([int(any(bits)) for bits in zip(*map(bits_of, rows), strict=True)])
    for given_ in (rows, as_payloads(rows)):
        out = poisoned(size)
        kernels.unite(given_, out)
        assert torch.equal(out, expected)
    place = data.draw(st.integers(0, count - 1))
    kernels.unite(rows, rows[place])
    assert torch.equal(rows[place], expected), "out may be a row"


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("size", [255, 256, 257, 1000])
def test_union_of_long_rows(kernels: Any, size: int, count: int) -> None:
    rows = as_payloads(random_words(count, size) & random_words(count, size, seed=1))
    outs = [poisoned(size) for _ in range(2)]
    kernels.unite(rows, outs[0])
    reference.unite(rows, outs[1])
    assert torch.equal(*outs)


def test_one_row_may_stand_for_many(kernels: Any) -> None:
    word, out = random_words(1, 5), poisoned(5)
    kernels.unite(word.expand(4, 5), out)
    assert torch.equal(out, word[0])


def test_the_number_of_threads_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    x, rows = data("normal", 9999, FLOAT32), random_words(5, 700)
    x *= x > 1.5

    def call() -> list[Tensor]:
        outs = [poisoned(700)]
        cpu.unite(rows, outs[0])
        for width in (1, 4, 7):
            outs.append(bitmap_for(-(-x.numel() // width)))
            cpu.support(x, width, outs[-1])
        return outs

    in_any_number_of_parts(monkeypatch, call)


@pytest.mark.parametrize("offset", [1, 3])
def test_vectors_may_begin_anywhere(kernels: Any, offset: int) -> None:
    x = data("special", 500, FLOAT32)[offset:]
    mask = (data("normal", 500, FLOAT32) > 0)[offset:]
    outs = [bitmap_for(x.numel()) for _ in range(4)]
    for k, packed, support in ((kernels, outs[0], outs[1]), (reference, outs[2], outs[3])):
        k.pack(mask, packed)
        k.support(x, 1, support)
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])


def test_the_reference_never_waits_for_a_device() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")  # has no data: whoever looks at any gets an error

    k, m = reference, 1000
    words, rows, x, flags = meta(32), meta(4, 32), meta(m, dtype=FLOAT32), meta(1, dtype=torch.uint8)
    k.pack(k.unpack(words, m), words)
    k.support(x, 1, words)
    assert k.popcount(words).shape == ()
    assert k.rank(words, k.prefix(words), meta(9, dtype=torch.int64)).shape == (9,)
    k.unite(rows, words)
    for present in (None, words):
        k.pack_signs(x, "alternate", 1, 2, words, present, flags)
        k.spread_signs(words, present, k.absolute_sum(x).to(FLOAT32), x)
        k.add_signs(words, present, meta(dtype=FLOAT32), x)
    k.vote(rows, None, "alternate", 1, 2, words, None)
    k.vote(rows, rows, "negative", 1, 2, words, words)


def test_results_lie_on_the_cpu_whatever_the_default_device_is() -> None:
    words = random_words(4)
    with torch.device("meta"):
        before = cpu.prefix(words)
        found = [before, cpu.popcount(words), cpu.ones(words), cpu.unpack(words, 100), cpu.rank(words, before, before)]
        found.append(cpu.absolute_sum(words.to(FLOAT32)))
    assert {t.device.type for t in found} == {"cpu"}


W, X, MASK = torch.zeros(4, dtype=torch.int32), torch.zeros(100), torch.zeros(100, dtype=torch.bool)
ROWS, INDEX, FLAGS, ONE = W.expand(3, 4).clone(), torch.zeros(4, dtype=torch.int64), MASK[:1].byte(), torch.tensor(1.0)
GOOD: dict[str, list[Any]] = {
    "pack": [MASK, W],
    "unpack": [W, 100],
    "support": [X, 1, W],
    "popcount": [W],
    "prefix": [W],
    "ones": [W],
    "rank": [W, INDEX, INDEX],
    "unite": [ROWS, W],
    "pack_signs": [X, "positive", 0, 0, W, W.clone(), FLAGS],
    "vote": [ROWS, ROWS.clone(), "positive", 0, 0, W, W.clone()],
    "spread_signs": [W, W, ONE, X],
    "add_signs": [W, W, ONE, X],
    "absolute_sum": [X],
}
WRONG = [
    *[(name, at, bad) for name, at in [("popcount", 0), ("prefix", 0), ("ones", 0), ("unpack", 0), ("rank", 0)]
      for bad in (W.long(), ROWS, random_words(8)[::2])],
    *[(name, at, W[:3]) for name, at in [("pack", 1), ("unpack", 0), ("support", 2), ("rank", 0), ("unite", 1),
      ("pack_signs", 4), ("pack_signs", 5), ("vote", 5), ("vote", 6), ("spread_signs", 0), ("spread_signs", 1)]],
    *[("pack", 0, bad) for bad in (X, MASK[:99].view(9, 11), torch.zeros(200, dtype=torch.bool)[::2], MASK[:96])],
    *[("unpack", 1, bad) for bad in (-1, 96, 129)],
    *[("support", 1, bad) for bad in (0, -1, 2)],
    *[(name, 0, bad) for name in ("support", "pack_signs") for bad in (X.long(), X[::2], X[:96], X.view(10, 10))],
    *[("rank", at, bad) for at in (1, 2) for bad in (INDEX.int(), INDEX.view(2, 2), torch.arange(8)[::2])],
    *[(name, 0, bad) for name in ("unite", "vote")
      for bad in (ROWS.long(), ROWS[:0], ROWS[:, :3], W, torch.zeros(3, 8, dtype=torch.int32)[:, ::2])],
    *[("vote", 1, bad) for bad in (ROWS[:2], ROWS[:, :3], None)],
    ("vote", 6, None),
    ("vote", 2, "neither"),
    ("pack_signs", 1, "Positive"),
    *[(name, 2, bad) for name in ("spread_signs", "add_signs") for bad in (ONE.double(), X[:1])],
    *[(name, 3, bad) for name in ("spread_signs", "add_signs") for bad in (X[:96], X.half(), X.view(10, 10))],
    *[("absolute_sum", 0, bad) for bad in (X.long(), X[::2], ONE)],
]  # fmt: skip


@pytest.mark.parametrize(("name", "at", "bad"), WRONG)
def test_misuse_is_an_error_not_an_access_out_of_bounds(kernels: Any, name: str, at: int, bad: Any) -> None:
    getattr(kernels, name)(*GOOD[name])
    wrong = [*GOOD[name]]
    wrong[at] = bad
    with pytest.raises(SparcommError, match=r"must be|needs|give both"):
        getattr(kernels, name)(*wrong)


def test_every_kernel_has_been_misused() -> None:
    names = {name for name, _ in inspect.getmembers(BitKernels, inspect.isfunction) if not name.startswith("_")}
    assert names == set(GOOD) == {name for name, *_ in WRONG}


def test_too_many_voters_are_refused(kernels: Any) -> None:
    with pytest.raises(SparcommError, match="a vote of 65536: must be at most 65535"):
        kernels.vote(W.expand(65536, 4), None, "positive", 0, 0, W.clone(), None)


def test_a_key_may_be_longer_than_the_vector(kernels: Any) -> None:
    out = poisoned(1)
    kernels.support(X + 1, 1 << 40, out)
    assert out.tolist() == [1]
