"""The loops over n and k, one implementation per kind of device, all with the same functions.

``kernels_for(tensor)`` picks: Numba on CPUs, plain torch elsewhere. An implementation's libraries are imported when
it is first asked for.
"""

from __future__ import annotations

import functools
from typing import cast

from torch import Tensor

from sparcomm.kernels.interface import Kernels

__all__ = ["Kernels", "kernels_for", "warm_up"]


def kernels_for(tensor: Tensor) -> Kernels:
    """The implementation for the device of ``tensor``."""
    if tensor.device.type == "cpu":
        from sparcomm.kernels import cpu

        return cast(Kernels, cpu)
    from sparcomm.kernels import reference

    return cast(Kernels, reference)


@functools.cache
def warm_up() -> None:
    """Compiles every CPU kernel, or loads it from the disk cache.

    Ranks of one host that call this together compile once: the first does, the others wait for it. To be called
    before the first wait on another rank that has a time limit. Later calls in a process do nothing.
    """
    from sparcomm.kernels.cpu.warm import warm_up

    warm_up()
