"""What a rank still owes: error feedback."""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.dtypes import working_dtype
from sparcomm.kernels import kernels_for
from sparcomm.layout import Layout
from sparcomm.workspace import Workspace


def compensate(grad: Tensor, residual: Tensor | None, out: Tensor, layout: Layout, flags: Tensor) -> Tensor:
    """Error feedback and the selection's statistics in one pass: ``out`` = gradient + residual.

    Args:
        grad, residual: (n,); the residual in the working dtype, or None for zeros. Not modified.
        out: (n,) working dtype, overwritten; the working buffer of the step that becomes the next residual.
        flags: (1,) uint8; wire.NONFINITE is set if an inf or NaN is seen.

    Returns:
        (layout.blocks, wire.BINS) histograms of the magnitudes in each block.
    """
    stats = torch.empty((layout.blocks, wire.BINS), dtype=torch.int64, device=grad.device)
    kernels_for(grad).compensate(grad, residual, out, stats, layout, flags)
    return stats


def compensated(grad: Tensor, residual: Tensor | None) -> Tensor:
    """Gradient + residual in the working dtype; the gradient itself where nothing has to be done."""
    if residual is None:
        return grad.to(working_dtype(grad.dtype))
    return residual + grad


def nothing_owed(grad: Tensor, workspace: Workspace) -> Tensor | None:
    """The residual of a rank whose whole gradient left: None, or zeros where the mean's cast back may owe something."""
    if grad.dtype == working_dtype(grad.dtype):
        return None
    return workspace.take(grad.numel(), working_dtype(grad.dtype), grad.device).zero_()
