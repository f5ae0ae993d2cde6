"""Bitmaps and votes on CPUs: checks, views, and large vectors in parts. ``interface_bits.py`` holds the contracts."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.kernels.bits import MASK32, mix
from sparcomm.kernels.checks import (
    check_bitmap,
    check_rank,
    check_rows,
    check_rule,
    check_sign_bits,
    check_signs,
    check_support,
    check_vote,
)
from sparcomm.kernels.cpu import _bitmaps, _parts
from sparcomm.kernels.cpu._arrays import array, bits, words
from sparcomm.kernels.interface_bits import RULES, Rule

_INFINITE = {torch.float32: 0x7F800000, torch.float64: 0x7FF << 52, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


def pack(mask: Tensor, out: Tensor) -> None:
    """A mask as a bitmap."""
    check_bitmap(mask, out)
    _bitmaps.filled(bits(mask), words(out))


def unpack(words: Tensor, m: int) -> Tensor:
    """The inverse of pack."""
    check_bitmap(m, words)
    out = torch.empty(m, dtype=torch.bool, device="cpu")
    _bitmaps.unpack(_words(words), out.numpy())
    return out


def support(x: Tensor, width: int, out: Tensor) -> None:
    """The keys that hold a non-zero."""
    check_support(x, width, out)
    elements, target = bits(x), words(out)
    if width == 1:
        look: Any = _bitmaps.filled
    elif width < 64 and 64 % width == 0:
        look = functools.partial(_support_narrow, width)
    else:
        look = functools.partial(_support, width)
    whole = 32 * width
    parts = _cut(x.numel(), whole, out.numel())
    _parts.run([functools.partial(look, elements[a * whole : b * whole], target[a:b]) for a, b in parts])


def popcount(words: Tensor) -> Tensor:
    """Ones in all words."""
    check_bitmap(None, words)
    return torch.tensor(_bitmaps.popcount(_words(words)), dtype=torch.int64, device="cpu")


def prefix(words: Tensor) -> Tensor:
    """Ones in all words before each."""
    check_bitmap(None, words)
    out = torch.empty(words.numel(), dtype=torch.int64, device="cpu")
    _bitmaps.prefix(_words(words), out.numpy())
    return out


def ones(words: Tensor) -> Tensor:
    """Positions of the ones."""
    check_bitmap(None, words)
    view = _words(words)
    out = torch.empty(_bitmaps.popcount(view), dtype=torch.int64, device="cpu")
    _bitmaps.positions(view, out.numpy())
    return out


def rank(words: Tensor, prefix: Tensor, index: Tensor) -> Tensor:
    """Ones before each position."""
    check_rank(words, prefix, index)
    if not words.numel():
        return torch.zeros_like(index)
    out = torch.empty_like(index)
    _bitmaps.rank(_words(words), prefix.numpy(), index.numpy(), out.numpy())
    return out


def unite(rows: Tensor, out: Tensor) -> None:
    """The OR of all rows."""
    check_rows(rows, out)
    view, target = _flat(rows), words(out)
    parts = _cut(out.numel(), 1, out.numel())
    _parts.run([functools.partial(_bitmaps.unite, *view, len(rows), a, target[a:b]) for a, b in parts])


def pack_signs(
    x: Tensor, zero: Rule, seed: int, first: int, out: Tensor, present: Tensor | None, flags: Tensor
) -> None:
    """Signs, and zeros by a rule or as a bitmap of their own."""
    check_signs(x, out, present)
    number, key = _rule(zero, seed)
    if present is not None:
        number = _bitmaps.POSITIVE
    elements, target, other = bits(x), words(out), None if present is None else words(present)
    infinite = elements.dtype.type(_INFINITE[x.dtype])
    jobs = [
        functools.partial(
            _bitmaps.pack_signs, elements[32 * a : 32 * b], infinite, number, key, _place(first + a), target[a:b],
            None if other is None else other[a:b],
        )
        for a, b in _cut(x.numel(), 32, out.numel())
    ]  # fmt: skip
    if any(_parts.run(jobs)):
        flags |= wire.NONFINITE


def vote(
    rows: Tensor, present: Tensor | None, tie: Rule, seed: int, first: int, out: Tensor, voted: Tensor | None
) -> None:
    """Counts votes in planes of bits."""
    check_vote(rows, present, out, voted)
    number, key = _rule(tie, seed)
    count, target, view = len(rows), words(out), _flat(rows)
    parts = _cut(out.numel(), 1, out.numel())
    if present is None or voted is None:
        jobs = [
            functools.partial(_bitmaps.vote, *view, count, a, number, key, _place(first + a), target[a:b])
            for a, b in parts
        ]
    else:
        may, anybody = _flat(present), words(voted)
        jobs = [
            functools.partial(
                _bitmaps.vote_present, *view, *may, count, a, number, key, _place(first + a), target[a:b],
                anybody[a:b],
            )
            for a, b in parts
        ]  # fmt: skip
    _parts.run(jobs)


def spread_signs(words: Tensor, present: Tensor | None, scale: Tensor, out: Tensor) -> None:
    """Signs as numbers."""
    _signs(words, present, scale, out, adding=False)


def add_signs(words: Tensor, present: Tensor | None, scale: Tensor, out: Tensor) -> None:
    """Adds signs as numbers."""
    _signs(words, present, scale, out, adding=True)


def absolute_sum(x: Tensor) -> Tensor:
    """The sum of magnitudes, made of the sums of stretches of one length."""
    check_signs(x)
    elements, stretch = array(x), _bitmaps.SUM
    sums = np.empty(-(-x.numel() // stretch), np.float64)
    parts = _cut(x.numel(), stretch, sums.size)
    _parts.run(
        [functools.partial(_bitmaps.absolute_sums, elements[a * stretch : b * stretch], sums[a:b]) for a, b in parts]
    )
    return torch.tensor(sums.sum(), dtype=torch.float64, device="cpu")


_words = words  # where an argument has that name


def _cut(numel: int, whole: int, count: int) -> list[tuple[int, int]]:
    """Ranges of ``count`` words, each of which stands for ``whole`` elements of ``numel``, for ``_parts.run``."""
    bounds = [first // whole for first, _ in _parts.cut(numel, max(numel, 1))]
    return list(zip(bounds, [*bounds[1:], count], strict=True))


def _flat(rows: Tensor) -> tuple[Any, int]:
    """All words from the first of the first row to the last of the last, and how far apart rows begin."""
    count, size = rows.shape
    stride = rows.stride(0) if count > 1 and size else size
    return words(rows.as_strided(((count - 1) * stride + size,), (1,))), stride


def _rule(rule: Rule, seed: int) -> tuple[int, Any]:
    check_rule(rule)
    return RULES.index(rule), np.uint32(mix(seed & MASK32))


def _place(word: int) -> Any:
    return np.uint32(word & MASK32)


def _support(width: int, elements: Any, out: Any) -> None:
    _bitmaps.support(elements, width, elements.dtype.type(np.iinfo(elements.dtype).max), out)


def _support_narrow(width: int, elements: Any, out: Any) -> None:
    _bitmaps.support_narrow(elements, width, out)


def _signs(words: Tensor, present: Tensor | None, scale: Tensor, out: Tensor, *, adding: bool) -> None:
    check_sign_bits(words, present, scale, out)
    view, other, target = _words(words), None if present is None else _words(present), array(out)
    number = array(scale)[()]
    jobs = [
        functools.partial(
            _bitmaps.signs, view[a:b], None if other is None else other[a:b], number, -number,
            target[32 * a : 32 * b], adding,
        )
        for a, b in _cut(out.numel(), 32, words.numel())
    ]  # fmt: skip
    _parts.run(jobs)
