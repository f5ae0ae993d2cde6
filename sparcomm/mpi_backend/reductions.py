"""Reductions: torch's operations on torch's dtypes, by MPI where it knows both, else by torch's own arithmetic.

float16 and bfloat16 are added in float32 in rank order and rounded once, which MPI could not do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparcomm.transport.mpi.library import MPI
from sparcomm.transport.mpi.types import TYPES

_TYPES = {**TYPES, torch.bool: MPI.C_BOOL}
_OPS = {"SUM": MPI.SUM, "PRODUCT": MPI.PROD, "MIN": MPI.MIN, "MAX": MPI.MAX}
_BITS = {"BAND": MPI.BAND, "BOR": MPI.BOR, "BXOR": MPI.BXOR}
_TRUTHS = {
    "SUM": MPI.LOR,
    "MAX": MPI.LOR,
    "BOR": MPI.LOR,
    "PRODUCT": MPI.LAND,
    "MIN": MPI.LAND,
    "BAND": MPI.LAND,
    "BXOR": MPI.LXOR,
}
_TORCH = {
    "SUM": torch.add,
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}
_NUMPY = {
    "SUM": np.add,
    "PRODUCT": np.multiply,
    "MIN": np.minimum,
    "MAX": np.maximum,
    "BAND": np.bitwise_and,
    "BOR": np.bitwise_or,
    "BXOR": np.bitwise_xor,
}
_UNSIGNED = {torch.uint16, torch.uint32, torch.uint64}  # torch has no arithmetic for them
_HALVES = {torch.float16, torch.bfloat16}
_COMPLEX = ("AVG", "PREMUL_SUM", "SUM")


@dataclass(frozen=True)
class Reduction:
    """One operation on one dtype, over ``size`` ranks.

    Attributes:
        kind: of ``_TORCH``.
        factor: what to multiply with first (PREMUL_SUM).
        mean: divide the sum by the number of ranks.
    """

    kind: str
    dtype: torch.dtype
    size: int
    factor: Any = None
    mean: bool = False

    @property
    def native(self) -> tuple[MPI.Datatype, MPI.Op] | None:
        """MPI's own type and operation, if it has them."""
        if self.dtype is torch.bool:
            return MPI.C_BOOL, _TRUTHS[self.kind]
        datatype = _TYPES.get(self.dtype)
        if self.kind in ("MIN", "MAX") and self.dtype.is_floating_point:
            return None  # MPI's loses NaNs, torch's keeps them
        return None if datatype is None else (datatype, (_OPS | _BITS)[self.kind])

    def prepare(self, t: Tensor) -> Tensor:
        """What to send instead of a rank's values."""
        return t if self.factor is None else (t * self.factor).to(t.dtype)

    def finish(self, t: Tensor) -> None:
        """Turns the sum into the result, in place."""
        if self.mean:
            t.div_(self.size)

    def fold(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """``out`` becomes the result of ``parts``, which are in rank order; one of them may be ``out`` itself."""
        if len(parts) == 1:
            if out.data_ptr() != parts[0].data_ptr():
                out.copy_(parts[0])
            self.finish(out)
        elif self.dtype in _UNSIGNED:
            arrays, call = [part.numpy() for part in parts], _NUMPY[self.kind]
            total = call(arrays[0], arrays[1])
            for array in arrays[2:]:
                call(total, array, out=total)
            out.copy_(torch.from_numpy(total))
        elif self.dtype in _HALVES or len(parts) > 2:
            total = parts[0].to(torch.float32 if self.dtype in _HALVES else self.dtype, copy=True)
            for part in parts[1:]:
                _TORCH[self.kind](total, part, out=total)
            self.finish(total)
            out.copy_(total)
        else:
            _TORCH[self.kind](parts[0], parts[1], out=out)
            self.finish(out)


def name_of(op: Any) -> str:
    """As ``SUM``."""
    return getattr(op, "op", op).name  # torch has the operation itself, and a wrapper with a factor


def reduction(op: Any, t: Tensor, size: int) -> Reduction:
    """The operation for tensors like ``t``.

    Raises:
        ValueError: it does not exist for the dtype.
    """
    name = name_of(op)
    dtype = t.dtype
    floating = dtype.is_floating_point and (dtype in _TYPES or dtype in _HALVES)
    if name == "AVG" and floating:
        return Reduction("SUM", dtype, size, mean=True)
    if name == "PREMUL_SUM" and floating:
        return Reduction("SUM", dtype, size, factor=op.__getstate__()[1])
    if (name in _OPS and (floating or dtype in _TYPES)) or (name in _BITS and dtype in _TYPES and not floating):
        return Reduction(name, dtype, size)
    raise ValueError(
        f"ReduceOp.{name} of {dtype}: SUM, PRODUCT, MIN and MAX take floating-point numbers, integers and bool; AVG "
        "and PREMUL_SUM take floating-point numbers; BAND, BOR and BXOR take integers and bool"
    )


def as_real(t: Tensor, op: Any) -> Tensor:
    """A complex tensor as real numbers, where the operation acts on them one by one; other tensors as they are."""
    if not t.is_complex():
        return t
    if (name := name_of(op)) not in _COMPLEX:
        raise ValueError(f"ReduceOp.{name} of {t.dtype}: complex tensors take {', '.join(sorted(_COMPLEX))}")
    return torch.view_as_real(t)
