"""The k largest by magnitude, exactly: what every published bound assumes, and here hardly slower than an estimate.

Source: the kernels' ``select``, a radix selection of the few entries that one pass has found worth a look. Memory
passes over n: one; a second of a block only where the pass's sample misled it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparcomm.kernels import Kernels
from sparcomm.layout import Layout
from sparcomm.selectors.base import Choice, Exact, Memo, Selector, summed


@dataclass(frozen=True)
class TopK(Selector):
    """The k largest entries by magnitude, ties to the lowest position."""

    name: ClassVar[str] = "topk"

    @property
    def fixed(self) -> bool:
        """Always."""
        return True

    def most(self, k: int, m: int) -> int:
        """As many as asked for."""
        return min(k, m)

    def start(
        self, kernels: Kernels, grad: Tensor, residual: Tensor | None, out: Tensor | None, layout: Layout, k: int,
        flags: Tensor, memo: Memo,
    ) -> Choice:  # fmt: skip
        """One pass; nothing is remembered."""
        return Exact(kernels, summed(kernels, grad, residual, out, layout, k, flags))
