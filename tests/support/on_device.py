"""Kernels of another device for tests that think in CPU tensors: arguments travel there, what was written comes back.

Whole storages travel, so that views of one memory stay that, and what lies beside an argument must stay as it was.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparcomm.kernels.interface import Working
from sparcomm.layout import Layout
from sparcomm.sparse import Sparse


class OnDevice:
    """All functions of a module of kernels, for CPU tensors that are copied to ``device`` and back."""

    def __init__(self, module: ModuleType, device: str) -> None:
        self.module, self.device = module, torch.device(device)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            setattr(self, name, self._wrapped(function))

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            trip = Trip(self.device)
            moved = [trip.there(a) for a in args]
            try:
                return trip.back(function(*moved, **{k: trip.there(a) for k, a in kwargs.items()}))
            finally:
                trip.return_all()

        return call


class Held(Working):
    """Sums on the device, and the CPU memory that they go on writing to."""

    def __init__(self, work: Working, trip: Trip, out: Tensor, layout: Layout) -> None:
        self.work, self.trip, self.out, self.layout = work, trip, out, layout


class Trip:
    """Storages that lie on both sides for the time of a call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}  # by address: the same bytes on the CPU and on the device
        self.layouts: dict[int, tuple[Layout, Layout]] = {}

    def there(self, a: Any) -> Any:
        """An argument, on the device."""
        if isinstance(a, Tensor):
            return self._moved(a)
        if isinstance(a, Layout):
            moved = replace(a, slot=a.slot.to(self.device, copy=True), owner=a.owner.to(self.device, copy=True))
            self.layouts[id(moved)] = moved, a
            return moved
        if isinstance(a, Sparse):
            return Sparse(self._moved(a.index), self._moved(a.value), a.numel)
        if isinstance(a, Held):
            for address, pair in a.trip.pairs.items():
                pair[1].copy_(pair[0])
                self.pairs[address] = pair
            return a.work
        if isinstance(a, Sequence) and not isinstance(a, str):
            return [self.there(x) for x in a]
        return a

    def _moved(self, t: Tensor) -> Tensor:
        if t.device.type != "cpu" or not t.untyped_storage().nbytes():
            return t.to(self.device)
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.pairs:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
            self.pairs[storage.data_ptr()] = here, here.to(self.device, copy=True)
        copy = self.pairs[storage.data_ptr()][1].untyped_storage()
        empty = torch.empty(0, dtype=t.dtype, device=self.device)
        return empty.set_(copy, t.storage_offset(), t.shape, t.stride())  # type: ignore[call-overload]

    def back(self, result: Any) -> Any:
        """A result, on the CPU."""
        if isinstance(result, Tensor):
            assert result.device.type == self.device.type
            return result.cpu()
        if isinstance(result, tuple):
            return tuple(self.back(x) for x in result)
        if isinstance(result, Sparse):
            return Sparse(self.back(result.index), self.back(result.value), result.numel)
        if isinstance(result, Working):
            address = result.out.untyped_storage().data_ptr()
            here = next((h for h, d in self.pairs.values() if d.data_ptr() == address), torch.empty(0))
            out = torch.empty(0, dtype=result.out.dtype)
            out.set_(here.untyped_storage(), result.out.storage_offset(), result.out.shape, (1,))  # type: ignore[call-overload]
            return Held(result, self, out, self.layouts[id(result.layout)][1])
        return result

    def return_all(self) -> None:
        """What was written there, in the CPU's memory, too."""
        for here, there in self.pairs.values():
            here.copy_(there)
