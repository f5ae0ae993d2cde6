"""Signs and votes as CUDA text: ``signs.cu`` and ``vote.cu``. ``interface_bits.py`` holds the contracts."""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm.dtypes import working_dtype
from sparcomm.kernels.bits import MASK32
from sparcomm.kernels.checks import check_rule, check_sign_bits, check_signs, check_vote
from sparcomm.kernels.cuda.launch import THREADS, run
from sparcomm.kernels.interface_bits import RULES, Rule

STRETCH = 8192  # elements that a block adds up on its own, as in the text


def pack_signs(
    x: Tensor, zero: Rule, seed: int, first: int, out: Tensor, present: Tensor | None, flags: Tensor
) -> None:
    """Signs, and zeros by a rule or as a bitmap of their own."""
    check_signs(x, out, present)
    rule = _rule(zero)
    if present is not None:
        rule = _rule("positive")  # zeros are 0
    _run("pack_signs", x, x, x.numel(), rule, seed & MASK32, first & MASK32, out, present, flags, each=32)


def vote(
    rows: Tensor, present: Tensor | None, tie: Rule, seed: int, first: int, out: Tensor, voted: Tensor | None
) -> None:
    """Counts votes in planes of bits, as many as the largest number needs."""
    check_vote(rows, present, out, voted)
    count, words = rows.shape
    most = count if present is None else 2 * count
    kernel = "vote_4" if most < 1 << 4 else "vote_8" if most < 1 << 8 else "vote_17"
    step, other = rows.stride(0), 0 if present is None else present.stride(0)
    numbers = count, words, _rule(tie), seed & MASK32, first & MASK32
    run("vote", kernel, words, rows, rows, step, present, other, *numbers, out, voted)


def spread_signs(words: Tensor, present: Tensor | None, scale: Tensor, out: Tensor) -> None:
    """Signs as numbers."""
    _signs(words, present, scale, out, adding=False)


def add_signs(words: Tensor, present: Tensor | None, scale: Tensor, out: Tensor) -> None:
    """Adds signs as numbers."""
    _signs(words, present, scale, out, adding=True)


def absolute_sum(x: Tensor) -> Tensor:
    """The sum of magnitudes, made of the sums of stretches of one length."""
    check_signs(x)
    count = -(-x.numel() // STRETCH)
    sums, out = (torch.empty(shape, dtype=torch.float64, device=x.device) for shape in ((count,), ()))
    _run("absolute_sums", x, x, x.numel(), sums, each=STRETCH // THREADS)
    run("signs", "total", THREADS, x, sums, count, out, GRAD=x.dtype, WORK=working_dtype(x.dtype))
    return out


def _signs(words: Tensor, present: Tensor | None, scale: Tensor, out: Tensor, *, adding: bool) -> None:
    check_sign_bits(words, present, scale, out)
    _run("signs", out, words, present, scale, out, out.numel(), adding, each=16 // out.element_size())


def _rule(rule: Rule) -> int:
    check_rule(rule)
    return RULES.index(rule)


def _run(kernel: str, x: Tensor, *arguments: Tensor | float | None, each: int) -> None:
    run("signs", kernel, x.numel(), x, *arguments, each=each, GRAD=x.dtype, WORK=working_dtype(x.dtype))
