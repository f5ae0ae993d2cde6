"""How a kernel of the CUDA text is started, whatever it runs on.

All arguments have 8 bytes: tensors become pointers, None a null pointer, integers 64-bit ones, floats doubles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sparcomm.kernels.cuda.texts import macros

THREADS = 256  # of a block, as in csrc/common.cuh
CROWD = 8  # blocks per multiprocessor that a pass over a vector is spread over

Argument = Tensor | float | None


class Launcher(Protocol):
    """Runs kernels on one kind of device, in the order in which they are launched."""

    def multiprocessors(self, device: torch.device) -> int:
        """How many blocks a device runs at once, at least."""
        ...

    def launch(
        self,
        text: str,
        kernel: str,
        options: tuple[str, ...],
        grid: int,
        arguments: Sequence[Argument],
        device: torch.device,
    ) -> None:
        """Starts ``kernel`` of ``csrc/{text}.cu``, compiled with ``options``, with ``grid`` blocks of threads."""
        ...


launchers: dict[str, Launcher] = {}  # by device type


def run(
    text: str,
    kernel: str,
    items: int,
    like: Tensor,
    *arguments: Argument,
    each: int = 1,
    grid: int | None = None,
    **types: torch.dtype,
) -> None:
    """Runs a kernel over so many items, behind whatever the current stream of ``like``'s device has to do; no waiting.

    Args:
        text: a file of ``csrc/``, without ``.cu``.
        items: nothing is launched for 0.
        like: a tensor on the device where the arguments' tensors lie.
        each: how many items a thread takes at once.
        grid: blocks, instead of what suits ``items`` and the device.
        types: the text's macros.
    """
    if items <= 0:
        return
    device = like.device
    launcher = launchers.get(device.type) or _launcher(device)
    if grid is None:
        grid = min(-(-items // (THREADS * each)), CROWD * launcher.multiprocessors(device))
    launcher.launch(text, kernel, macros(types), grid, arguments, device)


def multiprocessors(like: Tensor) -> int:
    """How many blocks the device of ``like`` runs at once, at least."""
    return (launchers.get(like.device.type) or _launcher(like.device)).multiprocessors(like.device)


def _launcher(device: torch.device) -> Launcher:
    from sparcomm.kernels.cuda.device import Gpu

    return launchers.setdefault(device.type, Gpu())


def plain(argument: Argument) -> int | float:
    """What a kernel gets: an address, 0 for None, an integer or a float."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return 0 if argument is None else argument if isinstance(argument, float) else int(argument)
