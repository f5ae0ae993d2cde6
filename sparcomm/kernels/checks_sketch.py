"""Arguments that no kernel of ``interface_sketch.py`` may be given: compiled loops check no bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm.errors import SparcommError

FLOATS = (torch.float32, torch.float64)
WAYS = ("median", "mean", "projection")
MOST = (1 << 31) - 1


def check_keys(key: Tensor, width: int = 1) -> None:
    """Raises SparcommError unless ``key`` may be keys; of what they are, only if they lie on a CPU."""
    if key.dtype != torch.int64 or key.dim() != 1 or not key.is_contiguous() or key.numel() > MOST or width < 1:
        raise SparcommError(
            f"keys are {key.dtype}{list(key.shape)}, stride {key.stride()}, of width {width}: must be int64, flat, "
            "contiguous, fewer than 2^31, of width 1 or more"
        )


def check_sorted_keys(key: Tensor, width: int = 1) -> None:
    """As ``check_keys``, and where that needs no waiting raises SparcommError unless they are in order and range."""
    check_keys(key, width)
    if key.device.type == "cpu" and key.numel():
        check_order(bool((key[1:] > key[:-1]).all()) and int(key[0]) >= 0 and int(key[-1]) < 1 << 32)


def check_order(increasing: bool) -> None:
    """Raises SparcommError unless told that the keys are strictly increasing and in range."""
    if not increasing:
        raise SparcommError("keys must be strictly increasing, from 0 to below 2^32")


def check_table(table: Tensor, width: int, dtypes: tuple[torch.dtype, ...]) -> int:
    """The number of columns. Raises SparcommError unless ``table`` is one, of ``width`` lanes and one of ``dtypes``."""
    fits = table.dim() == 2 and table.dtype in dtypes and table.is_contiguous() and table.shape[0] > 0
    columns = table.shape[1] // width if fits else 0
    if not (0 < columns <= MOST and columns * width == table.shape[1]):
        raise SparcommError(
            f"table is {table.dtype}{list(table.shape)}, stride {table.stride()}: must be of "
            f"{' or '.join(map(str, dtypes))}, contiguous, of at least one row and column of width {width}"
        )
    return columns


def check_values(value: Tensor, key: Tensor, width: int, table: Tensor) -> None:
    """Raises SparcommError unless ``value`` belongs to these keys and goes into ``table``."""
    if value.dtype != table.dtype or value.shape != (key.numel() * width,) or not value.is_contiguous():
        raise SparcommError(
            f"values are {value.dtype}{list(value.shape)}, stride {value.stride()}: must be "
            f"{table.dtype}[{key.numel() * width}], contiguous, {width} for each of {key.numel()} keys"
        )


def check_counts(counts: Tensor, columns: int, rows: int | None = None) -> None:
    """Raises SparcommError unless ``counts`` are those of such a table; of any rows, if none are given."""
    expected = max(1, counts.shape[0] if counts.dim() else 0) if rows is None else rows
    fits = counts.dtype == torch.int32 and counts.shape == (expected, columns) and counts.is_contiguous()
    if not fits or not 0 < columns <= MOST:
        raise SparcommError(
            f"counts are {counts.dtype}{list(counts.shape)}, stride {counts.stride()}: must be "
            f"torch.int32[{expected}, {columns}], contiguous, of at least one row and column"
        )


def check_way(how: str, counts: Tensor | None) -> None:
    """Raises SparcommError unless there is such an estimate, and ``counts`` are given where it divides by them."""
    if how not in WAYS:
        raise SparcommError(f"how={how!r} must be one of {', '.join(map(repr, WAYS))}")
    if (how == "projection") != (counts is not None):
        raise SparcommError(f"how={how!r} {'needs' if counts is None else 'takes no'} counts")


def check_fixed(fixed: Tensor, dtype: torch.dtype, exponent: int) -> None:
    """Raises SparcommError unless ``fixed`` may be values of ``dtype`` in units of ``2^exponent``."""
    if fixed.dtype != torch.int32 or dtype not in FLOATS or fixed.dim() != 1 or not fixed.is_contiguous():
        raise SparcommError(
            f"{fixed.dtype}{list(fixed.shape)}, stride {fixed.stride()}, for values of {dtype}: must be int32, flat, "
            "contiguous, for float32 or float64"
        )
    if abs(exponent) > 1022:
        raise SparcommError(f"exponent={exponent} must be in [-1022, 1022]")


def check_to_fixed(value: Tensor, out: Tensor, exponent: int, limit: int) -> None:
    """Raises SparcommError unless ``value`` can be written to ``out``."""
    check_fixed(out, value.dtype, exponent)
    if value.shape != out.shape or not value.is_contiguous() or not 1 <= limit <= MOST:
        raise SparcommError(
            f"values {list(value.shape)}, stride {value.stride()}, to {list(out.shape)} with limit={limit}: must be of "
            f"one shape and contiguous, the limit in [1, {MOST}]"
        )
