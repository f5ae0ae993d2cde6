"""The loops over n and k, one implementation per kind of device, all with the same functions.

``kernels_for(tensor)`` picks: Numba on CPUs, CUDA text on NVIDIA's GPUs where CuPy can compile it (``gpu.py``), plain
torch elsewhere. An implementation's libraries are imported when it is first asked for.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from sparcomm.kernels.interface import Kernels

__all__ = ["Kernels", "kernels_for", "prepare", "warm_up"]


chosen: dict[torch.device, Kernels] = {}  # what devices have got so far


def kernels_for(tensor: Tensor) -> Kernels:
    """The implementation for the device of ``tensor``. The first call for a GPU without kernels of its own warns."""
    device = tensor.device
    return chosen.get(device) or chosen.setdefault(device, _choose(device))


def _choose(device: torch.device) -> Kernels:
    name = "reference"
    if device.type == "cpu":
        name = "cpu"
    elif device.type == "cuda":
        from sparcomm.kernels import gpu

        name = "cuda" if gpu.runs_on(device) else name
    return cast(Kernels, importlib.import_module(f"sparcomm.kernels.{name}"))


def prepare(devices: Iterable[torch.device]) -> None:
    """Loads the kernels of these devices: to be called before the first wait on another rank that has a time limit."""
    for device in devices:
        if device.type == "cpu":
            warm_up()
        else:
            kernels_for(torch.empty(0, device=device))


@functools.cache
def warm_up() -> None:
    """Compiles every CPU kernel, or loads it from the disk cache.

    Ranks of one host that call this together compile once: the first does, the others wait for it. Later calls in a
    process do nothing.
    """
    from sparcomm.kernels.cpu.warm import warm_up

    warm_up()
