"""The specification of sketches and of peeling, in plain torch: every key looks at all its cells in every round."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sparcomm.kernels import bits
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

STEP = 0x9E3779B9  # between the seeds of two rows


def sketch(key: Tensor, value: Tensor, width: int, seed: int, out: Tensor) -> None:
    """Cells of integers in any order, of floats in that of the keys."""
    check_sorted_keys(key, width)
    columns = check_table(out, width, (*FLOATS, torch.int32))
    check_values(value, key, width, out)
    bucket, odd = _hashed(key, out.shape[0], columns, seed)
    lanes = value.view(-1, width)
    signed = torch.where(odd.unsqueeze(2), -lanes, lanes)
    cells = out.view(-1, columns, width)
    if out.dtype == torch.int32:
        cells.zero_().view(-1, width).index_add_(0, _flat(bucket, columns), signed.view(-1, width))
        return
    # Sums from left to right of each bucket's stretch of the sorted keys; index_add_ has no order on other devices.
    order = bucket.sort(dim=1, stable=True).indices
    sorted_ = signed.gather(1, order.unsqueeze(2).expand_as(signed))
    ends = _counted(bucket, columns).cumsum(1)
    offsets = torch.cat([ends.new_zeros(out.shape[0], 1), ends], 1)
    cells.copy_(torch.segment_reduce(sorted_, "sum", offsets=offsets, axis=1, unsafe=True, initial=0))


def occupancy(key: Tensor, seed: int, columns: int, out: Tensor) -> None:
    """Counts the keys of each bucket."""
    check_sorted_keys(key)
    check_counts(out, columns)
    out.copy_(_counted(_hashed(key, out.shape[0], columns, seed)[0], columns))


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
    rows = table.shape[0]
    bucket, odd = _hashed(key, rows, columns, seed)
    found = table.view(-1, width)[_flat(bucket, columns)].view(rows, -1, width)
    found = torch.where(odd.unsqueeze(2), -found, found)
    if how == "median":
        ordered = found.sort(dim=0, stable=True).values
        low, high = ordered[(rows - 1) // 2], ordered[rows // 2]
        return (low if rows % 2 else (low + high) * 0.5).reshape(-1)
    if counts is not None:
        check_counts(counts, columns, rows)
        shared = counts.gather(1, bucket).unsqueeze(2)
        found = torch.where(shared > 0, found / shared.clamp(min=1), 0)
    total = torch.zeros_like(found[0])
    for row in found:
        total += row
    return (total / rows).view(-1)


def peel(table: Tensor, key: Tensor, width: int, seed: int, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds over all keys, until none of them is alone."""
    check_sorted_keys(key, width)
    columns = check_table(table, width, (torch.int32,))
    check_counts(counts, columns, table.shape[0])
    bucket, odd = _hashed(key, table.shape[0], columns, seed)
    cells = table.view(-1, columns, width)
    value, done = table.new_zeros((key.numel(), width)), torch.zeros_like(key, dtype=torch.bool)
    rounds = 0
    while True:
        alone = (counts.gather(1, bucket) == 1) & ~done
        peeled = alone.any(0).nonzero().view(-1)
        if not peeled.numel():
            return value.view(-1), done, torch.tensor(rounds, device=key.device)
        rounds += 1
        row = alone[:, peeled].to(torch.uint8).argmax(0)  # the first of several
        there = cells[row, bucket[row, peeled]]
        value[peeled] = torch.where(odd[row, peeled].unsqueeze(1), -there, there)
        done[peeled] = True
        for r in range(table.shape[0]):
            less = torch.where(odd[r, peeled].unsqueeze(1), value[peeled], -value[peeled])
            cells[r].index_add_(0, bucket[r, peeled], less)
            counts[r].index_add_(0, bucket[r, peeled], counts.new_full(peeled.shape, -1))


def to_fixed(value: Tensor, exponent: int, limit: int, out: Tensor) -> Tensor:
    """Quotients in float64, rounded to integers."""
    check_to_fixed(value, out, exponent, limit)
    exact = (value.to(torch.float64) * 2.0**-exponent).round()
    within = exact.abs() <= limit
    out.copy_(exact.clamp(-limit, limit).nan_to_num(0))
    return ~within.all()


def from_fixed(fixed: Tensor, exponent: int, dtype: torch.dtype) -> Tensor:
    """Products in float64, rounded to the dtype."""
    check_fixed(fixed, dtype, exponent)
    return (fixed.to(torch.float64) * 2.0**exponent).to(dtype)


def _hashed(key: Tensor, rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """(rows, k) int64 buckets, and whether the sign there is -1."""
    word = torch.stack([bits.noise(key, seed + r * STEP) for r in range(rows)])
    return (word * columns) >> 32, (word & 1).to(torch.bool)


def _flat(bucket: Tensor, columns: int) -> Tensor:
    """(rows * k,) places in a table's cells, row after row."""
    first = columns * torch.arange(bucket.shape[0], device=bucket.device)
    return (bucket + first.unsqueeze(1)).view(-1)


def _counted(bucket: Tensor, columns: int) -> Tensor:
    """(rows, columns) int64."""
    out = torch.zeros((bucket.shape[0], columns), dtype=torch.int64, device=bucket.device)
    return out.scatter_add_(1, bucket, torch.ones_like(bucket))
