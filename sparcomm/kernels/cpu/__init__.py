"""The kernels on CPUs, compiled by Numba: tensors in, NumPy views inside, nothing copied.

``sparcomm/kernels/interface.py`` holds the contracts. Loops are serial and release the GIL; call them from as many
threads as there are ranks in the process.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.errors import SparcommError
from sparcomm.kernels.cpu import _code, _count, _select, _sparse
from sparcomm.layout import Layout
from sparcomm.sparse import Sparse

_VIEWS = {torch.bfloat16: np.uint16, torch.float16: np.int16}
_UNSIGNED = {torch.float32: np.uint32, torch.float64: np.uint64}
_SIGNED = {torch.float32: np.int32, torch.float64: np.int64}
_NARROW = {
    torch.float32: _code.narrow_float32,
    torch.bfloat16: _code.narrow_bfloat16,
    torch.float16: _code.narrow_float16,
}


def compensate(
    grad: Tensor, residual: Tensor | None, out: Tensor, stats: Tensor, layout: Layout, flags: Tensor
) -> None:
    """Writes grad + residual and its histogram."""
    _check_length(layout, grad, residual, out)
    _check_stats(layout, stats)
    old = None if residual is None else _array(residual)
    bits = _array(out).view(_UNSIGNED[out.dtype])
    _count.tally(_array(grad), old, _array(out), bits, *_cut(layout), _array(stats), _array(flags))


def histogram(x: Tensor, stats: Tensor, layout: Layout, flags: Tensor) -> None:
    """Magnitudes per block and bin."""
    _check_length(layout, x)
    _check_stats(layout, stats)
    bits = _array(x).view(_UNSIGNED[x.dtype])
    _count.tally(None, None, _array(x), bits, *_cut(layout), _array(stats), _array(flags))


def select(x: Tensor, k: int, stats: Tensor, layout: Layout, block: int) -> Tensor:
    """Local positions of the k largest magnitudes."""
    _check_length(layout, x)
    _check_stats(layout, stats, block)
    if not 0 <= k <= layout.length:
        raise SparcommError(f"select: k={k} must be in [0, {layout.length}], the length of a block")
    slot, tile = _cut(layout)
    row = _array(stats)[block]
    stored = _select.stored(slot, block, tile, layout.numel)
    # Beyond its elements a block holds only padding: zeros that come after all others.
    if k == 0 or k >= stored:
        return torch.arange(k, device="cpu")  # whatever the default device is
    index = None
    if row.sum() == stored:
        index = _select.select(_array(x).view(_SIGNED[x.dtype]), k, row, slot, block, tile)
    if index is None:
        raise SparcommError(f"select: row {block} of the statistics is not the histogram of block {block}")
    return torch.from_numpy(index)


def gather(x: Tensor, index: Tensor, layout: Layout, block: int) -> Tensor:
    """Values at local positions."""
    out = x.new_empty(index.numel())
    _sparse.gather(_array(x), _place(x, index, layout, block), _array(out))
    return out


def subtract(x: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int) -> None:
    """x[index] -= value."""
    _check_pair(index, value)
    _sparse.subtract(_array(x), _place(x, index, layout, block), _array(value))


def merge(
    x: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int, stats: Tensor | None, flags: Tensor
) -> None:
    """x[index] += value; moves the counts from the old bins to the new."""
    _check_pair(index, value)
    places = _place(x, index, layout, block)
    row = None
    if stats is not None:
        _check_stats(layout, stats)
        row = _array(stats)[block]
    _sparse.merge(_array(x), _array(x).view(_UNSIGNED[x.dtype]), places, _array(value), row, _array(flags))


def restore(
    x: Tensor, grad: Tensor, residual: Tensor | None, index: Tensor, keep: Tensor, layout: Layout, block: int
) -> None:
    """Writes grad + residual where index is not in keep."""
    _check_length(layout, grad, residual)
    old = None if residual is None else _array(residual)
    places = _place(x, index, layout, block)
    _sparse.restore(_array(x), _array(grad), old, _array(index), places, _array(keep))


def scatter(out: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int) -> None:
    """out[index] = value."""
    _check_pair(index, value)
    _sparse.scatter(_array(out), _place(out, index, layout, block), _array(value))


def merge_sum(a: Sparse, b: Sparse) -> Sparse:
    """The sum of two sparse vectors."""
    _check_pair(a.index, a.value)
    _check_pair(b.index, b.value)
    room = a.index.numel() + b.index.numel()
    index, value = a.index.new_empty(room), a.value.new_empty(room)
    lists = (_array(t) for t in (a.index, a.value, b.index, b.value, index, value))
    found = _sparse.merge_sum(*lists)
    return Sparse(index[:found], value[:found], a.numel)


def elias_fano_encode(index: Tensor, m: int, out: Tensor) -> None:
    """Low bits verbatim, then a unary bitmap of the high parts."""
    k = index.numel()
    _check_code(out, k, m, wire.elias_fano_words(k, m))
    if not _code.elias_fano_encode(_array(index), m, wire.low_bits(k, m), _words(out)):
        raise _disorder(m)


def elias_fano_decode(words: Tensor, k: int, m: int, flags: Tensor) -> Tensor:
    """The inverse of elias_fano_encode, on any bits."""
    _check_code(words, k, m, wire.elias_fano_words(k, m))
    out = torch.empty(k, dtype=torch.int64, device="cpu")
    _code.elias_fano_decode(_words(words), k, m, wire.low_bits(k, m), _array(out), _array(flags))
    return out


def bitmap_encode(index: Tensor, m: int, out: Tensor) -> None:
    """Bit i % 32 of word i // 32."""
    _check_code(out, index.numel(), m, wire.bitmap_words(m))
    if not _code.bitmap_encode(_array(index), m, _words(out)):
        raise _disorder(m)


