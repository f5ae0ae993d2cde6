"""Which gradients are taken, and in which dtype they are worked on."""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm.errors import GradientError

GRADIENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and residuals of a gradient of ``dtype`` are kept: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_gradient(grad: Tensor) -> None:
    """Raises GradientError unless ``grad`` is a dense, contiguous, one-dimensional float tensor."""
    if grad.layout != torch.strided:
        raise GradientError(
            f"gradient has layout {grad.layout}, and algorithms take flat dense ones: only the DDP hook sums sparse "
            "layouts, those of nn.Embedding(..., sparse=True); elsewhere use sparse=False"
        )
    if grad.dtype not in GRADIENT_DTYPES:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in GRADIENT_DTYPES)
        raise GradientError(f"gradient has dtype {grad.dtype}, must be one of {allowed}")
    if grad.dim() != 1 or not grad.is_contiguous():
        raise GradientError(
            f"gradient must be flat and contiguous, has shape {tuple(grad.shape)}, stride {grad.stride()}"
        )
