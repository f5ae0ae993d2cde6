"""The kernels on NVIDIA GPUs: checks and workspace here, the loops in ``csrc/*.cu``, compiled on first use.

``sparcomm/kernels/interface.py`` holds the contracts. Everything is launched on torch's current stream; where the
interface does not say so, the host waits for nothing.
"""

from __future__ import annotations

from sparcomm.kernels.cuda.bitmaps import pack, popcount, rank, support, unite, unpack
from sparcomm.kernels.cuda.codes import (
    bitmap_decode,
    bitmap_encode,
    elias_fano_decode,
    elias_fano_encode,
    ones,
    prefix,
    rice_decode,
    rice_encode,
)
from sparcomm.kernels.cuda.entries import add, expand, gather, merge_sum, scatter, subtract
from sparcomm.kernels.cuda.working import (
    above,
    compensate,
    count_above,
    deduct,
    merge,
    sample,
    select,
    settle,
    survey,
    top,
)

__all__ = [
    "above", "add", "bitmap_decode", "bitmap_encode", "compensate", "count_above", "deduct", "elias_fano_decode",
    "elias_fano_encode", "expand", "gather", "merge", "merge_sum", "ones", "pack", "popcount", "prefix", "rank",
    "rice_decode", "rice_encode", "sample", "scatter", "select", "settle", "subtract", "support", "survey", "top",
    "unite", "unpack",
]  # fmt: skip
