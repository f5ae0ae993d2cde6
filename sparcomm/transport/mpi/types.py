"""Tensors as MPI sees them: its names for dtypes, where the bytes are, and how many fit into one message."""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm.transport.mpi.library import MPI

LONGEST = 1 << 30  # bytes of a message: MPI counts in an int

# Of numbers that MPI can add. It knows neither float16 nor bfloat16.
TYPES = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.int8: MPI.INT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.uint8: MPI.UINT8_T,
    torch.uint16: MPI.UINT16_T,
    torch.uint32: MPI.UINT32_T,
    torch.uint64: MPI.UINT64_T,
}


def view(t: Tensor) -> MPI.buffer:
    """The bytes of a contiguous tensor where they lie. Does not keep the tensor alive."""
    return MPI.buffer.fromaddress(t.data_ptr(), t.nbytes)
