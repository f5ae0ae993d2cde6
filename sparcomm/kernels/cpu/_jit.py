"""The one door to Numba: how kernels are compiled, where they are cached, and the few instructions Numba lacks.

Kernels are serial and release the GIL. Numba's parallel loops abort the process when several threads enter them on
its default threading layer; where a rank has several cores, _parts.py runs a kernel on several parts of a vector.
"""

# ruff: noqa: ARG001, ARG005
# numba hands intrinsics arguments that these do not need, and neither it nor llvmlite is typed; both end in this file.
# pyright: reportMissingParameterType=false, reportUnknownLambdaType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import config
from numba.extending import intrinsic, overload

from sparcomm.kernels.folder import fallback_folder

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


def _bare(context, array):
    """The same array without a count of its owners, whose atomic changes at each slice would drain all stores.

    The array that it was made from has to stay in use as long.
    """

    def build(context, builder, signature, args):
        view = context.make_array(signature.args[0])(context, builder, args[0])
        view.meminfo = ir.Constant(view.meminfo.type, None)
        view.parent = ir.Constant(view.parent.type, None)
        return view._getvalue()  # noqa: SLF001

    return array(array), build


def _sixty_four(context, builder, kind, array, place):
    """The 64 integers from ``array[place]`` on, as a vector, and the type of vectors like it."""
    integer = ir.IntType(kind.dtype.bitwidth)
    vector = ir.VectorType(integer, 64)
    data = context.make_array(kind)(context, builder, array).data
    loaded = builder.load(builder.bitcast(builder.gep(data, [place]), vector.as_pointer()))
    loaded.align = integer.width // 8
    return loaded, vector


def _reaching(context, bits, place, floor):
    """Which of the 64 integers from ``bits[place]`` on are at least ``floor``, sign bits apart: one bit each."""

    def build(context, builder, signature, args):
        loaded, vector = _sixty_four(context, builder, signature.args[0], args[0], args[1])
        magnitude = builder.and_(loaded, ir.Constant(vector, [(1 << (vector.element.width - 1)) - 1] * 64))
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), args[2], ir.IntType(32)(0))
        spread = ir.Constant(ir.VectorType(ir.IntType(32), 64), [0] * 64)
        least = builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), spread)
        return builder.bitcast(builder.icmp_signed(">=", magnitude, least), ir.IntType(64))

    return types.uint64(bits, types.int64, bits.dtype), build


def _negative(context, bits, place):
    """Which of the 64 integers from ``bits[place]`` on have their sign bit set: one bit each."""

    def build(context, builder, signature, args):
        loaded, vector = _sixty_four(context, builder, signature.args[0], args[0], args[1])
        return builder.bitcast(builder.icmp_signed("<", loaded, ir.Constant(vector, [0] * 64)), ir.IntType(64))

    return types.uint64(bits, types.int64), build


def _trailing_zeros(context, word):
    """Zeros below the lowest one of a uint64; 64 if it is 0."""

    def build(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), build


def _leading_zeros(context, word):
    """Zeros above the highest one of a uint64; 64 if it is 0."""

    def build(context, builder, signature, args):
        return builder.ctlz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.int64(types.uint64), build


def _ones(context, word):
    """How many bits of a uint64 are one."""

    def build(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.uint64), build


def _stream(context, source, at, target, to):
    """Copies the 64 bytes from ``source[at]`` on to ``target[to]``, a multiple of 64 bytes, past the caches.

    A plain store first reads the line that it is about to overwrite. To be followed by ``fence`` before others look.
    """

    def build(context, builder, signature, args):
        line = ir.VectorType(ir.IntType(32), 16).as_pointer()
        pointers = [
            builder.bitcast(builder.gep(context.make_array(kind)(context, builder, array).data, [place]), line)
            for kind, array, place in ((source, args[0], args[1]), (target, args[2], args[3]))
        ]
        loaded = builder.load(pointers[0])
        loaded.align = 1
        stored = builder.store(loaded, pointers[1])
        stored.align = 64
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(source, types.int64, target, types.int64), build


def _fence(context):
    """Makes what was streamed visible to other threads before anything that follows."""

    def build(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), build


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
bare: Any = intrinsic(_bare)
reaching: Any = intrinsic(_reaching)
negative: Any = intrinsic(_negative)
trailing_zeros: Any = intrinsic(_trailing_zeros)
leading_zeros: Any = intrinsic(_leading_zeros)
ones: Any = intrinsic(_ones)
stream: Any = intrinsic(_stream)
fence: Any = intrinsic(_fence)
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


def span(array: Any, lo: Any, size: Any) -> Any:
    """In kernels: ``array[lo : lo + size]``, or None of None.

    An index into it that counts from 0 is known not to be negative: no test per element.
    """
    raise TypeError("for compiled code only")


@overload(span)
def _span(array, lo, size):
    if isinstance(array, types.NoneType):
        return lambda array, lo, size: None
    return lambda array, lo, size: bare(array)[lo : lo + size]


def fetch(array: Any, lo: Any, size: Any) -> None:
    """In kernels: asks for ``array[lo : lo + size]``, which need not exist; nothing if array is None."""
    raise TypeError("for compiled code only")


@overload(fetch)
def _fetch(array, lo, size):
    if isinstance(array, types.NoneType):
        return lambda array, lo, size: None
    return _fetch_lines


def _fetch_lines(array, lo, size):
    for i in range(lo, lo + size, 64 // array.itemsize):
        prefetch(array, i)


@jit
def copy(source: Any, out: Any, lo: int, size: int, streaming: bool) -> None:
    """Copies the first ``size`` elements of ``source`` to ``out[lo:]``, past the caches if ``streaming``."""
    lane = 64 // out.itemsize
    even = size // lane * lane if streaming else 0
    for i in range(0, even, lane):
        stream(source, i, out, lo + i)
    rest, target = span(source, even, size - even), span(out, lo + even, size - even)
    for i in range(target.size):
        target[i] = rest[i]
