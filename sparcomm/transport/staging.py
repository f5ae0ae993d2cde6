"""Host memory that tensors pass through where a backend cannot take them from their own device.

One buffer for each direction, kept and page-locked for CUDA. On the way out the host waits until the bytes are there,
since a backend reads them at once. On the way in it does not: the stream copies them, and whoever wants the buffer next
waits for that copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm.transport.common import nbytes


class Staging:
    """The buffers of one transport, by direction ("send", "recv").

    Attributes:
        buffers: flat uint8, as long as the longest message so far.
    """

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}
        self._copies: dict[str, torch.cuda.Event] = {}  # back to the device, perhaps still under way

    def room(self, slot: str, like: Tensor) -> Tensor:
        """As many bytes as ``like`` has, contents undefined; nothing reads or writes them."""
        if slot in self._copies:
            self._copies.pop(slot).synchronize()
        size, buffer = nbytes(like), self.buffers.get(slot)
        if buffer is None or buffer.numel() < size:
            pin = like.device.type == "cuda"
            buffer = self.buffers[slot] = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pin)
        return buffer[:size]

    def out(self, slot: str, t: Tensor) -> Tensor:
        """The bytes of ``t``, which the host waits for."""
        return self.room(slot, t).copy_(as_bytes(t))

    def back(self, slot: str, t: Tensor, host: Tensor) -> None:
        """Writes ``host``, bytes of ``slot``, to ``t``, on the current stream if it lies on a CUDA device."""
        on_cuda = t.device.type == "cuda"
        as_bytes(t).copy_(host, non_blocking=on_cuda)
        if on_cuda:
            event = self._copies[slot] = torch.cuda.Event()
            event.record(torch.cuda.current_stream(t.device))

    def clear(self) -> None:
        """Frees the buffers, of which PyTorch gives none away before the copies are done."""
        self.buffers.clear()
        self._copies.clear()


def as_bytes(t: Tensor) -> Tensor:
    """A contiguous tensor as (numel * element_size,) uint8, sharing memory: every backend moves bytes."""
    return t.detach().view(-1).view(torch.uint8)
