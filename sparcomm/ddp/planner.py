"""Settles what each step does: schedule, trial, wishes to flush. All ranks come to the same plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sparcomm.algorithms.base import Algorithm
from sparcomm.algorithms.dense import Dense
from sparcomm.ddp.auto_off import HalfDense, Trial
from sparcomm.ddp.log import RankLogger, warmed_up
from sparcomm.ddp.options import Options, rates
from sparcomm.ddp.plan import Mode, Plan
from sparcomm.errors import ConfigError, ConfigMismatch

Gather = Callable[[list[float]], Tensor]


class Planner:
    """Makes the plan of each step.

    Args:
        wants_flush: asked at every step whether something (a check's limit) calls for a dense step that leaves
            nothing owed.
    """

    def __init__(
        self, algorithm: Algorithm, options: Options, log: RankLogger, wants_flush: Callable[[int], bool]
    ) -> None:
        self._algorithm, self._options, self._log = algorithm, options, log
        self._own: float | None = getattr(algorithm, "density", None)
        self._wants_flush = wants_flush
        self.trial = Trial() if options.auto_off else None
        self._warm: bool | None = None  # whether the schedule has come to the algorithm's own density; None: not begun
        self.flushed = False  # whether nothing has been owed since the last flush was committed

    @property
    def decisions(self) -> dict[str, Any]:
        """What was settled once and is to be kept over a restart."""
        if self.trial is None or self.trial.verdict is None:
            return {}
        return {"auto_off": self.trial.verdict, "flushed": self.flushed}

    def restore(self, decisions: Mapping[str, Any]) -> None:
        """Takes up what ``decisions`` gave."""
        if self.trial is not None:
            self.trial = Trial(decisions.get("auto_off"))
            self.flushed = bool(decisions.get("flushed", False))

    def next(self, number: int, params: Sequence[Tensor], gather: Gather, *, joined: bool, settled: bool) -> Plan:
        """The plan of step ``number``. Collective where numbers have to be compared.

        Args:
            settled: whether the units are final, so that steps can be timed.

        Raises:
            ConfigMismatch: a callable schedule gave ranks different densities.
            ConfigError: it gave something that is no density.
        """
        density = self._density(number, gather)
        warm = density is not None and self._own in (None, density)
        if warm and self._warm is False:
            warmed_up(self._log, number, self._own)
        self._warm = self._warm or warm
        dense: Algorithm = Dense()
        mode: Mode = "dense" if density is None else "sparse"
        if mode == "sparse" and self.trial is not None:
            if self.trial.verdict is None and settled:
                mode = self.trial.begin(number, gather, self._log)
            if self.trial.verdict == "dense":
                mode = "dense" if self.flushed else "flush"
            dense = HalfDense() if mode == "dense" else dense
        elif self.trial is not None:
            self.trial.pause()
        if mode == "sparse" and self._wants_flush(number):
            mode = "flush"
        scaler, optimizer = self._options.scaler, self._options.optimizer
        scale = None if scaler is None or not scaler.is_enabled() else scaler._scale  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        follows = optimizer is not None and self._options.lr_clamp is not None
        return Plan(
            mode=mode,
            density=density,
            joined=joined,
            scale=scale,
            rates=rates(optimizer, params) if follows and optimizer is not None else {},
            dense=dense,
        )

    def _density(self, number: int, gather: Gather) -> float | None:
        """None for a dense step. Compared between ranks where nothing else can tell that they agree.

        A rank whose own rule fails tells the others by a NaN, so that all of them end together.
        """
        schedule, failed = self._options.warmup, None
        density: float | None = None
        try:
            density = schedule.at(number, self._own)
        except Exception as error:
            if not schedule.compared:
                raise
            failed = error
        if schedule.compared:
            told = gather([float("nan") if failed else -1.0 if density is None else density])[:, 0].tolist()
            if failed is not None:
                raise failed
            ill = [rank for rank, t in enumerate(told) if t != t]  # NaN
            if ill:
                raise ConfigMismatch(f"step {number}: the callable given as warmup failed on rank {ill[0]}")
            if any(t != told[0] for t in told):
                raise ConfigMismatch(f"step {number}: the callable given as warmup differs between ranks: {told}")
        if density is not None and self._own is None and density != 1.0:
            raise ConfigError(f"warmup gave {density!r}, but {self._algorithm.name!r} has no density: only None, or 1")
        return density
