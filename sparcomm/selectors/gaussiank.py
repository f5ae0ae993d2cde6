"""Gaussian-k: a threshold from mean and deviation, as if entries were normal, and what happens where they are not.

Source: Shi, Chu, Cheung & See, "Understanding Top-k Sparsification in Distributed Deep Learning", arXiv 1911.08772,
2019. With u = gradient + residual and z = Phi^-1(1 - k / 2n) the threshold is mean(u) + z std(u). Then the entries
above it are counted, up to three times: fewer than 2k/3 halve it, more than 4k/3 raise it by half, and what was last
counted is sent.

``guard=False`` is that rule. Of 4 million Laplace, Student-t(3) or log-normal(1.5) values at density 1e-4 it sends
0.05, 6 or 17 times k, and it goes through the whole vector for mean and deviation, and for every count of many.

The guarded rule, our own, estimates on a sample and believes no estimate. Deviations from the paper:

* Mean, deviation and adjustments are those of 2^15 sampled elements (``kernels.sample``; of all, where there are no
  more), adjusted only where a sample of that size is sure: by two standard deviations of its count.
* The same sample gives the floor of the one pass over the vector, which lists what may be picked: a magnitude that 4k/3
  positions of a block reach almost surely. Counts and selections then look at the list alone.
* If the count above the threshold is not from 2k/3 to 4k/3, exactly the k largest are picked instead. So it is with
  fewer non-zeros than 2k/3, or where all entries are equal: k are picked, zeros and ties from the lowest position on.
* Where exactly k are wanted (``take``) they are the k largest. A guarded Gaussian-k in an algorithm of fixed size sends
  just what TopK does.
  So nothing is estimated there, unless thresholds are to be reused (``taking``).
* With ``reestimate_every`` = s the threshold and the floor are used for s steps. A miss gives a new threshold at once,
  the exact one, since the k largest have then been found; a floor that is off is estimated anew in the next step.

Memory passes over n: one, whether an estimate hits or not. A block is looked at again only where the sample misled,
which four standard deviations make rare, where a reused floor is off, or where so many elements are equal that there is
no list. Of vectors of up to 2^15 elements, and of contiguous blocks, which differ in scale, the floor is the kernels'
own: ``pick`` may then count a block once more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sparcomm.errors import ConfigError
from sparcomm.kernels import Kernels
from sparcomm.kernels.gauss import adjusted, moments
from sparcomm.kernels.interface import Working
from sparcomm.layout import Layout
from sparcomm.selectors.base import Choice, Exact, Memo, Selector, summed
from sparcomm.selectors.topk import TopK

SAMPLES = 1 << 15
LONG = 2  # a reused floor is off if so many times more positions reach it than when it was found: for so many is room


@dataclass(frozen=True)
class GaussianK(Selector):
    """About k entries: those above a threshold that would leave k of as many normal ones.

    Args:
        guard: pick from 2k/3 to 4k/3 entries, whatever the distribution; exactly the k largest where the threshold
            leaves more or fewer. False: the published rule, which may pick any number.
        adjust: how often the threshold may be adjusted, 0 to 100.
        reestimate_every: steps that use a threshold before it is estimated anew, at least 1.

    Raises:
        ConfigError: a value outside what is allowed.
    """

    name: ClassVar[str] = "gaussiank"
    guard: bool = True
    adjust: int = 3
    reestimate_every: int = 1

    def __post_init__(self) -> None:
        guard: Any = self.guard
        if not isinstance(guard, bool):
            raise ConfigError(f"guard={guard!r}: must be True or False")
        _check_whole("adjust", self.adjust, 0, 100)
        _check_whole("reestimate_every", self.reestimate_every, 1, None)

    @property
    def fixed(self) -> bool:
        """Never."""
        return False

    def most(self, k: int, m: int) -> int:
        """4k/3, rounded down; all m without the guard."""
        return min(m, 4 * k // 3) if self.guard else m

    def taking(self) -> Selector:
        """Exact top-k, where there is a guard and no threshold to be reused: nothing has to be estimated."""
        return TopK() if self.guard and self.reestimate_every == 1 else self

    def start(
        self, kernels: Kernels, grad: Tensor, residual: Tensor | None, out: Tensor | None, layout: Layout, k: int,
        flags: Tensor, memo: Memo,
    ) -> Choice:  # fmt: skip
        """One pass, and without the guard more to find the threshold, for which the host then waits."""
        if k <= 0 or not layout.numel:
            return Exact(kernels, summed(kernels, grad, residual, out, layout, k, flags))
        k = min(k, layout.length)
        again = memo.fits(layout, k, self.reestimate_every)
        memo.age += again
        if not self.guard:
            floor = memo.threshold if again else None
            work = summed(kernels, grad, residual, out, layout, k, flags, floor)
            if not again:
                memo.renew(layout, k, self._published(kernels, work, k), None)
            return Above(kernels, work, memo.threshold or 0.0)
        drawn = None if again else kernels.sample(grad, residual, SAMPLES)
        if drawn is not None:
            memo.renew(layout, k, None, _floor(drawn, layout, self.most(k, layout.length)))
        room = self.most(k, layout.length) * (LONG if again else 1)
        work = summed(kernels, grad, residual, out, layout, room, flags, memo.floor)
        return Guarded(kernels, work, self, memo, k, drawn)

    def _published(self, kernels: Kernels, work: Working, k: int) -> float:
        """The paper's threshold; finite, and at least 0, above which zeros are not: they need not be sent."""
        layout = work.layout
        wanted = min(k * layout.blocks, layout.numel)
        z = _quantile(wanted / layout.numel)
        if work.out.device.type != "cpu":  # one wait for the device, not one for each count
            return _usable(float(kernels.gaussian(work.out, z, wanted, 0.0, self.adjust)[0]), work.out.dtype)
        mean, deviation = moments(work.out)

        def count(threshold: float) -> int:
            usable = _usable(threshold, work.out.dtype)
            return sum(kernels.count_above(work, b, usable) for b in range(layout.blocks))

        counted, _ = adjusted(mean + z * deviation, wanted, 0.0, self.adjust, count)
        return _usable(counted, work.out.dtype)

    def estimate(self, kernels: Kernels, drawn: Tensor, layout: Layout, k: int) -> float:
        """The guarded rule's threshold, from a sample of the vector; may be negative or not finite.

        Args:
            drawn: what ``kernels.sample`` gave.
            k: of each block.
        """
        share = min(1.0, k * layout.blocks / layout.numel)
        wanted = share * drawn.numel()
        doubt = 2 * math.sqrt(wanted) if layout.numel > drawn.numel() else 0.0
        return float(kernels.gaussian(drawn, _quantile(share), wanted, doubt, self.adjust)[1])


