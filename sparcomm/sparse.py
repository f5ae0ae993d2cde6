"""A sparse vector: sorted distinct indices, their values, and the length of the vector they live in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Sparse:
    """``index``: (k,) int64, strictly increasing, in [0, numel); ``value``: (k,) float; ``numel``: dense length."""

    index: Tensor
    value: Tensor
    numel: int

    def dense(self) -> Tensor:
        """The vector written out: (numel,) of ``value``'s dtype."""
        out = torch.zeros(self.numel, dtype=self.value.dtype, device=self.value.device)
        out[self.index] = self.value
        return out