def bitmap_decode(words: Tensor, k: int, m: int, flags: Tensor) -> Tensor:
    """The inverse of bitmap_encode, on any bits."""
    _check_code(words, k, m, wire.bitmap_words(m))
    out = torch.empty(k, dtype=torch.int64, device="cpu")
    _code.bitmap_decode(_words(words), m, _array(out), _array(flags))
    return out


def narrow(value: Tensor, out: Tensor) -> Tensor:
    """Casts to the wire dtype, saturating; returns what a receiver reads."""
    _check_pair(value, out)
    decoded = torch.empty_like(value)
    _NARROW[out.dtype](_array(value), _array(out), _array(decoded))
    return decoded


def widen(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Wire values in the working dtype; torch's own cast is already one pass."""
    return value.to(dtype, copy=True)


def checksum(words: Tensor) -> Tensor:
    """Sum of mixed words."""
    if words.numel() < wire.HEADER_WORDS:
        raise SparcommError(f"checksum of {words.numel()} words: needs at least the {wire.HEADER_WORDS} of a header")
    return torch.from_numpy(np.array(_code.checksum(_words(words)), np.uint32).view(np.int32))


def _array(tensor: Tensor) -> Any:
    """A NumPy view; bfloat16 as uint16 and float16 as int16, which NumPy or Numba cannot hold."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype in _VIEWS:
        return tensor.view(torch.int16).numpy().view(_VIEWS[tensor.dtype])
    return tensor.numpy()


def _words(tensor: Tensor) -> Any:
    return tensor.numpy().view(np.uint32)


def _cut(layout: Layout) -> tuple[Any, int]:
    return layout.slot.contiguous().numpy(), layout.tile


def _place(x: Tensor, index: Tensor, layout: Layout, block: int) -> Any:
    _check_length(layout, x)
    _check_block(layout, block)
    slot, tile = _cut(layout)
    return _sparse.place(_array(index), slot, block, tile, layout.numel)


# Compiled loops do not check bounds: these checks are what makes every access above a safe one.


def _check_length(layout: Layout, *vectors: Tensor | None) -> None:
    for vector in vectors:
        if vector is not None and not (vector.shape == (layout.numel,) and vector.is_contiguous()):
            raise SparcommError(
                f"a vector of shape {tuple(vector.shape)}, stride {vector.stride()} in a layout of {layout.numel} "
                "elements: must be flat and contiguous, of just that length"
            )


def _check_block(layout: Layout, block: int) -> None:
    if not 0 <= block < layout.blocks:
        raise SparcommError(f"block={block} must be in [0, {layout.blocks})")


def _check_stats(layout: Layout, stats: Tensor, block: int = 0) -> None:
    _check_block(layout, block)
    if stats.shape != (layout.blocks, wire.BINS):
        raise SparcommError(f"statistics of shape {tuple(stats.shape)}: must be ({layout.blocks}, {wire.BINS})")


def _check_pair(index: Tensor, value: Tensor) -> None:
    if index.shape != value.shape:
        raise SparcommError(f"shapes {tuple(index.shape)} and {tuple(value.shape)} must be equal")


def _check_code(words: Tensor, k: int, m: int, expected: int) -> None:
    if words.numel() != expected or not 0 <= k <= m:
        raise SparcommError(
            f"code of k={k} indices below m={m} in {words.numel()} words: needs 0 <= k <= m and {expected} words"
        )


def _disorder(m: int) -> SparcommError:
    return SparcommError(f"indices to be coded must be strictly increasing, from 0 to below m={m}")
