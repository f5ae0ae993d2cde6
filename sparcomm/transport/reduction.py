"""What ranks' rows come to: the operations of an all_reduce, in rank order, and the dtypes that they take."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from sparcomm.errors import ConfigError
from sparcomm.transport.base import Op

OPS: tuple[str, ...] = get_args(Op)
_ADDABLE = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
)  # fmt: skip
# Bitwise operations do not care for the type, only for the width: unsigned words have few kernels in torch.
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_reducible(x: Tensor, op: str, native: bool) -> None:
    """Raises ConfigError unless ``op`` is one of OPS and has a meaning for the dtype of ``x``."""
    if op not in OPS:
        raise ConfigError(f"all_reduce: op={op!r}, must be one of {', '.join(map(repr, OPS))}")
    if native and op not in ("sum", "max"):
        raise ConfigError(f"all_reduce: native=True takes 'sum' or 'max', not {op!r}")
    if native and x.dtype == torch.int16:
        raise ConfigError("all_reduce: native=True takes no torch.int16, which neither Gloo nor NCCL can add")
    if op in ("band", "bor"):
        if x.is_floating_point() or x.is_complex():
            raise ConfigError(f"all_reduce: op={op!r} takes integers and bool, not {x.dtype}")
    elif x.dtype not in _ADDABLE and not (op == "max" and x.dtype == torch.bool):
        allowed = ", ".join(str(d).removeprefix("torch.") for d in _ADDABLE)
        raise ConfigError(f"all_reduce: op={op!r} takes {allowed}, not {x.dtype}")


def reduce_rows(rows: Tensor, op: str) -> Tensor:
    """Reduces ``rows`` (p, m) over dim 0 from row 0 upwards; returns (m,) of the same dtype. May overwrite ``rows``."""
    if op in ("band", "bor"):
        words = rows.view(_WORDS[rows.element_size()])
        for row in words[1:]:
            _ = words[0].bitwise_and_(row) if op == "band" else words[0].bitwise_or_(row)
    elif op == "max":
        for row in rows[1:]:
            torch.maximum(rows[0], row, out=rows[0])
    elif rows.dtype in (torch.float16, torch.bfloat16):
        total = rows[0].float()
        for row in rows[1:]:
            total.add_(row)
        return total.to(rows.dtype)
    else:
        for row in rows[1:]:
            rows[0].add_(row)
    return rows[0]
