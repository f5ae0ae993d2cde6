"""The specification of bitmaps and votes, bit by bit in plain torch: see ``interface_bits.py``."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.kernels import bits
from sparcomm.kernels._entries import raise_flag
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
from sparcomm.kernels.interface_bits import Rule


def pack(mask: Tensor, out: Tensor) -> None:
    """A mask as a bitmap."""
    check_bitmap(mask, out)
    bits.pack(mask, out)


def unpack(words: Tensor, m: int) -> Tensor:
    """The inverse of pack."""
    check_bitmap(m, words)
    return bits.unpack(words)[:m].to(torch.bool)


def support(x: Tensor, width: int, out: Tensor) -> None:
    """The keys that hold a non-zero."""
    keys = check_support(x, width, out)
    filled = torch.zeros(keys * width, dtype=torch.bool, device=x.device)
    filled[: x.numel()] = x != 0
    bits.pack(filled.view(keys, width).any(1), out)


def popcount(words: Tensor) -> Tensor:
    """Ones in all words."""
    check_bitmap(None, words)
    return bits.unpack(words).sum()


def prefix(words: Tensor) -> Tensor:
    """Ones in all words before each."""
    check_bitmap(None, words)
    count = bits.unpack(words).view(-1, 32).sum(1)
    return count.cumsum(0) - count


def ones(words: Tensor) -> Tensor:
    """Positions of the ones."""
    check_bitmap(None, words)
    return bits.unpack(words).nonzero().flatten()


def rank(words: Tensor, prefix: Tensor, index: Tensor) -> Tensor:
    """Ones before each position."""
    check_rank(words, prefix, index)
    if not words.numel():
        return torch.zeros_like(index)
    at = (index >> 5).clamp(0, words.numel() - 1)
    before = torch.arange(32, device=words.device) < (index - 32 * at).view(-1, 1)
    return prefix[at] + (bits.unpack(words[at]).view(-1, 32) * before).sum(1)


def unite(rows: Tensor, out: Tensor) -> None:
    """The OR of all rows."""
    check_rows(rows, out)
    out.copy_(functools.reduce(torch.bitwise_or, rows.unbind()))


def pack_signs(
    x: Tensor, zero: Rule, seed: int, first: int, out: Tensor, present: Tensor | None, flags: Tensor
) -> None:
    """Signs, and zeros by a rule or as a bitmap of their own."""
    check_signs(x, out, present)
    undecided = _rule_bits(zero, seed, first, out)[: x.numel()]
    if present is not None:
        bits.pack(x != 0, present)
        undecided = torch.zeros_like(undecided)
    bits.pack(torch.where(x != 0, x.signbit(), undecided), out)
    raise_flag(flags, wire.NONFINITE, ~x.isfinite())


def vote(
    rows: Tensor, present: Tensor | None, tie: Rule, seed: int, first: int, out: Tensor, voted: Tensor | None
) -> None:
    """Counts votes, and those of them for a negative sign."""
    check_vote(rows, present, out, voted)
    undecided = _rule_bits(tie, seed, first, out)
    votes, negative = (torch.zeros_like(undecided) for _ in range(2))
    for r, row in enumerate(rows):
        may = torch.ones_like(votes) if present is None else bits.unpack(present[r])
        votes += may
        negative += may * bits.unpack(row)
    verdict = torch.where(2 * negative == votes, undecided, 2 * negative > votes)
    bits.pack(verdict * (votes > 0), out)
    if voted is not None:
        bits.pack(votes > 0, voted)


def spread_signs(words: Tensor, present: Tensor | None, scale: Tensor, out: Tensor) -> None:
    """Signs as numbers."""
    out.copy_(_signs(words, present, scale, out))


def add_signs(words: Tensor, present: Tensor | None, scale: Tensor, out: Tensor) -> None:
    """Adds signs as numbers."""
    out += _signs(words, present, scale, out)


def absolute_sum(x: Tensor) -> Tensor:
    """The sum of magnitudes."""
    check_signs(x)
    return x.to(torch.float64).abs().sum()


def _rule_bits(rule: Rule, seed: int, first: int, like: Tensor) -> Tensor:
    """(32 w,) int64: what the rule says at every position of ``like`` (w,)."""
    check_rule(rule)
    if rule == "alternate":
        place = torch.arange(like.numel(), device=like.device) + (first & bits.MASK32)
        return bits.fields(bits.noise(place, seed), 32)
    value = int(rule == "negative")
    return torch.full((32 * like.numel(),), value, dtype=torch.int64, device=like.device)


def _signs(words: Tensor, present: Tensor | None, scale: Tensor, out: Tensor) -> Tensor:
    check_sign_bits(words, present, scale, out)
    m = out.numel()
    signed = torch.where(unpack(words, m), -scale, scale)
    return signed if present is None else torch.where(unpack(present, m), signed, 0)
