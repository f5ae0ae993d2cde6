"""What torch.distributed's callers pass, in any of the forms that it has."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sparcomm.mpi_backend.reductions import name_of
from sparcomm.mpi_backend.work import MpiWork, Steps

c10d: Any = dist.distributed_c10d  # whose options are documented, but not exported


def wait_for(works: Sequence[MpiWork]) -> Steps:
    """Steps that end when all the works have ended; raises what one of them failed with."""
    for work in works:
        while not work.poll():
            yield None
        if (error := work.exception()) is not None:
            raise error


def listed(tensors: Any) -> list[Tensor]:
    """One tensor, or several."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def options(kind: Any, opts: Any, more: dict[str, Any]) -> Any:
    """The options of a call in any of torch's forms: an options object, or what it consists of."""
    if isinstance(opts, kind):
        return opts
    made = kind()
    if opts is not None:  # the second argument of the short forms
        more = {("timeout" if isinstance(opts, timedelta) else "root" if isinstance(opts, int) else "op"): opts} | more
    for name, value in more.items():
        if value is not None:
            setattr(made, {"op": "reduceOp", "root": "rootRank"}.get(name, name), value)
    return made


def described(name: str, opts: Any, alike: Tensor | None) -> str:
    """What a collective is, in a line that must be the same on all ranks."""
    op = f" {name_of(opts.reduceOp)}" if hasattr(opts, "reduceOp") else ""
    if hasattr(opts, "rootRank"):
        op += f" with root {opts.rootRank}"
    return f"{name}{op}" + ("" if alike is None else f" of {alike.numel()} elements of {alike.dtype}")


def split(t: Tensor, sizes: Sequence[int] | None, ranks: int) -> dict[int, Tensor]:
    """The rows for each rank; no sizes = as many for each."""
    rows = t.shape[0] if t.dim() else 0
    if not sizes:
        if rows % ranks:
            raise ValueError(f"all_to_all_single of {rows} rows without split sizes: must be a multiple of {ranks}")
        sizes = [rows // ranks] * ranks
    if len(sizes) != ranks or sum(sizes) != rows:
        raise ValueError(f"split sizes {list(sizes)} of {rows} rows: must be {ranks} that add up to the rows")
    return dict(enumerate(t.split(list(sizes))))
