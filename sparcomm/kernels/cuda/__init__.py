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
from sparcomm.kernels.cuda.gauss import gaussian
from sparcomm.kernels.cuda.signs import absolute_sum, add_signs, pack_signs, spread_signs, vote
from sparcomm.kernels.cuda.sketches import estimate, from_fixed, occupancy, peel, sketch, to_fixed
from sparcomm.kernels.cuda.values import checksum, dequantize, narrow, quantize, round_stochastic, widen
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
    "above", "absolute_sum", "add", "add_signs", "bitmap_decode", "bitmap_encode", "checksum", "compensate",
    "count_above", "deduct", "dequantize", "elias_fano_decode", "elias_fano_encode", "estimate", "expand", "from_fixed",
    "gather", "gaussian", "merge", "merge_sum", "narrow", "occupancy", "ones", "pack", "pack_signs", "peel", "popcount",
    "prefix", "quantize", "rank", "rice_decode", "rice_encode", "round_stochastic", "sample", "scatter", "select",
    "settle", "sketch", "spread_signs", "subtract", "support", "survey", "to_fixed", "top", "unite", "unpack", "vote",
    "widen",
]  # fmt: skip
