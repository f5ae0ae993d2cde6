"""Bitmaps on devices; what needs to know how many ones come before a word is in ``codes.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm.kernels.checks import check_bitmap, check_rank, check_rows, check_support
from sparcomm.kernels.cuda.launch import run
from sparcomm.kernels.cuda.pointers import together

SHORT = 32  # keys of fewer elements share a warp's look at a vector


def pack(mask: Tensor, out: Tensor) -> None:
    """A mask as a bitmap."""
    check_bitmap(mask, out)
    together(out, mask)
    run("bitmap", "pack", out.numel(), out, mask, mask.numel(), out, out.numel())


def unpack(words: Tensor, m: int) -> Tensor:
    """The inverse of pack."""
    check_bitmap(m, words)
    out = torch.empty(m, dtype=torch.bool, device=words.device)
    run("bitmap", "unpack", words.numel(), words, words, words.numel(), out, m)
    return out


def support(x: Tensor, width: int, out: Tensor) -> None:
    """The keys that hold a non-zero."""
    keys = check_support(x, width, out)
    together(out, x)
    n, words = x.numel(), out.numel()
    width = min(width, max(n, 1))  # a longer key holds no more
    if width == 1:
        run("support", "elements", words, out, x, n, out, words, GRAD=x.dtype)
    elif width < SHORT:
        run("support", "short_keys", 32 * words, out, x, n, width, out, words, GRAD=x.dtype)
    else:
        out.zero_()
        run("support", "long_keys", 32 * keys, out, x, n, width, out, keys, GRAD=x.dtype)


def popcount(words: Tensor) -> Tensor:
    """Ones in all words."""
    check_bitmap(None, words)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    run("bitmap", "popcount", words.numel(), words, words, words.numel(), total, each=4)
    return total


def rank(words: Tensor, prefix: Tensor, index: Tensor) -> Tensor:
    """Ones before each position."""
    check_rank(words, prefix, index)
    together(words, prefix, index)
    if not words.numel():
        return torch.zeros_like(index)
    out = torch.empty_like(index)
    run("bitmap", "rank", index.numel(), words, words, words.numel(), prefix, index, index.numel(), out)
    return out


def unite(rows: Tensor, out: Tensor) -> None:
    """The OR of all rows."""
    check_rows(rows, out)
    together(out, rows)
    run("bitmap", "unite", out.numel(), out, rows, rows.stride(0), rows.shape[0], out, out.numel(), each=4)
