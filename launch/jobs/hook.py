"""What a run's file says about the hook (its section ``hook``), as the arguments of ``sparcomm.attach``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

import sparcomm
from jobs.strict import Count, Fraction, Positive, Strict
from sparcomm.errors import ConfigError


class ErrorFeedback(Strict):
    """Gradients as they are; what is not sent is added to the next one."""

    name: Literal["error_feedback"] = "error_feedback"


class MomentumCorrection(Strict):
    """Momentum before the selection: the optimizer must have none."""

    name: Literal["momentum_correction"]
    momentum: Fraction = 0.9
    nesterov: bool = False
    masking: bool = True


class AdamCorrection(Strict):
    """Adam's division before the selection: the optimizer must be plain SGD."""

    name: Literal["adam_correction"]
    beta2: Fraction = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8


class DenseFirst(Strict):
    """``steps`` dense steps, then sparse ones."""

    name: Literal["dense"] = "dense"
    steps: Count = 0


class DensityWarmup(Strict):
    """Ever fewer entries during ``steps`` steps."""

    name: Literal["density"]
    steps: Count
    start: Annotated[float, Field(gt=0, le=1)] = 0.25
    stages: Positive = 4


class Refresh(Strict):
    """``warmup`` dense steps, then one now and then."""

    name: Literal["refresh"]
    warmup: Count
    every: Count = 100
    growth: Annotated[float, Field(ge=1)] = 1.0


class Check(Strict):
    """A dense look every ``every`` steps, and limits that trigger a dense step."""

    every: Positive = 100
    max_age: Positive | None = None
    max_residual_ratio: Annotated[float, Field(gt=0)] | None = None
    min_energy: Annotated[float, Field(gt=0, le=1)] | None = None
    min_cosine: Annotated[float, Field(ge=-1, le=1)] | None = None


def _same(steps: int) -> int:
    return steps


_BUILT: dict[str, Callable[..., Any]] = {
    "error_feedback": sparcomm.ErrorFeedback,
    "momentum_correction": sparcomm.MomentumCorrection,
    "adam_correction": sparcomm.AdamCorrection,
    "dense": _same,
    "density": sparcomm.DensityWarmup,
    "refresh": sparcomm.Refresh,
}


class Hook(Strict):
    """The options of ``sparcomm.attach``; ``lr_aware`` is the largest ratio of learning rates to follow."""

    memory: Annotated[ErrorFeedback | MomentumCorrection | AdamCorrection, Field(discriminator="name")] = (
        ErrorFeedback()
    )
    warmup: Annotated[DenseFirst | DensityWarmup | Refresh, Field(discriminator="name")] = DenseFirst()
    skip: list[str | Count] = Field(default_factory=list[str | Count])
    storage: Literal["float32", "bfloat16", "pinned"] = "float32"
    local_clip: Annotated[float, Field(gt=0)] | None = None
    lr_aware: Annotated[float, Field(ge=1)] | None = None
    auto_off: bool = False
    check: Check | None = None

    @model_validator(mode="after")
    def _buildable(self) -> Hook:
        self.arguments()
        return self

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``sparcomm.attach``."""
        return {
            "memory": _build(self.memory),
            "warmup": _build(self.warmup),
            "skip": tuple(self.skip),
            "storage": self.storage,
            "local_clip": self.local_clip,
            "lr_aware": False if self.lr_aware is None else self.lr_aware,
            "auto_off": self.auto_off,
            "check": None if self.check is None else sparcomm.Check(**self.check.model_dump()),
        }

    def check_optimizer(self, kind: str, momentum: float, clips: bool) -> None:
        """Raises ConfigError where the optimizer would do once more what the memory has done already.

        Args:
            kind: the optimizer's name.
            momentum: its momentum, 0 without.
            clips: whether the mean is clipped by its norm.
        """
        memory = self.memory.name
        if memory != "error_feedback" and (kind != "sgd" or momentum):
            raise ConfigError(f"hook.memory.name={memory!r} wants optimizer.name='sgd' with momentum: 0.0")
        if memory == "adam_correction" and clips:
            raise ConfigError("clip_norm would limit what is divided already: use hook.local_clip")
        if kind == "held_adamw" and not (isinstance(self.warmup, (DenseFirst, Refresh)) and self.dense_steps):
            raise ConfigError(
                "optimizer.name='held_adamw' needs dense steps first: hook.warmup={name: refresh, warmup: 50}"
            )

    @property
    def dense_steps(self) -> int:
        """Dense steps at the start."""
        return self.warmup.warmup if isinstance(self.warmup, Refresh) else self.warmup.steps


def _build(chosen: Strict) -> Any:
    fields = chosen.model_dump()
    return _BUILT[fields.pop("name")](**fields)
