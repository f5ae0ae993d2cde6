"""Gradients as an algorithm meets them, kept for benchmarks: ``sparcomm bench select --recorded runs/x/gradients``.

What is selected from is gradient + residual, of the hook's own units, in the middle of a training: no formula gives it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparcomm.algorithms.base import Algorithm, Reduced, State
from sparcomm.transport.base import Transport


def recording(algorithm: Algorithm, folder: Path, steps: Collection[int]) -> Algorithm:
    """The same algorithm, which on rank 0 also writes what it is given in ``steps`` (the first is 1).

    A file ``step-00050-unit-0.pt`` holds gradient + residual of one unit: (n,) float32, in host memory, to be loaded
    with ``weights_only=True``. Steps in which the hook does not ask the algorithm (dense ones) leave none.
    """
    base = type(algorithm)

    def reduce(
        self: Algorithm, grad: Tensor, residual: Tensor | None, state: State, step: int, transport: Transport
    ) -> Reduced:
        if transport.rank == 0 and step + 1 in steps:
            fed = grad.to(torch.float32, copy=True) if residual is None else (residual + grad).float()
            _write(folder / f"step-{step + 1:05d}-unit-{state.unit}.pt", fed.cpu())
        return base.reduce(self, grad, residual, state, step, transport)

    # A subclass, so that the hook finds the fields, the name and the kind of algorithm that it looks for.
    made = type(base.__name__, (base,), {"reduce": reduce, "__doc__": base.__doc__})
    kind: Any = dataclasses.dataclass(frozen=True)(made)
    return kind(**algorithm.fields())


def _write(path: Path, value: Tensor) -> None:
    """Appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save(value, temporary)
    temporary.replace(path)
