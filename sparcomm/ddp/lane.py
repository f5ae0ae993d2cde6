"""Where a job's device work goes: nowhere special on CPU, a stream of its own on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.futures import Future


class Lane:
    """CPU: the work is done when the job returns."""

    def ready(self, buffer: Tensor) -> Any:
        """Called where ``buffer`` was filled; what ``enter`` needs to know that it is."""
        return None

    def ready_now(self) -> Any:
        """What ``enter`` needs to know that all work given to the caller's stream so far is done."""
        return None

    @contextmanager
    def enter(self, ready: Any) -> Iterator[None]:
        """The body runs off the caller's stream, after everything before ``ready`` (None: whenever it can)."""
        with torch.no_grad():
            yield

    def future(self) -> Future[Tensor]:
        """A future whose value may lie on this lane's device."""
        return Future()

    def join(self) -> None:
        """Makes the caller's stream wait for the lane's work."""


class CudaLane(Lane):
    """CUDA: a high-priority side stream, entered behind an event of the stream that filled the bucket."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device, priority=-1)

    def ready(self, buffer: Tensor) -> torch.cuda.Event:
        """An event of the current stream. ``buffer``'s memory is kept until the side stream is done with it."""
        event = self.ready_now()
        parts = (buffer,) if buffer.layout == torch.strided else (buffer._indices(), buffer._values())  # noqa: SLF001
        for part in parts:
            part.record_stream(self.stream)
        return event

    def ready_now(self) -> torch.cuda.Event:
        """See Lane."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextmanager
    def enter(self, ready: Any) -> Iterator[None]:
        """See Lane. Futures completed in the body carry an event of the side stream."""
        with torch.no_grad(), torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            if ready is not None:
                self.stream.wait_event(ready)
            yield

    def future(self) -> Future[Tensor]:
        """A future that names its device: one that does not is read before the stream has written it."""
        return Future(devices=[self.device])

    def join(self) -> None:
        """See Lane."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


def hold(*tensors: Tensor | None) -> None:
    """Keeps their memory until the current stream is done with it: of CUDA tensors that may come from another stream.

    Loaded residuals and those that clipping has changed are made on the caller's stream; when a lane's step replaces
    one, the caller's stream would get its memory back while the lane still reads it.
    """
    for t in tensors:
        if t is not None and t.is_cuda:
            t.record_stream(torch.cuda.current_stream(t.device))


def lane_for(device: torch.device) -> Lane:
    """The lane of a bucket on ``device``."""
    return CudaLane(device) if device.type == "cuda" else Lane()
