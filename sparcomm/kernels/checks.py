"""Arguments of codes that no kernel may be given: compiled loops check no bounds, so this is what makes them safe."""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.errors import SparcommError


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
