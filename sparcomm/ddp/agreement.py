"""What all ranks must have in common before the first byte: the configuration, and the step they stand at.

On Gloo a size that differs between ranks aborts the process, so a difference has to be found before, field by field.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch

from sparcomm import __version__
from sparcomm.algorithms.base import Algorithm
from sparcomm.errors import CheckpointError, ConfigError, ConfigMismatch

# What ``compare`` and ``compare_standing`` raise: every rank finds it by itself, so nobody has to be told.
AGREED = (ConfigMismatch, CheckpointError)
_ABSENT = "(absent)"


def configuration(
    algorithm: Algorithm, size: int, parameters: Sequence[torch.Tensor], skipped: Set[int], sparse: Sequence[str]
) -> dict[str, str]:
    """What must be equal on all ranks, as text by field.

    Args:
        parameters: those to be reduced, as far as known.
        skipped: ids of those that always travel dense.
        sparse: names of those whose gradients are of sparse layout.
    """
    dtypes = Counter(str(p.dtype).removeprefix("torch.") for p in parameters)
    fields = {f"{algorithm.name}.{name}": repr(value) for name, value in algorithm.fields().items()}
    return {
        "sparcomm": __version__,
        "world size": str(size),
        "parameters": ", ".join(f"{count} {name}" for name, count in sorted(dtypes.items())),
        "skipped parameters": str(sum(id(p) in skipped for p in parameters)),
        "gradients of sparse layout": ", ".join(sparse) or "none",
        "algorithm": algorithm.name,
        **fields,
        **algorithm.surroundings(),
    }


def check_backend(algorithm: Algorithm, backends: str, devices: Iterable[torch.device]) -> None:
    """Raises ConfigError where lengths are only their senders' to know, and gradients would travel over NCCL.

    Args:
        backends: by device type, such as "cpu:gloo,cuda:nccl".
        devices: where gradients are.
    """
    on_nccl = "cuda:nccl" in backends and any(d.type == "cuda" for d in devices)
    if on_nccl and not algorithm.agreed:
        raise ConfigError(
            f"{algorithm!r} sends messages whose length depends on the data, which NCCL cannot: choose "
            f"{algorithm.remedy}, or a process group on Gloo"
        )


def compare(configurations: Sequence[Mapping[str, str]]) -> None:
    """Raises ConfigMismatch that names every field that differs, with the values of all ranks."""
    names = list(dict.fromkeys(name for c in configurations for name in c))
    lines = [_spread(name, [c.get(name, _ABSENT) for c in configurations]) for name in names]
    differing = [line for line in lines if line]
    if differing:
        raise ConfigMismatch("ranks are configured differently: " + "; ".join(differing))


def compare_standing(standings: Sequence[Mapping[str, str]]) -> None:
    """Raises CheckpointError if ranks stand at different steps, or were loaded with different units."""
    line = _spread("step", [s["step"] for s in standings])
    if line:
        earliest = min(int(s["step"]) for s in standings)
        raise CheckpointError(
            f"ranks stand at different steps: {line}. A failed collective can leave ranks one step apart: load the "
            f"checkpoints of one step on all ranks, of step {earliest} or earlier (weights, optimiser and hook)"
        )
    line = _spread("units", [s["units"] for s in standings])
    if line:
        raise CheckpointError(
            f"ranks have loaded checkpoints that cut the gradient differently: {line}. They are of different runs, or "
            "were taken after a step that had failed: load those of one successful step of one run on all ranks"
        )


def _spread(name: str, values: Sequence[Any]) -> str:
    """``name: ranks 0, 2: a; rank 1: b``, or nothing if all are equal."""
    by_value: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        by_value.setdefault(value, []).append(str(rank))
    if len(by_value) < 2:
        return ""
    parts = (f"rank{'s' if len(r) > 1 else ''} {', '.join(r)}: {value}" for value, r in by_value.items())
    return f"{name} ({'; '.join(parts)})"
