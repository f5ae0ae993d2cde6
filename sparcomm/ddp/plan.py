"""What one step does: the mode of its units, the same on all ranks, settled before its first bucket is taken in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from sparcomm.algorithms.base import Algorithm
from sparcomm.algorithms.dense import Dense

Mode = Literal["sparse", "dense", "flush"]


@dataclass(frozen=True, eq=False)
class Plan:
    """One step's.

    Attributes:
        mode: "sparse": the algorithm, with error feedback. "dense": the mean of the gradients alone, whole; residuals
            stay as they are. "flush": gradient + residual, whole; nothing is owed afterwards.
        density: in place of the algorithm's own, or None.
        joined: this rank has run out of inputs: it sends zeros and keeps what it owes.
        scale: () the loss scale that gradients carry, or None.
        rates: learning rates by id of parameter, for residuals that follow them; empty if they do not.
        dense: what reduces in the modes "dense" and "flush".
    """

    mode: Mode = "sparse"
    density: float | None = None
    joined: bool = False
    scale: Tensor | None = None
    rates: dict[int, float] = field(default_factory=dict[int, float])
    dense: Algorithm = field(default_factory=Dense)

    def algorithm(self, own: Algorithm) -> Algorithm:
        """The one to use for a unit whose algorithm is ``own``."""
        if self.mode != "sparse":
            return self.dense
        if self.density is None or getattr(own, "density", None) in (None, self.density):
            return own
        return own.with_density(self.density)
