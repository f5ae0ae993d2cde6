"""A bucket's way in, and back to DDP: a future that completes when all units with parameters in it are reduced."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from torch import Tensor
from torch.futures import Future

from sparcomm.dtypes import check_gradient
from sparcomm.errors import GradientError, HookError


class Delivery:
    """Counts down to the completion of one bucket. Completing or failing it twice is harmless.

    Attributes:
        buffer: the bucket's flat gradients, overwritten with the mean by then.
    """

    def __init__(self, buffer: Tensor, future: Future[Tensor]) -> None:
        self.buffer, self._future = buffer, future
        self._waiting = 0
        self._done = False
        self._lock = threading.Lock()

    @property
    def future(self) -> Future[Tensor]:
        """What the hook returns. A future stores an exception as a value, which only ``value`` raises: so ``then``."""
        return self._future.then(lambda f: f.value())

    @property
    def done(self) -> bool:
        """Whether the future is complete."""
        return self._done

    def expect(self, units: int) -> None:
        """Waits for so many more calls of ``arrive``; to be called before the first of them."""
        with self._lock:
            self._waiting += units

    def arrive(self) -> None:
        """One of those awaited is done; the last one completes the future."""
        with self._lock:
            self._waiting -= 1
            if self._waiting or self._done:
                return
            self._done = True
        self._future.set_result(self.buffer)

    def fail(self, text: str) -> None:
        """Completes the future with a HookError, unless it is complete."""
        with self._lock:
            if self._done:
                return
            self._done = True
        self._future.set_exception(HookError(text))  # pyright: ignore[reportArgumentType]  torch's own annotation is wrong


def check_bucket(buffer: Tensor, params: Sequence[Tensor]) -> None:
    """Raises GradientError unless the bucket is one flat float vector of its parameters' gradients.

    DDP hands a complex gradient over as a real vector of twice the length.
    """
    for p in params:
        if p.is_complex():
            raise GradientError(
                f"gradient has dtype {p.dtype}, and only real ones can be compressed: keep the parameter as a real "
                "tensor with a last dimension of 2, and use torch.view_as_complex on it in forward()"
            )
    check_gradient(buffer)
    if buffer.numel() != sum(p.numel() for p in params):
        raise GradientError(
            f"a bucket of {buffer.numel()} elements does not match its parameters of {[p.shape for p in params]}"
        )
