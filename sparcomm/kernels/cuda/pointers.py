"""What may be handed to a kernel as a bare pointer, which tells neither dtype nor stride nor device."""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm.errors import SparcommError


def together(like: Tensor, *tensors: Tensor | None) -> None:
    """Raises SparcommError unless all of these lie where ``like`` does."""
    for t in tensors:
        if t is not None and t.device != like.device:
            raise SparcommError(f"tensors on {like.device} and {t.device}: must be on one device")


def readable(name: str, t: Tensor, dtype: torch.dtype, like: Tensor) -> Tensor:
    """``t``, or a contiguous copy of it. Raises SparcommError unless it is of ``dtype``, where ``like`` is."""
    together(like, t)
    if t.dtype != dtype:
        raise SparcommError(f"{name} is {t.dtype}: must be {dtype}")
    return t.detach().contiguous()


def writable(name: str, t: Tensor, dtype: torch.dtype, like: Tensor) -> Tensor:
    """``t``. Raises SparcommError unless it is contiguous, of ``dtype``, where ``like`` is."""
    together(like, t)
    if t.dtype != dtype or not t.is_contiguous():
        raise SparcommError(f"{name} is {t.dtype}{list(t.shape)}, stride {t.stride()}: must be {dtype}, contiguous")
    return t
