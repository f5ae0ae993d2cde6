"""Stochastic rounding: float32 to bfloat16 with random bits that depend on the seed and the position alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparcomm.kernels.cpu._code import mix
from sparcomm.kernels.cpu._jit import jit

W = np.uint32


@jit
def round_stochastic(bits: Any, out: Any, seed: Any) -> None:
    """bits: float32 as uint32; out: bfloat16 as uint16; seed: uint32. No branches, so that it becomes vector code."""
    key = mix(seed)
    for i in range(bits.size):
        noise = W(mix(W(mix(W(W(i) ^ key)) + key)) >> W(16))
        f = W(bits[i] & W(0x7FFFFFFF))
        short = min(W(W(f + noise) >> W(16)), W(0x7F7F))
        short = W(0x7F80) if f >= W(0x7F800000) else short
        short = W(0x7FC0) if f > W(0x7F800000) else short
        out[i] = short | W(W(bits[i] >> W(16)) & W(0x8000))
