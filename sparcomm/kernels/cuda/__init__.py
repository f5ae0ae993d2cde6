"""The kernels on NVIDIA GPUs: checks and workspace here, the loops in ``csrc/*.cu``, compiled on first use.

``sparcomm/kernels/interface.py`` holds the contracts. Everything is launched on torch's current stream; where the
interface does not say so, the host waits for nothing.
"""

from __future__ import annotations

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
    "above", "absolute_sum", "add_signs", "checksum", "compensate", "count_above", "deduct", "dequantize", "estimate",
    "from_fixed", "gaussian", "merge", "narrow", "occupancy", "pack_signs", "peel", "quantize", "round_stochastic",
    "sample", "select", "settle", "sketch", "spread_signs", "survey", "to_fixed", "top", "vote", "widen",
]  # fmt: skip
