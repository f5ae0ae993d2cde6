"""What ``attach`` and ``HookState`` take besides the algorithm, checked once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from sparcomm.algorithms.base import Algorithm
from sparcomm.ddp import skip as skipping
from sparcomm.ddp.schedule import DenseFirst, Schedule, as_schedule
from sparcomm.ddp.skip import Rule
from sparcomm.ddp.storage import Storage
from sparcomm.dtypes import working_dtype
from sparcomm.errors import ConfigError
from sparcomm.feedback import AdamCorrection, Correction, ErrorFeedback, Memory, MomentumCorrection
from sparcomm.transport.torchdist.choice import check_kind

if TYPE_CHECKING:
    from sparcomm.ddp.monitor import Check

LR_CLAMP = 10.0


class Scaler(Protocol):
    """What of a ``torch.amp.GradScaler`` is read: the tensor that holds the scale, None before its first use."""

    _scale: Tensor | None

    def is_enabled(self) -> bool:
        """Whether it scales at all."""
        ...


@dataclass(frozen=True, eq=False)
class Options:
    """Everything that changes how an algorithm is fed. See ``sparcomm.attach`` for what each means.

    Raises:
        ConfigError: a value outside what is allowed.
    """

    memory: Memory = field(default_factory=ErrorFeedback)
    warmup: Schedule = field(default_factory=DenseFirst)
    skip: tuple[Rule, ...] = ()
    storage: str = "float32"
    local_clip: float | None = None
    lr_clamp: float | None = None
    auto_off: bool = False
    check: Check | None = None
    transport: str = "auto"
    scaler: Scaler | None = None
    optimizer: Optimizer | None = None

    @classmethod
    def make(
        cls, *, scaler: Any = None, optimizer: Any = None, memory: Memory | None = None, warmup: Any = 0,
        skip: Any = (), storage: str = "float32", local_clip: float | None = None, lr_aware: bool | float = False,
        auto_off: bool = False, check: Check | None = None, transport: str = "auto",
    ) -> Options:  # fmt: skip
        """From what the user typed."""
        return cls(
            memory=ErrorFeedback() if memory is None else memory,
            warmup=as_schedule(warmup),
            skip=skipping.as_rules(skip),
            storage=storage,
            local_clip=local_clip,
            lr_clamp=_clamp(lr_aware, optimizer),
            auto_off=auto_off,
            check=check,
            transport=transport,
            scaler=scaler,
            optimizer=optimizer,
        )

    def __post_init__(self) -> None:
        memory: Any = self.memory
        if not isinstance(memory, (ErrorFeedback, MomentumCorrection, AdamCorrection)):
            raise ConfigError(
                f"memory={memory!r}: must be sparcomm.ErrorFeedback(), sparcomm.MomentumCorrection(momentum=0.9) or "
                "sparcomm.AdamCorrection(beta2=0.999)"
            )
        Storage(self.storage)
        clip: Any = self.local_clip
        if clip is not None and (isinstance(clip, bool) or not isinstance(clip, (int, float)) or not clip > 0):
            raise ConfigError(f"local_clip={clip!r}: must be a positive norm, or None")
        if not isinstance(self.auto_off, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"auto_off={self.auto_off!r}: must be True or False")
        check_kind(self.transport)
        scaler: Any = self.scaler
        scales = hasattr(scaler, "is_enabled") and (hasattr(scaler, "_scale") or not scaler.is_enabled())
        if scaler is not None and not scales:
            raise ConfigError(f"scaler={type(scaler).__name__}: must be a torch.amp.GradScaler")
        optimizer: Any = self.optimizer
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise ConfigError(f"optimizer={type(optimizer).__name__}: must be a torch.optim.Optimizer")
        if self.check is not None:
            from sparcomm.ddp.monitor import Check

            if not isinstance(self.check, Check):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise ConfigError(f"check={self.check!r}: must be a sparcomm.Check")

    def check_parameters(self, params: Iterable[Tensor]) -> None:
        """Raises ConfigError where residuals of these parameters cannot be stored as asked for."""
        for p in params:
            Storage(self.storage).check(working_dtype(p.dtype))

    def check_fits(self, algorithm: Algorithm) -> None:
        """Raises ConfigError where the options ask for what ``algorithm`` cannot do."""
        if self.warmup.varies and getattr(algorithm, "density", None) is None:
            raise ConfigError(f"warmup={self.warmup!r}: algorithm {algorithm.name!r} has no density to vary")

    @property
    def correction(self) -> Correction | None:
        """What stands between the gradient and the algorithm, if anything does."""
        return None if isinstance(self.memory, ErrorFeedback) else self.memory

    def describe(self) -> dict[str, str]:
        """What must be equal on all ranks, as text by field."""
        return {
            "memory": repr(self.memory),
            "warmup": repr(self.warmup),
            "skip": skipping.describe(self.skip),
            "storage": self.storage,
            "local_clip": repr(self.local_clip),
            "lr_aware": repr(self.lr_clamp),
            "auto_off": repr(self.auto_off),
            "check": repr(self.check),
            "scaler": repr(self.scaler is not None),
        }

    def without_objects(self) -> Options:
        """Without the scaler and the optimizer, which belong to one training loop."""
        kept = ("memory", "warmup", "skip", "storage", "local_clip", "auto_off", "check", "transport")
        return Options(**{name: getattr(self, name) for name in kept})


def _clamp(lr_aware: bool | float, optimizer: Any) -> float | None:
    if lr_aware is False:
        return None
    clamp = LR_CLAMP if lr_aware is True else lr_aware
    if not isinstance(clamp, (int, float)) or clamp < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"lr_aware={lr_aware!r}: must be True, False, or the largest ratio to follow (at least 1)")
    if optimizer is None:
        raise ConfigError("lr_aware needs the learning rates: pass optimizer=..., too")
    return float(clamp)


_ADAPTIVE = ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "Adadelta", "Adafactor", "SparseAdam")


def adaptive(optimizer: Optimizer | None) -> bool:
    """Whether the optimizer divides by a second moment of the gradients that it gets (Adam and its relatives)."""
    if optimizer is None or getattr(optimizer, "feeds_second_moment_densely", False):
        return False
    names = [kind.__name__ for kind in type(optimizer).__mro__]
    return any(name in _ADAPTIVE or name.endswith(("Lamb", "LAMB")) for name in names)


def rates(optimizer: Optimizer, params: Sequence[Tensor]) -> dict[int, float]:
    """Learning rate by id of parameter, for those that the optimizer has."""
    known = {id(p) for p in params}
    return {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"] if id(p) in known}
