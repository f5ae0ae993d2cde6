"""The one door to Numba: how kernels are compiled, where they are cached, and the few instructions Numba lacks.

Kernels are serial and release the GIL. Numba's parallel loops abort the process when several threads enter them on
its default threading layer, and a rank is meant to have one core: ranks, not loops, are what runs in parallel.
"""

# ruff: noqa: ARG001
# numba hands intrinsics arguments that these do not need, and neither it nor llvmlite is typed; both end in this file.
# pyright: reportMissingParameterType=false, reportUnknownLambdaType=false

from __future__ import annotations

import functools
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import config
from numba.extending import intrinsic, overload

# Elements per step of a walk through a block: few enough to be still in the nearest cache when looked at again, and
# to be fetched ahead of time without driving out what is in use.
PIECE = 1024

settings: Any = config
P = ParamSpec("P")
R = TypeVar("R")


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compiles on first call for each combination of argument types; cached on disk; releases the GIL."""
    options: dict[str, Any] = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy"}
    try:
        return numba.njit(function, **options)
    except RuntimeError:  # "cannot cache function": none of the usual folders can be written
        usual, settings.CACHE_DIR = settings.CACHE_DIR, str(fallback_folder())
        try:
            return numba.njit(function, **options)
        finally:
            settings.CACHE_DIR = usual


@functools.cache
def fallback_folder() -> Path:
    """A folder for compiled kernels under the temporary folder, shared by the ranks of this user on this host.

    Cached kernels are executed, so a folder that anybody else could have written to is never used.
    """
    shared = Path(tempfile.gettempdir()) / f"sparcomm-kernels-{os.getuid()}"
    try:
        shared.mkdir(mode=0o700, exist_ok=True)
        found = shared.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return shared
    except OSError:  # it is a file, or a link to nowhere
        pass
    return Path(tempfile.mkdtemp(prefix="sparcomm-kernels-"))


def _load64(context, array, place):
    """The 8 bytes at ``array[place]`` as one uint64, at any alignment: two float32 in one load."""

    def build(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(64).as_pointer())
        word = builder.load(pointer)
        word.align = 1
        return word

    return types.uint64(array, types.int64), build


def _prefetch(context, array, place):
    """Asks for the cache line of ``array[place]``, which need not exist."""

    def build(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        number = ir.IntType(32)
        pointer = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(function, [pointer, number(0), number(3), number(1)])  # to read, to keep, data
        return context.get_dummy_value()

    return types.void(array, types.int64), build


def _trailing_zeros(context, word):
    """Zeros below the lowest one of a uint64 that is not 0."""

    def build(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), build


def _float_of(context, bits):
    """The float32 with these bits (uint32)."""

    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), build


def _bits_of(context, value):
    """The bits (uint32) of a float32."""

    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), build


load64: Any = intrinsic(_load64)
prefetch: Any = intrinsic(_prefetch)
trailing_zeros: Any = intrinsic(_trailing_zeros)
float_of: Any = intrinsic(_float_of)
bits_of: Any = intrinsic(_bits_of)


def widen(value: Any) -> Any:
    """In kernels: a gradient's element as float. bfloat16 comes as uint16, float16 as int16: Numba has neither."""
    raise TypeError("for compiled code only")


@overload(widen)
def _widen(value):
    if value == types.uint16:
        return lambda value: float_of(np.uint32(np.uint32(value) << np.uint32(16)))
    if value == types.int16:
        return _widen_float16
    return lambda value: value


def _widen_float16(value):
    # Moves exponent and mantissa into place and rebiases; subnormals are renormalised by a subtraction, which is
    # exact and, unlike a multiplication of float32 subnormals, neither slow nor subject to flush-to-zero.
    half = np.uint32(value) & np.uint32(0xFFFF)
    exponent = half & np.uint32(0x7C00)
    bits = ((half & np.uint32(0x7FFF)) << np.uint32(13)) + np.uint32(112 << 23)
    if exponent == np.uint32(0x7C00):
        bits += np.uint32(112 << 23)
    magnitude = float_of(np.uint32(bits))
    if exponent == np.uint32(0):
        magnitude = float_of(np.uint32(bits + np.uint32(1 << 23))) - float_of(np.uint32(113 << 23))
    return -magnitude if half & np.uint32(0x8000) else magnitude


@jit
def next_piece(slot: Any, r: int, block: int, tile: int, lo: int) -> int:
    """Where a walk through a block, in pieces within tiles, goes on after the piece at ``lo`` in round ``r``."""
    blocks = slot.shape[1]
    if lo + PIECE < (r * blocks + slot[r, block] + 1) * tile:
        return lo + PIECE
    return ((r + 1) * blocks + slot[r + 1, block]) * tile if r + 1 < slot.shape[0] else lo
