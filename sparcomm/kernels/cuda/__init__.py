"""The kernels on NVIDIA GPUs: checks and workspace here, the loops in ``csrc/*.cu``, compiled on first use.

``sparcomm/kernels/interface.py`` holds the contracts. Everything is launched on torch's current stream; where the
interface does not say so, the host waits for nothing.
"""

from __future__ import annotations

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
    "above", "compensate", "count_above", "deduct", "merge", "sample", "select", "settle", "survey", "top",
]  # fmt: skip
