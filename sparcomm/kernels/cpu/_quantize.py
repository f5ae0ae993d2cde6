"""Values as int8 with a scale per group, a power of two: what is sent plus what is not is exactly what there was."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparcomm import wire
from sparcomm.kernels.cpu._code import mix, to_float32
from sparcomm.kernels.cpu._jit import bits_of, jit

GROUP, DAMAGED = wire.GROUP, wire.DAMAGED
# What a code is worth at each scale byte, and the reciprocal: powers of two, so products with them are exact.
WORTH = np.ldexp(1.0, np.arange(256) - wire.SCALE_BIAS)
PER = np.ldexp(1.0, wire.SCALE_BIAS - np.arange(256))

U = np.uint64
W = np.uint32


@jit
def scale_of(largest: Any) -> Any:
    """The scale byte of a group, from the bits (uint32) of its largest finite magnitude: 6 binary places above 1."""
    exponent = largest >> W(23)
    return exponent + W(1) if exponent else largest >> W(22)


@jit
def noise(i: Any, key: Any) -> Any:
    """The random word of position i: all 32 bits of what ``round_stochastic`` takes the top half of."""
    return mix(W(mix(W(W(i) ^ key)) + key))


@jit
def quantize(value: Any, scale: Any, code: Any, stochastic: bool, seed: Any, decoded: Any) -> None:
    """scale: uint8; code: int8; seed: uint32; decoded: dtype of value."""
    key = mix(seed)
    single = np.empty(GROUP, np.float32)
    for group in range(scale.size):
        first = group * GROUP
        size = min(GROUP, value.size - first)
        largest = W(0)
        for i in range(size):
            single[i] = to_float32(value[first + i])
            magnitude = W(bits_of(single[i]) & W(0x7FFFFFFF))
            largest = max(largest, magnitude if magnitude < W(0x7F800000) else W(0))
        byte = scale_of(largest)
        scale[group] = byte
        per, worth = PER[byte], WORTH[byte]
        for i in range(size):
            x = np.float64(single[i]) * per
            x = np.floor(x + noise(first + i, key) * 2.0**-32) if stochastic else np.rint(x)
            x = min(max(x, -127.0), 127.0) if x == x else 0.0
            code[first + i] = np.int8(x)
            decoded[first + i] = code[first + i] * worth  # not of x, which may be -0.0


@jit
def dequantize(scale: Any, code: Any, out: Any, flags: Any) -> None:
    """Any bytes at all give finite values."""
    lowest = np.int8(0)
    for group in range(scale.size):
        first = group * GROUP
        worth = WORTH[scale[group]]
        for i in range(first, min(first + GROUP, code.size)):
            lowest = min(lowest, code[i])
            out[i] = max(code[i], np.int8(-127)) * worth
    if lowest < -127:
        flags[0] |= DAMAGED
