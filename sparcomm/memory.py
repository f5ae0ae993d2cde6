"""What a rank still owes: error feedback."""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm.dtypes import working_dtype
from sparcomm.workspace import Workspace


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


def owing(grad: Tensor, residual: Tensor | None, workspace: Workspace) -> Tensor:
    """Gradient + residual in the working dtype, in a buffer of ``workspace``: what becomes the next residual."""
    out = workspace.take(grad.numel(), working_dtype(grad.dtype), grad.device)
    return out.copy_(grad) if residual is None else torch.add(residual, grad, out=out)
