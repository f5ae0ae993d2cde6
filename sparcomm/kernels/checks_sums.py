"""Arguments of a step's sums that no kernel may be given: compiled loops check no bounds, these do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparcomm.errors import SparcommError
from sparcomm.kernels._entries import magnitude
from sparcomm.layout import Layout


def check_length(layout: Layout, *vectors: Tensor | None) -> None:
    """Raises SparcommError unless these are flat and contiguous, as long as the layout says."""
    for vector in vectors:
        if vector is not None and not (vector.shape == (layout.numel,) and vector.is_contiguous()):
            raise SparcommError(
                f"a vector of shape {tuple(vector.shape)}, stride {vector.stride()} in a layout of {layout.numel} "
                "elements: must be flat and contiguous, of just that length"
            )


def check_working(x: Tensor, layout: Layout) -> None:
    """Raises SparcommError unless ``x`` may hold sums."""
    if x.dtype not in (torch.float32, torch.float64) or x.shape != (layout.numel,) or not x.is_contiguous():
        raise SparcommError(
            f"sums in {x.dtype}{list(x.shape)}, stride {x.stride()}: must be float32 or float64, flat and "
            f"contiguous, of the layout's {layout.numel} elements"
        )


def check_floor(floor: Tensor | None, x: Tensor, layout: Layout) -> None:
    """Raises SparcommError unless there is a floor for each block, or none at all."""
    if floor is not None and (floor.dtype != x.dtype or floor.shape != (layout.blocks,)):
        raise SparcommError(
            f"floor is {floor.dtype}{list(floor.shape)}: must be {x.dtype}[{layout.blocks}], one magnitude a block"
        )


def check_block(layout: Layout, block: int) -> None:
    """Raises SparcommError unless the layout has such a block."""
    if not 0 <= block < layout.blocks:
        raise SparcommError(f"block={block} must be in [0, {layout.blocks})")


def check_k(what: str, k: int, length: int) -> None:
    """Raises SparcommError unless so many can be selected."""
    if not 0 <= k <= length:
        raise SparcommError(f"{what}: k={k} must be in [0, {length}], as many as there are")


def check_pair(index: Tensor, value: Tensor) -> None:
    """Raises SparcommError unless there are as many of one as of the other."""
    if index.shape != value.shape:
        raise SparcommError(f"shapes {tuple(index.shape)} and {tuple(value.shape)} must be equal")


def check_sample(grad: Tensor, residual: Tensor | None, count: int) -> None:
    """Raises SparcommError unless a sample of so many can be drawn of these."""
    if count < 1 or count & (count - 1) or grad.dim() != 1 or (residual is not None and residual.shape != grad.shape):
        shapes = " and ".join(str(tuple(t.shape)) for t in (grad, residual) if t is not None)
        raise SparcommError(f"count={count} of {shapes}: must be a power of two, of flat vectors of one shape")


def check_gaussian(x: Tensor) -> None:
    """Raises SparcommError unless ``x`` has moments."""
    if x.dtype not in (torch.float32, torch.float64) or x.dim() != 1 or not x.is_contiguous() or not x.numel():
        raise SparcommError(
            f"moments of {x.dtype}{list(x.shape)}, stride {x.stride()}: must be float32 or float64, flat and "
            "contiguous, of at least one element"
        )


def key_of(threshold: float, dtype: torch.dtype) -> int:
    """The magnitude, as bits, of the largest number of ``dtype`` that is not above ``threshold``.

    What exceeds one exceeds both. Raises SparcommError for a threshold that is negative or not finite.
    """
    if not 0 <= threshold < math.inf:
        raise SparcommError(f"threshold={threshold} must be a finite number, 0 or more")
    near = torch.tensor(threshold, dtype=dtype, device="cpu")
    if near.item() > threshold:
        near = near.nextafter(torch.zeros_like(near))
    return int(magnitude(near.view(1)))
