"""Warns where settings that are allowed are known to train badly."""

from __future__ import annotations

import warnings

from torch.optim import Optimizer

from sparcomm.algorithms.base import Algorithm
from sparcomm.ddp.options import Options, adaptive

_told: set[str] = set()


def warn_if_unsuited(algorithm: Algorithm, options: Options) -> None:
    """Warns, once per kind of optimizer, if a sparse algorithm feeds one of Adam's kind, or momentum comes twice."""
    optimizer = options.optimizer
    density = getattr(algorithm, "density", None)
    if optimizer is None or not algorithm.sparse or density is None or density >= 0.5:
        return
    kind = type(optimizer).__name__
    if adaptive(optimizer):
        _tell(
            kind,
            f"{kind} divides by a second moment, which late and bursty deliveries of error feedback inflate: at "
            f"density {density:g} it trains visibly worse. The recipe that works divides before the selection: "
            "memory=sparcomm.AdamCorrection(beta2=0.999), lr_aware=True and optimizer=torch.optim.SGD(params, lr, "
            "weight_decay=...), from the same to twice the learning rate; see docs/tuning.md",
        )
    elif options.correction is not None and _has_momentum(optimizer):
        memory = type(options.correction).__name__
        _tell(
            f"{kind} behind {memory}",
            f"{memory} does the optimizer's work before the selection, and {kind} with momentum repeats late "
            "deliveries all the same: use torch.optim.SGD without momentum; see docs/tuning.md",
        )


def _has_momentum(optimizer: Optimizer) -> bool:
    return any(group.get("momentum", 0) for group in optimizer.param_groups)


def _tell(what: str, text: str) -> None:
    if what not in _told:
        _told.add(what)
        warnings.warn(text, UserWarning, stacklevel=5)
