"""How dense each step is: the density of a step by its number, the same on all ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from sparcomm.density import check_density
from sparcomm.errors import ConfigError


class Schedule(ABC):
    """The density of every step. A dataclass whose fields all ranks compare at start.

    Attributes:
        varies: whether it asks for densities other than the algorithm's own.
        compared: whether ranks must compare every step's answer, because the rule itself cannot be compared.
    """

    varies: bool = False
    compared: bool = False

    @abstractmethod
    def at(self, step: int, own: float | None) -> float | None:
        """The density of step ``step`` (from 0), ``own`` being the algorithm's; None for a dense step.

        In a dense step the mean of the gradients alone is sent, whole; residuals stay as they are.
        """


@dataclass(frozen=True)
class DenseFirst(Schedule):
    """Dense for the first ``steps`` steps, then as the algorithm is configured."""

    steps: int = 0

    def __post_init__(self) -> None:
        _check_count("warmup", self.steps)

    def at(self, step: int, own: float | None) -> float | None:
        """See Schedule. An algorithm without a density gets 1 for its own way."""
        return None if step < self.steps else own or 1.0


@dataclass(frozen=True)
class DensityWarmup(Schedule):
    """From ``start`` down to the algorithm's density, exponentially, in ``stages`` equal parts of ``steps`` steps.

    Source: Lin et al., "Deep Gradient Compression", ICLR 2018, section 3.3: 25 %, 6.25 %, 1.5625 %, 0.4 %, 0.1 %.

    Args:
        steps: how long it takes.
        start: density of the first stage, in (0, 1].
        stages: how many densities, the algorithm's own not included.

    Raises:
        ConfigError: a value outside what is allowed.
    """

    steps: int
    start: float = 0.25
    stages: int = 4
    varies = True

    def __post_init__(self) -> None:
        _check_count("steps", self.steps)
        _check_count("stages", self.stages, least=1)
        check_density(self.start)

    def at(self, step: int, own: float | None) -> float | None:
        """See Schedule."""
        end = own or 1.0
        if step >= self.steps or self.start <= end:
            return end
        stage = step * self.stages // self.steps
        return math.exp(math.log(self.start) + (math.log(end) - math.log(self.start)) * stage / self.stages)


@dataclass(frozen=True)
class Refresh(Schedule):
    """Dense for ``warmup`` steps, then one dense step now and then, for optimizers that learn scales from these alone.

    The first dense step after the warm-up ends a stretch of ``every`` steps; every later stretch is ``growth`` times
    as long as the one before.

    Source: Lu et al., "0/1 Adam", ICLR 2023 (arXiv 2202.06009), which doubles the interval every 16 times.

    Args:
        warmup: dense steps at the start.
        every: steps from one dense step to the next, 0 for none after the warm-up.
        growth: at least 1.

    Raises:
        ConfigError: a value outside what is allowed.
    """

    warmup: int
    every: int = 100
    growth: float = 1.0

    def __post_init__(self) -> None:
        _check_count("warmup", self.warmup)
        _check_count("every", self.every)
        growth: Any = self.growth
        if isinstance(growth, bool) or not isinstance(growth, (int, float)) or not 1 <= growth < math.inf:
            raise ConfigError(f"growth={growth!r}: must be a number of at least 1")

    def at(self, step: int, own: float | None) -> float | None:
        """See Schedule."""
        return None if step < self.warmup or self._ends_stretch(step + 1 - self.warmup) else own or 1.0

    def _ends_stretch(self, count: int) -> bool:
        """Whether step number ``count`` after the warm-up, from 1, is dense."""
        if self.every == 0:
            return False
        if self.growth == 1:
            return count % self.every == 0
        end, stretch = self.every, float(self.every)
        while end < count:
            stretch *= self.growth
            end += round(stretch)
        return end == count


@dataclass(frozen=True)
class Custom(Schedule):
    """A callable of the step's number, which gives a density, or None for a dense step."""

    rule: Callable[[int], float | None]
    varies = True
    compared = True

    def at(self, step: int, own: float | None) -> float | None:
        """See Schedule. Raises ConfigError for anything but a density or None."""
        density = self.rule(step)
        if density is None:
            return None
        try:
            check_density(density)
        except ConfigError as error:
            raise ConfigError(f"warmup({step}) gave {density!r}: must be a density in (0, 1], or None") from error
        return density

    def __repr__(self) -> str:
        """The same in every process, unlike a function's own."""
        return f"Custom({getattr(self.rule, '__module__', '')}.{getattr(self.rule, '__qualname__', type(self.rule))})"


def as_schedule(warmup: Any) -> Schedule:
    """What ``attach`` takes as ``warmup``. Raises ConfigError for anything else."""
    if isinstance(warmup, Schedule):
        return warmup
    if isinstance(warmup, int) and not isinstance(warmup, bool):
        return DenseFirst(warmup)
    if callable(warmup):
        return Custom(cast("Callable[[int], float | None]", warmup))
    raise ConfigError(
        f"warmup={warmup!r}: must be a number of dense steps, a schedule such as sparcomm.DensityWarmup(steps=1000), "
        "or a callable that gives the density of a step (None: dense)"
    )


def _check_count(name: str, value: Any, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}: must be a whole number of at least {least}")
