"""The one-bit all-reduce of 1-bit Adam and 1-bit LAMB: signs and a mean, with error feedback on both sides.

Source: Tang et al., "1-bit Adam", ICML 2021 (arXiv 2102.02888), algorithm 1; Li et al., "1-bit LAMB", HiPC 2022; the
scale after Karimireddy et al., "Error Feedback Fixes SignSGD", ICML 2019. A rank sends, of every chunk of gradient +
residual, signs and the mean of magnitudes, and keeps the rest; the chunk's owner adds up what comes, sends the sum's
signs and mean of magnitudes to all, and keeps the rest. Cost: 1 + ceil(log2 p) rounds and 2(p-1) bags of n/p bits.

Deviations:

- No second buffer for the owner's error: what the owner sends is taken from its own, exact share of the chunk plus
  what came, and the difference goes into its residual there. Its own share goes nowhere and is rounded to a sign once,
  not twice. (An owner that leaves takes no more with it than its residual.)
- Scales are means of magnitudes, not root mean squares, which only shrink the error if the values are not too unequal;
  each chunk has its own, of 8 significant bits, so that what is kept is the exact difference.
- ``mask`` tells zeros apart, where the published code has the user pass a mask for weights that get no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparcomm.algorithms.base import Algorithm, Cost, Reduced, State
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.signs import Cut, Signs, check_flag, check_rule
from sparcomm.dtypes import working_dtype
from sparcomm.kernels import kernels_for
from sparcomm.kernels.interface_bits import RULES
from sparcomm.memory import owing
from sparcomm.transport.base import Transport


@dataclass(frozen=True)
class OneBitAllReduce(Algorithm):
    """Signs times the mean magnitude of each chunk, twice; what that leaves out is owed. For gradients or momenta.

    All entries of a chunk come back with one magnitude, so the norm of what comes back says nothing about the
    gradients: clipping by a global norm has no meaning behind it. Clip before (``attach(local_clip=...)``, or the
    vector that is handed over). Where a weight never gets a gradient, such as a row of an embedding that is not used,
    one bit cannot say so: it is moved to and fro by its chunk's magnitude, unless ``mask`` is set.

    Args:
        zero: the sign of zeros: "positive", "negative", or "alternate" (a hash of position and step: half of each).
            What it adds is owed.
        mask: send a second bit that tells zeros apart: they are then no part of the means, and a position that is zero
            on every rank comes back as zero. Doubles the bytes.
    """

    name: ClassVar[str] = "onebit"
    zero: str = field(default="positive", metadata={"choices": RULES})
    mask: bool = False

    def __post_init__(self) -> None:
        check_rule("zero", self.zero)
        check_flag("mask", self.mask)

    @property
    def conserves(self) -> bool:
        """Always."""
        return True

    @property
    def coarse(self) -> bool:
        """One bit says little of a value: most of it may still be owed."""
        return True

    @classmethod
    def cases(cls, size: int) -> list[Algorithm]:
        """With and without mask, and every sign of zeros."""
        return [cls(), cls("negative"), cls("alternate"), cls(mask=True)]

    def _cut(self, n: int, size: int) -> Cut:
        return Cut(n, size, scaled=True, masked=self.mask)

    def _reduce(self, grad: Tensor, residual: Tensor | None, state: State, step: int, transport: Transport) -> Reduced:
        n, space = grad.numel(), state.workspace
        bags = Bags(kernels_for(grad), state.unit, step, grad.device, state.damage)
        with state.clock.span("code"):
            x = owing(grad, residual, space)
            total = space.take(n, working_dtype(grad.dtype), grad.device)
        signs = Signs(self._cut(n, transport.size), self.zero, bags, transport, state.clock, space)
        signs.compensate(x, lambda mean, _: mean, total)
        state.damage = bags.damage()
        return Reduced(total, x, None, state, bags.ok())

    def cost(self, n: int, dtype: torch.dtype, size: int, state: State | None = None) -> Cost:
        """Exact, and the same for every rank and dtype."""
        return Cost(*self._cut(n, size).traffic) if n else Cost(0, 0, 0)

    def kept(self, n: int, size: int) -> int:
        """All n."""
        return n
