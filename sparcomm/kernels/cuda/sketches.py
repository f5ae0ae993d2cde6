"""Sketches and peeling as CUDA text: ``sketch.cu``. ``interface_sketch.py`` holds the contracts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sparcomm.kernels.bits import MASK32
from sparcomm.kernels.checks_sketch import (
    FLOATS,
    check_counts,
    check_fixed,
    check_sorted_keys,
    check_table,
    check_to_fixed,
    check_values,
    check_way,
)
from sparcomm.kernels.cuda.launch import run

BATCH = 8  # rounds of peeling for each time that the host waits


def sketch(key: Tensor, value: Tensor, width: int, seed: int, out: Tensor) -> None:
    """Cells of integers in any order; for floats, lists of each cell's keys, which are sorted and summed up."""
    check_sorted_keys(key, width)
    columns = check_table(out, width, (*FLOATS, torch.int32))
    check_values(value, key, width, out)
    k, rows = key.numel(), out.shape[0]
    if out.dtype == torch.int32:
        out.zero_()
        numbers = k, width, seed & MASK32, rows, columns
        _run("sketch_integers", k * width, key, key, value, *numbers, out)
        return
    counts = _occupancy(key, seed, torch.empty((rows, columns), dtype=torch.int32, device=key.device))
    ends, cells = counts.view(-1).cumsum(0), rows * columns
    lists = torch.empty(rows * k, dtype=torch.int32, device=key.device)
    _run("list_keys", k, key, key, k, seed & MASK32, rows, columns, ends, lists)
    _run("sort_lists", cells, key, ends, counts, cells, lists)
    _run("sum_lists", cells * width, key, value, width, ends, counts, cells, lists, out, dtype=out.dtype)


def occupancy(key: Tensor, seed: int, columns: int, out: Tensor) -> None:
    """Counts the keys of each bucket."""
    check_sorted_keys(key)
    check_counts(out, columns)
    _occupancy(key, seed, out)


def estimate(
    table: Tensor,
    key: Tensor,
    width: int,
    seed: int,
    counts: Tensor | None,
    how: Literal["median", "mean", "projection"],
) -> Tensor:
    """What the keys' cells say, row by row."""
    check_sorted_keys(key, width)
    check_way(how, counts)
    columns = check_table(table, width, FLOATS)
    rows, k = table.shape[0], key.numel()
    if counts is not None:
        check_counts(counts, columns, rows)
    out = torch.empty(k * width, dtype=table.dtype, device=key.device)
    numbers = table, key, k, width, seed & MASK32, rows, columns
    if how == "median":
        _run("estimate_median", k * width, key, *numbers, out, dtype=table.dtype)
    else:
        _run("estimate_mean", k * width, key, *numbers, counts, out, dtype=table.dtype)
    return out


def peel(table: Tensor, key: Tensor, width: int, seed: int, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds over all keys, until none of them is alone; the host looks after every few."""
    check_sorted_keys(key, width)
    columns = check_table(table, width, (torch.int32,))
    check_counts(counts, columns, table.shape[0])
    k, rounds = key.numel(), 0
    value, state = (torch.zeros(size, dtype=torch.int32, device=key.device) for size in (k * width, k))
    place = seed & MASK32, table.shape[0], columns, counts
    while k:
        found = torch.zeros(BATCH, dtype=torch.int32, device=key.device)
        for r in range(BATCH):
            _run("find_alone", k, key, key, k, *place, state, found, r)
            _run("take_alone", k * width, key, key, k, width, *place, table, state, found, r, value)
        fruitful = int(found.sum())
        rounds += fruitful
        if fruitful < BATCH:
            break
    return value, state != 0, torch.full((), rounds, dtype=torch.int64, device=key.device)


def to_fixed(value: Tensor, exponent: int, limit: int, out: Tensor) -> Tensor:
    """Quotients in float64, rounded to integers."""
    check_to_fixed(value, out, exponent, limit)
    beyond, k = torch.zeros((), dtype=torch.bool, device=value.device), value.numel()
    _run("to_fixed", k, value, value, k, 2.0**-exponent, float(limit), out, beyond, dtype=value.dtype)
    return beyond


def from_fixed(fixed: Tensor, exponent: int, dtype: torch.dtype) -> Tensor:
    """Products in float64, rounded to the dtype."""
    check_fixed(fixed, dtype, exponent)
    out = torch.empty(fixed.numel(), dtype=dtype, device=fixed.device)
    _run("from_fixed", fixed.numel(), fixed, fixed, fixed.numel(), 2.0**exponent, out, dtype=dtype)
    return out


def _occupancy(key: Tensor, seed: int, out: Tensor) -> Tensor:
    rows, columns = out.zero_().shape
    _run("occupancy", key.numel(), key, key, key.numel(), seed & MASK32, rows, columns, out)
    return out


def _run(
    kernel: str, items: int, like: Tensor, *arguments: Tensor | float | None, dtype: torch.dtype = torch.float32
) -> None:
    run("sketch", kernel, items, like, *arguments, VALUE=dtype)
