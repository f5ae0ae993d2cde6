"""Scratch buffers that outlive a step: fresh pages of memory cost more than most sums over them."""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Workspace:
    """A free list of large buffers, so that a steady training step allocates nothing of size n.

    Whoever is done with a buffer gives it back; whoever needs one takes it, contents undefined. Never giving
    back is correct, only slower.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._pins = False  # whether page-locked memory was ever asked for: else there is none to be told apart
        self._lent: WeakValueDictionary[int, Tensor] = WeakValueDictionary()  # by id

    def take(self, numel: int, dtype: torch.dtype, device: torch.device, *, pinned: bool = False) -> Tensor:
        """A contiguous (numel,) tensor with undefined contents that nobody else uses; ``pinned``: page-locked memory.

        On a CUDA device it may be read and written on the stream it was used on last, or behind it.
        """
        self._pins |= pinned
        for i, t in enumerate(self._free):
            fits = t.numel() == numel and t.dtype == dtype and t.device == device
            if fits and (not self._pins or t.is_pinned() == pinned):
                taken = self._free.pop(i)
                break
        else:
            taken = torch.empty(numel, dtype=dtype, device=device, pin_memory=pinned)
        self._lent[id(taken)] = taken
        return taken

    def give(self, *buffers: Tensor | None) -> None:
        """Returns buffers that nobody will read again.

        What was not taken here, or is back already, is ignored, and so is None: the list cannot grow beyond what was
        in use at once, and no buffer gets a second owner.
        """
        self._free.extend(b for b in buffers if b is not None and self._lent.pop(id(b), None) is b)