class Guarded(Choice):
    """Chooses above a threshold where that leaves about as many as wanted, else the largest."""

    def __init__(
        self, kernels: Kernels, work: Working, rule: GaussianK, memo: Memo, k: int, drawn: Tensor | None
    ) -> None:
        super().__init__(kernels, work)
        self._rule, self._memo, self._k, self._drawn = rule, memo, k, drawn

    def take(self, block: int, k: int) -> tuple[Tensor, Tensor]:
        """The k largest."""
        if self._is_off(block):
            self._memo.expire()
        return self.kernels.select(self.work, block, k)

    def pick(self, block: int, k: int) -> tuple[Tensor, Tensor]:
        """What is above the threshold, if that are from 2k/3 to 4k/3; else the k largest."""
        memo, off = self._memo, self._is_off(block)
        least, most = -(-2 * k // 3), self._rule.most(k, self.work.layout.length)
        threshold = self._threshold()
        # Below the floor there are more than wanted, and counting them would take a pass over the block.
        if threshold is not None and threshold >= (memo.floor or 0.0):
            found = self.kernels.count_above(self.work, block, threshold)
            if least <= found <= most:
                if off:
                    memo.expire()
                return self.kernels.above(self.work, block, threshold, found)
        index, value = self.kernels.select(self.work, block, k)
        if off:
            memo.expire()
        elif memo.age and self._rule.reestimate_every > 1 and k == self._k:
            memo.threshold, memo.age = _just_below(value), 1
        return index, value

    def _threshold(self) -> float | None:
        """This step's; None if none can be."""
        if self._drawn is not None:
            found = self._rule.estimate(self.kernels, self._drawn, self.work.layout, self._k)
            self._memo.threshold = _usable(found, self.work.out.dtype) if math.isfinite(found) else None
            self._drawn = None
        return self._memo.threshold

    def _is_off(self, block: int) -> bool:
        """Whether the floor has let too few positions into the list, or far too many, and is to be reused."""
        floor, layout = self._memo.floor, self.work.layout
        if floor is None or self._rule.reestimate_every == 1:
            return False
        most = self._rule.most(self._k, layout.length)
        expected = layout.length * _place(most * layout.blocks, layout.numel) / SAMPLES
        return not most <= self.kernels.count_above(self.work, block, floor) <= LONG * expected


class Above(Choice):
    """Chooses what is above a threshold, however much that is."""

    def __init__(self, kernels: Kernels, work: Working, threshold: float) -> None:
        super().__init__(kernels, work)
        self.threshold = threshold

    def take(self, block: int, k: int) -> tuple[Tensor, Tensor]:
        """The first k in the order of positions, as public implementations cut; zeros fill up where there are fewer."""
        return self.kernels.above(self.work, block, self.threshold, k)

    def pick(self, block: int, k: int) -> tuple[Tensor, Tensor]:
        """All, with no limit."""
        found = self.kernels.count_above(self.work, block, self.threshold)
        return self.kernels.above(self.work, block, self.threshold, found)


def _quantile(share: float) -> float:
    """The z such that a standard normal value exceeds it in magnitude with probability ``share``, in (0, 1]."""
    return -NormalDist().inv_cdf(share / 2)  # of the small number, since 1 - share / 2 may round to 1


def _place(k: int, n: int) -> int:
    """Which of SAMPLES sampled magnitudes, from the largest, is a floor that k of n reach almost surely.

    How many of the k largest are in a sample varies by the root of their expected number: four times that is added.
    """
    expected = SAMPLES * k / n
    return math.ceil(expected + 4 * math.sqrt(expected)) + 4


def _floor(drawn: Tensor, layout: Layout, k: int) -> float | None:
    """A floor for k of each block; None where the kernels find better ones: few elements, blocks of unlike scale."""
    place = _place(k * layout.blocks, layout.numel)
    unlike = layout.blocks > 1 and layout.rounds == 1  # contiguous pieces, of different layers
    if drawn.device.type != "cpu" or layout.numel <= SAMPLES or place >= SAMPLES or unlike:
        return None
    floor = float(np.partition(drawn.abs().numpy(), SAMPLES - place)[SAMPLES - place])  # NaN is the largest here, too
    if not math.isfinite(floor):
        return None
    smallest = drawn.new_zeros(()).nextafter(drawn.new_ones(()))
    return max(floor, float(smallest))  # which lets in all but zeros, for which no list is needed


def _usable(threshold: float, dtype: torch.dtype) -> float:
    """The nearest threshold that kernels take: finite, 0 or more. What is not a number becomes the largest."""
    largest = torch.finfo(dtype).max
    return min(max(threshold, 0.0), largest) if not math.isnan(threshold) else largest


def _just_below(value: Tensor) -> float | None:
    """The largest threshold that all of ``value`` exceed; None if there is none."""
    if not value.numel():
        return None
    least = value.abs().min()
    threshold = float(least.nextafter(torch.zeros_like(least)))
    return threshold if float(least) > 0 and math.isfinite(threshold) else None


def _check_whole(name: str, value: Any, least: int, greatest: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (greatest and value > greatest):
        allowed = f"from {least} to {greatest}" if greatest else f"of at least {least}"
        raise ConfigError(f"{name}={value!r}: must be a whole number {allowed}")
