"""Sparse positions on devices: reading and changing a few elements of a vector, sums of sorted lists."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.dtypes import GRADIENT_DTYPES, working_dtype
from sparcomm.errors import SparcommError
from sparcomm.kernels.checks_sums import check_block, check_length, check_pair, check_working
from sparcomm.kernels.cuda import bitmaps, codes
from sparcomm.kernels.cuda.launch import run
from sparcomm.kernels.cuda.pointers import readable, together, writable
from sparcomm.layout import Layout
from sparcomm.sparse import Sparse

LISTS = 8  # that one launch writes out, as in csrc/scatter.cu


def gather(x: Tensor, index: Tensor, layout: Layout, block: int) -> Tensor:
    """Values at local positions."""
    place = _place(x, layout, block)
    k, out = index.numel(), x.new_empty(index.numel())
    run("sparse", "gather", k, x, x, _index(index, x), k, *place, out, WORK=x.dtype)
    return out


def subtract(x: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int) -> None:
    """x[index] -= value."""
    check_pair(index, value)
    place, value = _place(x, layout, block), readable("value", value, x.dtype, x)
    run("sparse", "subtract", index.numel(), x, x, _index(index, x), index.numel(), *place, value, WORK=x.dtype)


def add(x: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int, flags: Tensor) -> None:
    """x[index] += value."""
    check_pair(index, value)
    place, value = _place(x, layout, block), readable("value", value, x.dtype, x)
    k, flags = index.numel(), writable("flags", flags, torch.uint8, x)
    run("sparse", "add", k, x, x, _index(index, x), k, *place, value, flags, WORK=x.dtype)


def scatter(out: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int) -> None:
    """out[index] = value."""
    check_block(layout, block)
    _scatter(out, [index], [value], layout, block)


def expand(out: Tensor, index: Sequence[Tensor], value: Sequence[Tensor], layout: Layout) -> None:
    """Writes all of out."""
    if not len(index) == len(value) == layout.blocks:
        raise SparcommError(f"{len(index)} and {len(value)} lists for {layout.blocks} blocks")
    check_length(layout, out)
    out.zero_()
    for first in range(0, layout.blocks, LISTS):
        _scatter(out, index[first : first + LISTS], value[first : first + LISTS], layout, first)


def merge_sum(a: Sparse, b: Sparse) -> Sparse:
    """The sum of two sparse vectors."""
    check_pair(a.index, a.value)
    check_pair(b.index, b.value)
    dtype = a.value.dtype
    if dtype not in (torch.float32, torch.float64):
        raise SparcommError(f"values are {dtype}: must be float32 or float64")
    first = (_index(a.index, a.value), readable("value", a.value, dtype, a.value), a.index.numel())
    second = (_index(b.index, a.value), readable("value", b.value, dtype, a.value), b.index.numel())
    room = first[2] + second[2]
    index, value = a.index.new_empty(room), a.value.new_empty(room)
    both = torch.empty(wire.words(second[2]), dtype=torch.int32, device=index.device)
    run("sparse", "common", second[2], value, first[0], first[2], second[0], second[2], both, WORK=dtype)
    before = codes.prefix(both)
    run("sparse", "merge_sum", room, value, *first, *second, both, before, index, value, WORK=dtype)
    found = room - int(bitmaps.popcount(both))
    return Sparse(index[:found], value[:found], a.numel)


def _scatter(out: Tensor, index: Sequence[Tensor], value: Sequence[Tensor], layout: Layout, first: int) -> None:
    """Writes up to LISTS lists, those of the blocks from ``first`` on."""
    check_length(layout, out)
    if out.dtype not in GRADIENT_DTYPES:
        raise SparcommError(f"out is {out.dtype}: must be of a gradient's dtype")
    together(out, layout.slot, *value)
    work = working_dtype(out.dtype)
    lists: list[Tensor | int | None] = []
    for i, v, end in zip(index, value, itertools.accumulate(i.numel() for i in index), strict=True):
        check_pair(i, v)
        lists += [_index(i, out), v.detach().to(work).contiguous(), end]
    entries = sum(i.numel() for i in index)
    lists += [None, None, entries] * (LISTS - len(index))
    place = (layout.slot, first, layout.blocks, layout.tile, layout.rounds, layout.numel)
    run("scatter", "scatter", entries, out, out, *place, entries, *lists[:-1], WORK=work, OUT=out.dtype)


def _place(x: Tensor, layout: Layout, block: int) -> tuple[Tensor, int, int, int, int, int]:
    """What tells a kernel where the positions of a block lie in ``x``, which may be read and written."""
    check_working(x, layout)
    check_block(layout, block)
    together(x, layout.slot)
    return layout.slot, block, layout.blocks, layout.tile, layout.rounds, layout.numel


def _index(index: Tensor, like: Tensor) -> Tensor:
    return readable("index", index, torch.int64, like)
