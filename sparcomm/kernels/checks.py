"""Arguments of codes and bitmaps that no kernel may be given: compiled loops check no bounds, these do."""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.dtypes import GRADIENT_DTYPES
from sparcomm.errors import SparcommError
from sparcomm.kernels.interface_bits import RULES


def check_code(words: Tensor, k: int, m: int, expected: int) -> None:
    """Raises SparcommError unless ``words`` is as long as the code of k indices below m."""
    if words.numel() != expected or not 0 <= k <= m:
        raise SparcommError(
            f"code of k={k} indices below m={m} in {words.numel()} words: needs 0 <= k <= m and {expected} words"
        )


def check_rice(k: int, m: int, out: Tensor | None = None) -> None:
    """Raises SparcommError unless there are such indices, and ``out`` has just the room that any of them need."""
    if not 0 <= k <= m < 1 << 60:
        raise SparcommError(f"code of k={k} indices below m={m}: needs 0 <= k <= m < 2^60")
    if out is not None and out.numel() != wire.rice_words(k, m):
        raise SparcommError(f"code of k={k} indices below m={m} in {out.numel()} words: needs {wire.rice_words(k, m)}")


def check_scales(scale: Tensor, code: Tensor, value: Tensor | None = None) -> None:
    """Raises SparcommError unless these are bytes, and ``value`` a vector, that belong together."""
    expected = wire.scales(code.numel())
    if (scale.dtype, code.dtype) != (torch.uint8, torch.int8) or (scale.numel(), code.dim()) != (expected, 1):
        raise SparcommError(
            f"{scale.dtype}{list(scale.shape)} scales of {code.dtype}{list(code.shape)} codes: "
            f"must be {expected} uint8 and one dimension of int8"
        )
    if value is not None and value.shape != code.shape:
        raise SparcommError(f"{list(code.shape)} codes of {list(value.shape)} values: must be as many")


def check_rounding(x: Tensor, out: Tensor) -> None:
    """Raises SparcommError unless stochastic rounding can go from ``x`` to ``out``."""
    if x.dtype != torch.float32 or out.dtype != torch.bfloat16 or x.shape != out.shape:
        raise SparcommError(
            f"stochastic rounding of {x.dtype}{list(x.shape)} to {out.dtype}{list(out.shape)}: "
            "must be float32 to bfloat16, of one shape"
        )


def check_bitmap(of: Tensor | int | None, words: Tensor) -> None:
    """Raises SparcommError unless ``words`` are those of a bitmap: over a bool mask, or a number of positions."""
    _check_words(words)
    if isinstance(of, Tensor):
        if of.dtype != torch.bool or of.dim() != 1 or not of.is_contiguous():
            raise SparcommError(f"mask is {_describe(of)}: must be bool, flat and contiguous")
        of = of.numel()
    if of is not None and (of < 0 or words.numel() != wire.bitmap_words(of)):
        raise SparcommError(f"bitmap of {of} positions in {words.numel()} words: needs {wire.bitmap_words(max(of, 0))}")


def check_support(x: Tensor, width: int, out: Tensor) -> int:
    """Keys of ``width`` elements in ``x``. Raises SparcommError unless ``out`` can be the bitmap over them."""
    check_signs(x)
    if width < 1:
        raise SparcommError(f"keys of width={width}: must be at least 1 element")
    keys = -(-x.numel() // width)
    check_bitmap(keys, out)
    return keys


def check_rank(words: Tensor, prefix: Tensor, index: Tensor) -> None:
    """Raises SparcommError unless ``prefix`` has a number for each word, and ``index`` is a list of positions."""
    _check_words(words)
    for name, t in (("prefix", prefix), ("index", index)):
        if t.dtype != torch.int64 or t.dim() != 1 or not t.is_contiguous():
            raise SparcommError(f"{name} is {_describe(t)}: must be int64, flat and contiguous")
    if prefix.shape != words.shape:
        raise SparcommError(f"prefix of {prefix.numel()} words for a bitmap of {words.numel()}: must be as many")


def check_rows(rows: Tensor, out: Tensor) -> None:
    """Raises SparcommError unless ``rows`` are one bitmap or more, each as long as ``out``."""
    _check_words(out)
    side_by_side = rows.dim() == 2 and (rows.stride(1) == 1 or rows.shape[1] < 2)
    if rows.dtype != torch.int32 or not side_by_side or rows.shape[0] < 1 or rows.shape[1] != out.numel():
        raise SparcommError(
            f"rows are {_describe(rows)}: must be int32 of shape (1 or more, {out.numel()}), words side by side"
        )


def check_vote(rows: Tensor, present: Tensor | None, out: Tensor, voted: Tensor | None) -> None:
    """Raises SparcommError unless all of these belong together, and there are not too many rows to count."""
    check_rows(rows, out)
    if rows.shape[0] > 0xFFFF:
        raise SparcommError(f"a vote of {rows.shape[0]}: must be at most {0xFFFF}")
    if (present is None) != (voted is None):
        raise SparcommError("present and voted: give both or neither")
    if present is not None and voted is not None:
        check_rows(present, voted)
        if present.shape != rows.shape:
            raise SparcommError(f"present has shape {tuple(present.shape)}: must be {tuple(rows.shape)}, as rows")


def check_rule(rule: str) -> None:
    """Raises SparcommError for a rule that there is not."""
    if rule not in RULES:
        raise SparcommError(f"rule {rule!r}: must be one of {', '.join(map(repr, RULES))}")


def check_signs(x: Tensor, *bitmaps: Tensor | None) -> None:
    """Raises SparcommError unless ``x`` is a flat vector of a gradient's dtype, and the others are bitmaps over it."""
    if x.dtype not in GRADIENT_DTYPES or x.dim() != 1 or not x.is_contiguous():
        raise SparcommError(f"vector is {_describe(x)}: must be a flat contiguous one of a gradient's dtype")
    for words in bitmaps:
        if words is not None:
            check_bitmap(x.numel(), words)


def check_sign_bits(words: Tensor, present: Tensor | None, scale: Tensor, out: Tensor) -> None:
    """Raises SparcommError unless signs in ``words`` can become numbers in ``out``."""
    check_signs(out, words, present)
    if out.dtype not in (torch.float32, torch.float64) or scale.dtype != out.dtype or scale.dim():
        raise SparcommError(
            f"scale is {_describe(scale)}, out {_describe(out)}: must be a single number and a vector of one dtype, "
            "float32 or float64"
        )


def _check_words(words: Tensor) -> None:
    if words.dtype != torch.int32 or words.dim() != 1 or not words.is_contiguous():
        raise SparcommError(f"words are {_describe(words)}: must be int32, flat and contiguous")


def _describe(t: Tensor) -> str:
    return f"{t.dtype}{list(t.shape)}, stride {list(t.stride())}"
