"""A look now and then at what compression does to training: every N steps one unit is also reduced densely.

What such a look gives, for one unit (round robin), the same on all ranks:

- ``cosine``: between the delivered mean and the dense mean of the step's gradients.
- ``energy``: of the sum over ranks of gradient + residual (S, what there was to deliver) the energy captured by what
  was delivered (T), |S|² - |S - T|², against that of the exact top-k of S with as many entries. 1 is a perfect choice.
- ``captured``: the same energy against all of |S|²: how much of what there was to deliver has gone.
- ``residual_ratio``: norm of the residual after the step to that of the gradient, mean and maximum over ranks.
- ``age``: steps since unsent entries were last sent, over all ranks: median, 90th percentile, maximum.

Ages come from a fixed sample of at most 4096 positions per unit, which is followed in every step: a few gathers. A
position counts as sent when most of what it held is gone; one that owed nothing before a step has age 1 after it.

A look costs two dense all-reduces and two buffers of the unit's size. Nothing here makes the host wait for a device
but reading the figures, which happens at the beginning of the next step, once per look.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sparcomm.algorithms.base import Algorithm
from sparcomm.clock import Range
from sparcomm.ddp.log import RankLogger
from sparcomm.ddp.units import Unit
from sparcomm.dtypes import working_dtype
from sparcomm.errors import ConfigError
from sparcomm.kernels import kernels_for
from sparcomm.layout import whole
from sparcomm.transport.base import Transport

SAMPLE = 4096
_JOINED = -1  # the age of an entry that is not asked


@dataclass(frozen=True)
class Check:
    """How often to look, and what must not be exceeded. A limit of None is none.

    A limit that is crossed makes the next step a dense one that delivers all residuals.

    Args:
        every: steps from one look to the next; each looks at one unit.
        max_age: steps; crossed when a tenth of the unsent entries are older (the figure ``age_p90``).
        max_residual_ratio: of residual to gradient, on any rank.
        min_energy: in (0, 1]: of the energy that the exact top-k would capture.
        min_cosine: in [-1, 1]: between delivered and dense mean.

    Raises:
        ConfigError: a value outside what is allowed.
    """

    every: int = 100
    max_age: int | None = None
    max_residual_ratio: float | None = None
    min_energy: float | None = None
    min_cosine: float | None = None

    def __post_init__(self) -> None:
        for name in ("every", "max_age"):
            value: object = getattr(self, name)
            if not (value is None and name == "max_age") and (type(value) is not int or value < 1):
                raise ConfigError(f"Check({name}={value!r}): must be a whole number of steps, at least 1")
        for name, low, high in (("max_residual_ratio", 0, math.inf), ("min_energy", 0, 1), ("min_cosine", -1, 1)):
            value = getattr(self, name)
            if value is None:
                continue
            inside = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
            if not inside or (low == 0 and value == 0):
                allowed = "above 0" if high == math.inf else f"{'above 0' if low == 0 else 'from -1'} and at most 1"
                raise ConfigError(f"Check({name}={value!r}): must be a number {allowed}")

    def crossed(self, figures: dict[str, float]) -> list[str]:
        """Which limits ``figures`` cross, in words."""
        tests = (
            ("max_age", figures["age_p90"], 1), ("max_residual_ratio", figures["residual_ratio_max"], 1),
            ("min_energy", figures["energy"], -1), ("min_cosine", figures["cosine"], -1),
        )  # fmt: skip
        found: list[str] = []
        for name, value, sign in tests:
            limit = getattr(self, name)
            if limit is not None and sign * value > sign * limit:
                what = {"max_age": "age", "max_residual_ratio": "residual ratio"}.get(name, name.removeprefix("min_"))
                found.append(f"{what} {value:.4g} is {'above' if sign > 0 else 'below'} {limit:g}")
        return found


class _Sample:
    """Some positions of one unit, and the step in which each was last sent."""

    def __init__(self, unit: Unit, step: int) -> None:
        n, m = unit.numel, min(unit.numel, SAMPLE)
        # One position at random in each of m strata: sorted, distinct, and in step with no period of the gradient.
        edge = torch.arange(m + 1, device="cpu") * n // m
        made = torch.Generator().manual_seed(unit.number)
        offset = (torch.rand(m, generator=made, dtype=torch.float64, device="cpu") * (edge[1:] - edge[:-1])).long()
        self.index = (edge[:-1] + offset).to(unit.device)
        self.last = torch.full((m,), step - 1, dtype=torch.int64, device=unit.device)
        self.offered = self.clear = self.sent = torch.empty(0, device="cpu")

    def before(self, grad: Tensor, residual: Tensor | None) -> None:
        offered = grad.index_select(0, self.index).to(working_dtype(grad.dtype))
        if residual is None:
            self.clear = torch.ones_like(self.index, dtype=torch.bool)
        else:
            owed = residual.index_select(0, self.index)
            self.clear = owed == 0
            offered += owed
        self.offered = offered.abs_()

    def after(self, residual: Tensor | None) -> None:
        if residual is None:
            self.sent = torch.ones_like(self.index, dtype=torch.bool)
        else:
            # Narrow values and a cast of the mean leave a small rest, which is no debt of age.
            self.sent = 2 * residual.index_select(0, self.index).abs_() <= self.offered

    def ages(self, step: int) -> Tensor:
        """As they are if this step is committed."""
        age = (step - self.last).masked_fill_(self.clear, 1)
        return age.masked_fill_(self.sent, 0)

    def commit(self, step: int, good: Tensor) -> None:
        self.last.masked_fill_(self.clear, step - 1)
        self.last.masked_fill_(self.sent & good.to(self.sent.device, non_blocking=True), step)


@dataclass(eq=False)
class _Look:
    """A unit's dense sums while it is reduced: of gradients, and of gradients + residuals. (n,) working dtype."""

    unit: Unit
    grads: Tensor
    offered: Tensor
    grad_norm: Tensor


