"""Warns where settings that are allowed are known to train badly."""

from __future__ import annotations

import warnings

from torch.optim import Optimizer

from sparcomm.algorithms.base import Algorithm
from sparcomm.algorithms.majority_vote import MajorityVote
from sparcomm.ddp.options import Options, adaptive

TOO_FAR = 0.05  # by more than this, times momentum's sum, no weight should move in every step

_told: set[str] = set()


def warn_if_unsuited(algorithm: Algorithm, options: Options) -> None:
    """Warns, once per kind of optimizer, where algorithm and optimizer do not go well with each other."""
    optimizer = options.optimizer
    if optimizer is None:
        return
    if getattr(optimizer, "communicates", False):
        kind = type(optimizer).__name__
        _tell(
            f"{kind} behind a hook",
            f"{kind} communicates itself, and behind this hook all ranks would send it the same mean gradient: use "
            "sparcomm.keep_local(ddp) in place of attach, and give the optimizer the algorithm; see docs/optimizers.md",
        )
    elif algorithm.coarse and not algorithm.sparse:
        _about_signs(algorithm, optimizer)
    else:
        _about_late_gradients(algorithm, options, optimizer)


def _about_signs(algorithm: Algorithm, optimizer: Optimizer) -> None:
    """Of algorithms whose sums have one magnitude."""
    kind, name = type(optimizer).__name__, type(algorithm).__name__
    if adaptive(optimizer):
        _tell(
            f"{kind} behind {name}",
            f"{name} gives all entries one magnitude, so that {kind}'s second moment tells none apart and only its "
            "momentum is left: use sparcomm.optim.OneBitAdam or sparcomm.optim.Signum with sparcomm.keep_local(ddp), "
            "or torch.optim.SGD; see docs/optimizers.md",
        )
    elif isinstance(algorithm, MajorityVote) and not algorithm.scale and (far := _reach(optimizer)) > TOO_FAR:
        _tell(
            f"{kind} far behind {name}",
            f"{name} without a scale gives every entry the magnitude 1, so that {kind} moves every weight by up to "
            f"{far:.2g} in every step: give it rates as for Adam or less, such as 1e-3, or MajorityVote(scale=True); "
            "see docs/optimizers.md",
        )


def _about_late_gradients(algorithm: Algorithm, options: Options, optimizer: Optimizer) -> None:
    """Of algorithms that deliver a part now and the rest later."""
    density = getattr(algorithm, "density", None)
    if not algorithm.sparse or density is None or density >= 0.5:
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
    elif options.correction is not None and any(group.get("momentum", 0) for group in optimizer.param_groups):
        memory = type(options.correction).__name__
        _tell(
            f"{kind} behind {memory}",
            f"{memory} does the optimizer's work before the selection, and {kind} with momentum repeats late "
            "deliveries all the same: use torch.optim.SGD without momentum; see docs/tuning.md",
        )


def _reach(optimizer: Optimizer) -> float:
    """By how much a gradient of 1 that lasts moves a weight in a step, at the rate before any schedule."""
    found = [0.0]
    for group in optimizer.param_groups:
        lr = max(float(group.get("lr", 0)), float(group.get("initial_lr", 0)))
        found.append(lr / max(1 - float(group.get("momentum", 0)), 1e-3))
    return max(found)


def _tell(what: str, text: str) -> None:
    if what not in _told:
        _told.add(what)
        warnings.warn(text, UserWarning, stacklevel=6)
