"""Tensors as MPI sees them: contiguous bytes in host memory, handed over where they lie if they already are that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparcomm.transport.mpi.library import MPI
from sparcomm.transport.mpi.types import LONGEST


def plain(t: Tensor) -> bool:
    """Whether MPI can read and write the tensor itself."""
    return t.is_contiguous() and t.device.type == "cpu" and not t.is_conj() and not t.is_neg()


def outgoing(t: Tensor) -> Tensor:
    """The tensor's values for MPI to read: itself where possible, else a copy."""
    if t.layout != torch.strided:
        raise ValueError(f"a tensor of layout {t.layout}: must be dense (only all_reduce with SUM takes sparse ones)")
    return t.detach() if plain(t) else t.detach().resolve_conj().resolve_neg().to("cpu").contiguous()


def incoming(t: Tensor) -> Tensor:
    """Memory for MPI to write the tensor's new values to; ``deliver`` brings them home."""
    if t.layout != torch.strided:
        raise ValueError(f"a tensor of layout {t.layout}: must be dense (only all_reduce with SUM takes sparse ones)")
    return t.detach() if plain(t) else torch.empty(t.shape, dtype=t.dtype, device="cpu")


def deliver(t: Tensor, host: Tensor) -> None:
    """Ends what ``incoming(t)`` began."""
    if host.data_ptr() != t.data_ptr() or not plain(t):
        t.detach().copy_(host)


def pieces(t: Tensor) -> Iterator[MPI.buffer]:
    """The bytes of a plain tensor, in messages that MPI can count; at least one."""
    address, nbytes = t.data_ptr(), t.nbytes
    if nbytes <= LONGEST:
        yield MPI.buffer.fromaddress(address, nbytes)
        return
    for start in range(0, nbytes, LONGEST):
        yield MPI.buffer.fromaddress(address + start, min(LONGEST, nbytes - start))


def same_dtype(tensors: Sequence[Tensor]) -> None:
    """Raises ValueError unless they all have one dtype."""
    if len(found := {t.dtype for t in tensors}) > 1:
        raise ValueError(f"tensors of {', '.join(sorted(map(str, found)))}: all must have the same dtype")