@dataclass(eq=False)
class _Seen:
    """What one look gave, by rank, not yet read by the host."""

    step: int
    unit: int
    figures: Tensor
    ages: Tensor


class Monitor:
    """Makes the looks of one hook. All ranks make the same calls, since a look is collective.

    ``begin``, ``wants_flush`` and ``report`` belong to the thread that begins steps, while no job runs; ``before``,
    ``after`` and ``commit`` to the one that reduces.

    Args:
        check: the same on all ranks.
        transport: the hook's, so that what a look sends is counted.
        log: where rank 0 says that a limit was crossed.
    """

    def __init__(self, check: Check, transport: Transport, log: RankLogger) -> None:
        self.check = check
        self._transport, self._log = transport, log
        self._samples: WeakKeyDictionary[Unit, _Sample] = WeakKeyDictionary()  # a partition that goes takes its ages
        self._touched: list[_Sample] = []
        self._step, self._due = 0, None
        self._look: _Look | None = None
        self._seen: _Seen | None = None
        self._latest: dict[str, float] = {}
        self._looks = self._flushes = self._bytes = 0
        self._wanted = False
        self._flushing: int | None = None
        self._flushed: Tensor | None = None

    # ---- between steps -------------------------------------------------------------------------------------------

    def begin(self, step: int, units: Sequence[Unit]) -> Unit | None:
        """Opens a step; returns the unit that will be looked at.

        Args:
            units: those that travel compressed in this step, in the same order on all ranks; empty if it is a dense
                step, or if units are still being made.
        """
        self._read()
        self._step, self._due, self._look = step, None, None
        self._touched.clear()
        units = [u for u in units if u.numel]
        if units and step and step % self.check.every == 0:
            self._due = units[(step // self.check.every - 1) % len(units)]
        return self._due

    def wants_flush(self, step: int) -> bool:
        """Whether ``step``, about to begin, must deliver all residuals; true until such a step has been committed."""
        self._read()
        if self._flushed is not None and bool(self._flushed):
            self._wanted, self._flushes = False, self._flushes + 1
        self._flushed = None
        self._flushing = step if self._wanted else None
        return self._wanted

    def report(self) -> dict[str, Any]:
        """The latest figures with their ``step`` and ``unit``; ``looks``, ``flushes`` and ``bytes_sent`` by now."""
        self._read()
        flushes = self._flushes + (self._flushed is not None and bool(self._flushed))
        return {"looks": self._looks, "flushes": flushes, "bytes_sent": self._bytes, **self._latest}

    # ---- within a step -------------------------------------------------------------------------------------------

    def before(self, unit: Unit, grad: Tensor, residual: Tensor | None, *, joined: bool = False) -> None:
        """Called before a unit travels compressed. Collective in the steps that look at it.

        Args:
            grad: (numel,) what the algorithm is given. Read before this returns.
            residual: (numel,) what it is given beside it, on the unit's device, or None for zeros.
            joined: this rank has run out of input: its zeros count in the sums, its entries get no ages.
        """
        if not unit.numel:
            return
        if not joined:
            sample = self._samples.get(unit)
            if sample is None:
                sample = self._samples[unit] = _Sample(unit, self._step)
            sample.before(grad, residual)
            self._touched.append(sample)
        if unit is self._due:
            with self._looking():
                norm, grads = _norm(grad), grad.to(working_dtype(grad.dtype), copy=True)
                offered = grads.clone() if residual is None else grads + residual
                self._transport.all_reduce(grads)
                self._transport.all_reduce(offered)
                self._look = _Look(unit, grads, offered, norm)

    def after(
        self, unit: Unit, algorithm: Algorithm, mean: Tensor, residual: Tensor | None, scale: Tensor | None = None
    ) -> None:
        """Called when the same unit has been reduced. Collective in the steps that look at it.

        Args:
            algorithm: what reduced it.
            mean: (numel,) what was delivered, times ``scale``.
            residual: (numel,) what is owed if the step is committed, on the unit's device, or None for zeros.
            scale: () of the loss; ``before``'s gradient was without it.
        """
        sample = self._samples.get(unit)
        touched = sample is not None and any(s is sample for s in self._touched)
        if touched and sample is not None:
            sample.after(residual)
        look = self._look
        if look is None or look.unit is not unit:
            return
        self._look = None
        with self._looking():
            owed = torch.zeros_like(look.grad_norm) if residual is None else _norm(residual)
            if scale is not None:
                mean = mean.to(look.grads.dtype) / scale.to(mean.device)
            kept = algorithm.kept(unit.numel, self._transport.size)
            mine = torch.stack([look.grad_norm, owed, *_compare(look, mean, kept, self._transport.size)])
            if touched and sample is not None:
                ages = sample.ages(self._step).to(torch.int32)
            else:
                ages = torch.full((min(unit.numel, SAMPLE),), _JOINED, dtype=torch.int32, device=unit.device)
            self._seen = _Seen(self._step, unit.number, self._gathered(mine), self._gathered(ages))

    @contextmanager
    def _looking(self) -> Iterator[None]:
        sent = self._transport.traffic.bytes_sent
        with Range("check"):
            yield
        self._bytes += self._transport.traffic.bytes_sent - sent

    def commit(self, good: Tensor) -> None:
        """Called at the end of a step: ``good``, () bool, says whether it counts. The host waits for nothing."""
        for sample in self._touched:
            sample.commit(self._step, good)
        self._touched.clear()
        if self._flushing == self._step:
            self._flushed = good

    def _gathered(self, mine: Tensor) -> Tensor:
        out = mine.new_empty((self._transport.size, *mine.shape))
        self._transport.all_gather(out, mine)
        return out

    # ---- reading -------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Turns what the last look left on its device into figures, and compares them with the limits."""
        seen, self._seen = self._seen, None
        if seen is None:
            return
        figures = _figures(seen)
        if figures is None:
            return
        self._looks += 1
        self._latest = {"step": seen.step, "unit": seen.unit, **figures}
        crossed = self.check.crossed(figures)
        if crossed and not self._wanted:
            self._wanted = True
            self._log.tell(
                logging.WARNING, "step %d, unit %d: %s; the next step is dense and delivers all residuals",
                seen.step, seen.unit, ", ".join(crossed),
            )  # fmt: skip


def _norm(x: Tensor) -> Tensor:
    """() float64, since squares of small float32 values underflow."""
    return torch.linalg.vector_norm(x, dtype=torch.float64)


def _compare(look: _Look, mean: Tensor, kept: int, size: int) -> list[Tensor]:
    """() float64 each: |G|, |mean|, G·mean, |S|², energy of the top-k of S, |S - T|². Overwrites the look's sums."""
    offered, flags = look.offered, torch.zeros(1, dtype=torch.uint8, device=mean.device)
    kernels, one = kernels_for(offered), whole(offered.numel(), offered.device)
    work = kernels.compensate(offered, None, torch.empty_like(offered), one, kept, flags)
    best = kernels.select(work, 0, kept)[1]
    there = _norm(offered).square()
    left = _norm(offered.sub_(mean, alpha=size)).square()
    norm = _norm(look.grads)
    product = look.grads.mul_(mean).sum(dtype=torch.float64)
    return [norm, _norm(mean), product, there, _norm(best).square(), left]


def _figures(seen: _Seen) -> dict[str, float] | None:
    """The figures of one look, None if something was not finite or there was no gradient. Waits for the device."""
    rows: list[list[float]] = seen.figures.tolist()
    if not all(math.isfinite(x) for row in rows for x in row):
        return None
    # The same sums on all ranks, but a rank with another processor may differ in the last bit: rank 0's count.
    norm, delivered, product, there, best, left = rows[0][2:]
    if not norm or not there:
        return None
    ratios = [owed / grad for grad, owed in (row[:2] for row in rows) if grad]
    ages = seen.ages[seen.ages > 0].sort().values.cpu()
    return {
        "cosine": product / (norm * delivered) if delivered else 0.0,
        "energy": (there - left) / best,
        "captured": (there - left) / there,
        "residual_ratio": sum(ratios) / len(ratios),
        "residual_ratio_max": max(ratios),
        "age_median": _quantile(ages, 0.5),
        "age_p90": _quantile(ages, 0.9),
        "age_max": _quantile(ages, 1.0),
    }


def _quantile(ages: Tensor, q: float) -> int:
    """The smallest age that at least the share ``q`` does not exceed; 0 if there is none."""
    return int(ages[max(0, math.ceil(q * ages.numel()) - 1)]) if ages.numel() else 0
