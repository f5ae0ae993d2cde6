"""Bytes that nobody sent, and what every decoder owes on them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparcomm import wire
from support.kernels import IMPLEMENTATIONS

# Codes of one length per (k, m), and how long that is.
CODES = {"elias_fano": wire.elias_fano_words, "bitmap": lambda k, m: wire.bitmap_words(m)}
WORD = st.one_of(st.integers(-(1 << 31), (1 << 31) - 1), st.sampled_from([0, -1, 1, -(1 << 31)]))


def encode(kernels: Any, code: str, index: Tensor, m: int) -> Tensor:
    """The words of ``index``; of a variable code as many as were used, and none behind them was touched."""
    if code != "rice":
        out = torch.full((CODES[code](index.numel(), m),), -1, dtype=torch.int32)
        getattr(kernels, f"{code}_encode")(index, m, out)
        return out
    out = torch.full((wire.rice_words(index.numel(), m) + 1,), -7, dtype=torch.int32)
    used = kernels.rice_encode(index, m, out[:-1])
    assert 0 <= used < out.numel()
    assert bool((out[used:] == -7).all())
    return out[:used]


def decode(kernels: Any, code: str, words: Tensor, k: int, m: int) -> tuple[Tensor, int]:
    flags = torch.zeros(1, dtype=torch.uint8)
    return getattr(kernels, f"{code}_decode")(words, k, m, flags), int(flags.item())


def check_any_words(code: str, words: Tensor, k: int, m: int) -> int:
    """Bounded, sorted, silent only about a true code, the same everywhere, ``words`` untouched. Returns the flags."""
    before = words.clone()
    answers = [decode(kernels, code, words, k, m) for kernels in IMPLEMENTATIONS.values()]
    assert torch.equal(words, before)
    index, flags = answers[0]
    for other, other_flags in answers[1:]:
        assert torch.equal(other, index)
        assert other_flags == flags
    assert index.shape == (k,)
    assert index.dtype == torch.int64
    assert bool((index.diff() > 0).all())
    assert bool(((index >= 0) & (index < m)).all())
    if flags:
        assert flags == wire.DAMAGED
        assert torch.equal(index, torch.arange(k))
    else:
        for kernels in IMPLEMENTATIONS.values():
            assert torch.equal(encode(kernels, code, index, m), words)
    return flags


@st.composite
def sizes(draw: st.DrawFn, limit: int, most: int = 40) -> tuple[int, int]:
    """(k, m), small or huge, k up to ``most``."""
    m = draw(st.one_of(st.integers(1, 300), st.integers(1, limit)))
    return draw(st.integers(0, min(m, most))), m


@st.composite
def index_sets(draw: st.DrawFn, k: int, m: int) -> Tensor:
    """k sorted indices below m: from all over, or crowded at either end."""
    span = draw(st.sampled_from(sorted({k, min(m, 2 * k + 1), min(m, 40 * k + 1), m})))
    found = sorted(draw(st.sets(st.integers(0, span - 1), min_size=k, max_size=k))) if span > k else list(range(k))
    return torch.tensor(found, dtype=torch.int64) + draw(st.sampled_from([0, m - span]))


@st.composite
def words_of(draw: st.DrawFn, size: int) -> Tensor:
    """``size`` int32 words of any bits."""
    return torch.tensor(draw(st.lists(WORD, min_size=size, max_size=size)), dtype=torch.int32)


@st.composite
def disturbed(draw: st.DrawFn, words: Tensor, *, resized: bool) -> Tensor:
    """``words`` with some bits flipped; if ``resized`` perhaps cut off or longer."""
    words = words.clone()
    for bit in draw(st.lists(st.integers(0, max(0, 32 * words.numel() - 1)), max_size=3)) if words.numel() else ():
        words[bit // 32] ^= torch.tensor(1 << bit % 32).to(torch.int32)
    if resized:
        words = words[: draw(st.integers(0, words.numel()))] if draw(st.booleans()) else words
        words = torch.cat([words, draw(words_of(draw(st.integers(0, 2))))])
    return words


@st.composite
def arbitrary_codes(draw: st.DrawFn, codes: tuple[str, ...]) -> tuple[str, Tensor, int, int]:
    """(code, words, k, m): random words, or true codes that were disturbed."""
    code = draw(st.sampled_from(codes))
    k, m = draw(sizes(2000 if code == "bitmap" else 1 << 50))
    if draw(st.booleans()):
        true = encode(IMPLEMENTATIONS["cpu"], code, draw(index_sets(k, m)), m)
        return code, draw(disturbed(true, resized=code == "rice")), k, m
    size = CODES[code](k, m) if code in CODES else draw(st.integers(0, wire.rice_words(k, m) + 1))
    words = draw(words_of(size))
    if code == "rice" and size:  # few headers make sense, so few would be drawn
        words[0] = (int(words[0]) & -(1 << wire.RICE_HEADER)) | draw(st.integers(0, 8))
    return code, words, k, m
