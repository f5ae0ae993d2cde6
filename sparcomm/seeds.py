"""Choices that look random and are the same everywhere: hashes of numbers that all ranks know, never counters."""

from __future__ import annotations

import zlib


def mixed(*numbers: int) -> int:
    """A hash in [0, 2^32) of integers of up to 64 bits, such as (step, unit)."""
    return zlib.crc32(b"".join((n & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little") for n in numbers))
