"""Values on the wire as CUDA text: ``quantize.cu`` and ``narrow.cu``. ``interface.py`` holds the contracts."""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.dtypes import WIRE_DTYPES
from sparcomm.errors import SparcommError
from sparcomm.kernels.bits import MASK32
from sparcomm.kernels.checks import check_rounding, check_scales
from sparcomm.kernels.cuda.launch import run

EACH = 4  # elements of a thread at once, as in the text


def quantize(value: Tensor, scale: Tensor, code: Tensor, seed: int | None) -> Tensor:
    """Codes of 8 bits in units of a power of two per group; returns what a receiver reads."""
    check_scales(scale, code, value)
    _check_working(value.dtype)
    _check_flat(value, scale, code)
    decoded, k = torch.empty_like(value), value.numel()
    number = -1 if seed is None else seed & MASK32
    run("quantize", "quantize", k, value, value, k, scale, code, number, decoded, each=EACH, WORK=value.dtype)
    return decoded


def dequantize(scale: Tensor, code: Tensor, dtype: torch.dtype, flags: Tensor) -> Tensor:
    """The inverse of quantize, on any bytes."""
    check_scales(scale, code)
    _check_working(dtype)
    _check_flat(scale, code)
    k = code.numel()
    out = torch.empty(k, dtype=dtype, device=code.device)
    run("quantize", "dequantize", k, code, scale, code, k, out, flags, each=EACH, WORK=dtype)
    return out


def narrow(value: Tensor, out: Tensor) -> Tensor:
    """Casts to the wire dtype, saturating; returns what a receiver reads."""
    if value.shape != out.shape:
        raise SparcommError(f"shapes {tuple(value.shape)} and {tuple(out.shape)} must be equal")
    if out.dtype not in WIRE_DTYPES.values():
        raise SparcommError(f"values in {out.dtype}: must be one of {', '.join(map(str, WIRE_DTYPES.values()))}")
    _check_working(value.dtype)
    _check_flat(value, out)
    decoded, k = torch.empty_like(value), value.numel()
    run("narrow", "narrow", k, value, value, k, out, decoded, each=EACH, WORK=value.dtype, WIRE=out.dtype)
    return decoded


def widen(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Wire values in the working dtype; torch's own cast is already one pass."""
    return value.to(dtype, copy=True)


def round_stochastic(x: Tensor, out: Tensor, seed: int) -> None:
    """Adds 16 random bits below those that bfloat16 keeps, then cuts."""
    check_rounding(x, out)
    _check_flat(x, out)
    run("quantize", "round_stochastic", x.numel(), x, x, x.numel(), seed & MASK32, out, each=EACH, WORK=x.dtype)


def checksum(words: Tensor) -> Tensor:
    """Sum of mixed words."""
    if words.numel() < wire.HEADER_WORDS:
        raise SparcommError(f"checksum of {words.numel()} words: needs at least the {wire.HEADER_WORDS} of a header")
    _check_flat(words)
    out = torch.zeros((), dtype=torch.int32, device=words.device)
    run("quantize", "checksum", words.numel(), words, words, words.numel(), out, each=EACH, WORK=torch.float32)
    return out


# Text reads and writes side by side from a tensor's first element on: these checks make its accesses safe ones.


def _check_flat(*tensors: Tensor) -> None:
    for t in tensors:
        if not t.is_contiguous():
            raise SparcommError(f"{t.dtype}{list(t.shape)}, stride {list(t.stride())}: must be contiguous")


def _check_working(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise SparcommError(f"values in {dtype}: must be float32 or float64")
