"""Data that is hard on kernels, and answers found another way."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparcomm.kernels import cpu, cuda, reference
from sparcomm.layout import Layout, contiguous, dealt, whole
from support import emulator
from support.on_device import OnDevice

T = TypeVar("T")

IMPLEMENTATIONS: dict[str, Any] = {"reference": reference, "cpu": cpu}
if emulator.available():
    IMPLEMENTATIONS["text"] = cuda  # the CUDA text, on CPU tensors
if torch.cuda.is_available():
    # tests/conftest.py marks tests by these names.
    IMPLEMENTATIONS["reference-gpu"], IMPLEMENTATIONS["gpu"] = (OnDevice(m, "cuda") for m in (reference, cuda))
WORKING = (torch.float32, torch.float64)
GRADIENTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIZES = (0, 1, 31, 32, 33, 500, 5000)
KINDS = ("normal", "zero", "equal", "special", "tiny", "spread")


def layouts(n: int) -> list[Layout]:
    """One block, few, and (for small n) more blocks than elements, so that some hold only padding."""
    return [whole(n), dealt(n, 3), contiguous(n, 3), dealt(n, 8), contiguous(n, 40)]


def thinned(kernels: Any, cases: Iterable[T], every: int, start: object = "") -> list[T]:
    """The cases; on the emulator, which is a hundred times slower, only every so many-th, from where ``start`` says.

    ``every`` should have no factor in common with what the innermost loops count to.
    """
    listed = list(cases)
    return listed[zlib.crc32(repr(start).encode()) % every :: every] if kernels is cuda else listed


def data(kind: str, n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """n values of ``dtype``: one of KINDS."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g, dtype=torch.float64)
    if kind == "zero":
        x = torch.where(x > 0, 0.0, -0.0)
    elif kind == "equal":
        x = torch.where(x > 0, 1.25, -1.25)
    elif kind == "special":
        odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.0], dtype=torch.float64)
        pick = torch.randint(0, 12, (n,), generator=g)
        x = torch.where(pick < 6, odd[pick.clamp(max=5)], x)
    elif kind == "tiny":  # subnormal in every dtype, down to its smallest
        x = (x * 3).round() * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    elif kind == "spread":
        x = x * torch.logspace(-6, 4, n, dtype=torch.float64)
    return x.to(dtype)


def block_of(x: Tensor, layout: Layout, block: int) -> Tensor:
    """The values of a block, padding as zeros, one position at a time by the layout's definition."""
    where = layout.to_global(torch.arange(layout.length), block).tolist()
    return torch.tensor([x[j].item() if j < layout.numel else 0.0 for j in where], dtype=x.dtype)


def magnitudes(x: Tensor) -> np.ndarray:
    """IEEE bits without the sign, as NumPy sees them."""
    bits = x.numpy().view(np.uint64 if x.dtype == torch.float64 else np.uint32)
    return bits & np.array(np.iinfo(bits.dtype).max >> 1, bits.dtype)


def top(x: Tensor, k: int) -> list[int]:
    """Sorted positions of the k largest magnitudes, ties to the lowest, by a full sort."""
    key = magnitudes(x)
    order = sorted(range(len(key)), key=lambda i: (-int(key[i]), i))
    return sorted(order[:k])


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, except that any NaN equals any NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    signs = torch.equal(a.signbit() | a.isnan(), b.signbit() | b.isnan())
    return signs and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def increasing(k: int, m: int, seed: int = 0) -> Tensor:
    """k distinct sorted indices below m."""
    rng = np.random.default_rng(seed)
    if m < 1 << 16:
        return torch.from_numpy(np.sort(rng.permutation(m)[:k]).astype(np.int64))
    drawn = np.unique(rng.integers(0, m, 2 * k + 8))
    return torch.from_numpy(np.sort(rng.permutation(drawn)[:k]))
