"""A device on paper: PyTorch's "meta" tensors, which have no data, and a host that therefore cannot wait for any.

What runs on them runs on a GPU without a host synchronisation, as far as PyTorch itself is concerned: reading
a value (``item``, ``bool``, ``tolist``, ``nonzero``, ``unique``, masks as indices) is an error of "meta" itself, and
copies from the host, which "meta" would allow, are refused here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparcomm.transport.base import Op
from sparcomm.transport.common import BaseTransport

PAPER = torch.device("meta")
_MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, Tensor.new_tensor)
_DRAWS_FROM_HOST = ("aten._to_copy", "aten.copy_", "aten.where", "aten.index", "aten.index_put_", "aten.masked_fill")


class HostWaits(AssertionError):
    """The host would wait for the device."""


class NeverWaits:
    """A context in which it is an error to do on ``PAPER`` what makes the host of a GPU wait."""

    def __enter__(self) -> None:
        self._modes = (_Calls(), _Operations())
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Calls(TorchFunctionMode):
    """What cannot be seen any more once PyTorch has broken it up into operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _MAKERS and not (args and isinstance(args[0], Tensor) and func is not Tensor.new_tensor):
            where = kwargs.get("device", args[0].device if func is Tensor.new_tensor else "cpu")
            if torch.device(where) == PAPER:
                raise HostWaits(f"{func.__name__}(..., device=...) is a copy from the host: use full, zeros or arange")
        if func is Tensor.__setitem__ and args[0].device == PAPER:
            target, index, value = args
            index = index if isinstance(index, tuple) else (index,)
            single = len(index) == target.dim() and all(isinstance(i, int) for i in index)
            if single and not isinstance(value, Tensor):
                raise HostWaits("x[i] = number is a copy from the host: use x[i].fill_(number)")
            if any(isinstance(i, list) for i in index):
                raise HostWaits("x[[...]] is a copy from the host")
        if func is Tensor.__getitem__ and args[0].device == PAPER:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(i, list) for i in index):
                raise HostWaits("x[[...]] is a copy from the host")
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Operations that would copy from the host to the device, or from it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if name.startswith(_DRAWS_FROM_HOST):
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            places = {t.device for t in tensors}
            if isinstance(kwargs.get("device"), torch.device):
                places.add(kwargs["device"])
            if name.startswith("aten.index") and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:2]):
                raise HostWaits(f"{name} with a mask")
            if len(places) > 1:
                raise HostWaits(f"{name} between {' and '.join(sorted(map(str, places)))}")
        return func(*args, **kwargs)


class PaperTransport(BaseTransport):
    """One rank of a group whose messages have no content."""

    def _transfer(
        self, send: Tensor | None, to: int, recv: Tensor | None, source: int, capacity: bool, tag: int
    ) -> None:
        assert not capacity, "NCCL takes no messages of varying length"

    def _all_to_all(self, out: Tensor, x: Tensor, tag: int) -> None:
        pass

    def _native_all_reduce(self, x: Tensor, op: Op) -> None:
        pass

    def _make_split(self, members: list[int], color: int) -> PaperTransport:
        raise AssertionError("teams are beyond paper: who is in one has to be read")

    def _die(self) -> None:
        pass


def vectors(sizes: Iterable[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Flat tensors on paper."""
    return [torch.empty(n, dtype=dtype, device=PAPER) for n in sizes]
