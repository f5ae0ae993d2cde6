"""Tensors as the NumPy views that compiled loops take; nothing is copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_VIEWS = {torch.bfloat16: np.uint16, torch.float16: np.int16}
_WIDTHS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def array(tensor: Tensor) -> Any:
    """The numbers; bfloat16 as uint16 and float16 as int16, which NumPy or Numba cannot hold."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype in _VIEWS:
        return tensor.view(torch.int16).numpy().view(_VIEWS[tensor.dtype])
    return tensor.numpy()


def bits(tensor: Tensor) -> Any:
    """What they are stored as, as signed integers."""
    return tensor.detach().view(_WIDTHS[tensor.element_size()]).numpy()


def words(tensor: Tensor) -> Any:
    """32-bit words as uint32."""
    return tensor.numpy().view(np.uint32)
