"""Sketches and peeling: what ``_sketch.py`` may be given, and which parts of it may run at once."""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sparcomm.kernels.checks_sketch import (
    FLOATS,
    check_counts,
    check_fixed,
    check_keys,
    check_order,
    check_table,
    check_to_fixed,
    check_values,
    check_way,
)
from sparcomm.kernels.cpu import _code, _parts, _sketch
from sparcomm.kernels.cpu._arrays import array as _array


def sketch(key: Tensor, value: Tensor, width: int, seed: int, out: Tensor) -> None:
    """Sums up signed values, row by row."""
    keys = _keys(key, width)
    columns = check_table(out, width, (*FLOATS, torch.int32))
    check_values(value, key, width, out)
    values, rows = _array(value), _array(out)
    _by_row(
        [functools.partial(_sketch.sketch, keys, values, width, _mixed(seed, r), row) for r, row in enumerate(rows)],
        max(values.size, columns * width),
    )


def occupancy(key: Tensor, seed: int, columns: int, out: Tensor) -> None:
    """Counts the keys of each bucket, row by row."""
    keys = _keys(key, 1)
    check_counts(out, columns)
    jobs = [functools.partial(_sketch.occupancy, keys, _mixed(seed, r), row) for r, row in enumerate(_array(out))]
    _by_row(jobs, max(keys.size, columns))


def estimate(
    table: Tensor,
    key: Tensor,
    width: int,
    seed: int,
    counts: Tensor | None,
    how: Literal["median", "mean", "projection"],
) -> Tensor:
    """What the keys' cells say."""
    keys = _keys(key, width)
    check_way(how, counts)
    columns = check_table(table, width, FLOATS)
    out = torch.empty(key.numel() * width, dtype=table.dtype, device="cpu")
    common = _array(table).reshape(-1), columns, keys, width, _word(seed)
    if how == "median":
        loop = functools.partial(_sketch.median, *common)
    else:
        if counts is not None:
            check_counts(counts, columns, table.shape[0])
        loop = functools.partial(_sketch.mean, *common, None if counts is None else _array(counts).reshape(-1))
    _parts.run([functools.partial(loop, *part, _array(out)) for part in _parts.cut(keys.size, 1)])
    return out


def peel(table: Tensor, key: Tensor, width: int, seed: int, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Follows what comes to be alone."""
    keys = _keys(key, width)
    columns = check_table(table, width, (torch.int32,))
    check_counts(counts, columns, table.shape[0])
    value = torch.zeros(key.numel() * width, dtype=torch.int32, device="cpu")
    done = torch.zeros(key.numel(), dtype=torch.bool, device="cpu")
    flat = _array(table).reshape(-1), columns, keys, width, _word(seed), _array(counts).reshape(-1)
    rounds = _sketch.peel(*flat, _array(value), _array(done))
    return value, done, torch.tensor(rounds, device="cpu")


def to_fixed(value: Tensor, exponent: int, limit: int, out: Tensor) -> Tensor:
    """Quotients in float64, rounded to integers."""
    check_to_fixed(value, out, exponent, limit)
    return torch.tensor(_sketch.to_fixed(_array(value), 2.0**-exponent, float(limit), _array(out)), device="cpu")


def from_fixed(fixed: Tensor, exponent: int, dtype: torch.dtype) -> Tensor:
    """Products in float64, rounded to the dtype."""
    check_fixed(fixed, dtype, exponent)
    out = torch.empty(fixed.numel(), dtype=dtype, device="cpu")
    _sketch.from_fixed(_array(fixed), 2.0**exponent, _array(out))
    return out


def _keys(key: Tensor, width: int) -> Any:
    check_keys(key, width)
    keys = _array(key)
    check_order(_code.increasing(keys, 1 << 32))
    return keys


def _word(seed: int) -> Any:
    return np.uint32(seed & 0xFFFFFFFF)


def _mixed(seed: int, r: int) -> Any:
    return np.uint32(_sketch.seed_of(_word(seed), r))


def _by_row(jobs: list[Any], size: int) -> None:
    """Rows of a large table at once: none touches another's."""
    if size >= _parts.LARGE:
        _parts.run(jobs)
    else:
        for job in jobs:
            job()
