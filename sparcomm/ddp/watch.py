"""Notices a DDP module that trains without its hook: a deep copy keeps the hook's name, but calls it no more.

Every trainable parameter gets a hook that runs when its gradient is there; the first of them asks autograd for a call
at the end of that backward pass, by which time DDP has called its hook, if it will. Then all of them are removed.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils.hooks import RemovableHandle


class Watch:
    """Warns after the first synchronised backward pass through ``params`` unless ``called()`` is true by then.

    Args:
        synchronised: whether the backward pass under way is one that synchronises (not within ``no_sync``).
        remedy: the end of the warning.
    """

    def __init__(
        self, params: Iterable[Tensor], called: Callable[[], bool], synchronised: Callable[[], bool], remedy: str
    ) -> None:
        self._called, self._synchronised, self._remedy = called, synchronised, remedy
        self._queued = -1  # the backward pass that will call back; one that raises never does
        self._handles: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(self._touched) for p in params if p.requires_grad
        ]

    def stop(self) -> None:
        """Removes what was installed. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _touched(self, _: Tensor) -> None:
        now: int = torch._C._current_graph_task_id()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        if self._queued != now and self._handles and self._synchronised():
            self._queued = now
            # Autograd has no public call for this; DDP itself uses the same one.
            cast(Any, torch.autograd.Variable)._execution_engine.queue_callback(self._finished)  # noqa: SLF001

    def _finished(self) -> None:
        if not self._called() and _nested():
            return  # reentrant checkpointing: DDP calls its hook when the pass around this one ends
        self.stop()
        if not self._called():
            warnings.warn(
                f"a backward pass of a DDP module has synchronised without calling its sparcomm hook: {self._remedy}",
                RuntimeWarning,
                stacklevel=2,
            )


def _nested() -> bool:
    """Whether this runs within a backward function, which has called autograd itself."""
    frame, apply = inspect.currentframe(), BackwardCFunction.apply.__code__
    while frame is not None and frame.f_code is not apply:
        frame = frame.f_back
    return frame is not None
