"""The contract of every kernel: names, signatures, what is read and what is written.

``reference.py`` is the specification in plain torch; every other implementation returns the same bits. Letters:
n elements, k kept positions, p blocks. ``x`` and ``out`` are 1-D, contiguous, of the working dtype (float32 or
float64), in natural order, ``layout.numel`` long. ``index`` is int64, sorted, of local positions in ``block``;
positions beyond ``numel`` are padding, worth zero and never stored. ``flags`` is uint8 of shape (1,), into which
``wire.NONFINITE`` and ``wire.DAMAGED`` are ORed. No kernel touches memory out of bounds, whatever an index says.

Magnitudes are compared as IEEE bits without the sign, so NaN > inf > finite, and ties go to the lowest position:
results depend neither on the device nor on threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sparcomm.kernels.interface_bits import BitKernels
from sparcomm.kernels.interface_sketch import SketchKernels
from sparcomm.kernels.interface_sums import SumKernels, Working
from sparcomm.layout import Layout
from sparcomm.sparse import Sparse

__all__ = ["Kernels", "Working"]


class Kernels(SumKernels, BitKernels, SketchKernels, Protocol):
    """A module (or object) that implements all loops over n or k for one kind of device. Thread-safe."""

    def gather(self, x: Tensor, index: Tensor, layout: Layout, block: int) -> Tensor:
        """(k,) values of ``x`` at ``index``; zero for padding and for anything outside [0, layout.length)."""
        ...

    def subtract(self, x: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int) -> None:
        """``x[index] -= value``, in place; padding and anything outside [0, layout.length) is ignored."""
        ...

    def add(self, x: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int, flags: Tensor) -> None:
        """``x[index] += value``, in place.

        Args:
            index: strictly increasing; padding is ignored.
            flags: NONFINITE is set if a sum is inf or NaN, DAMAGED if an index is outside [0, layout.length);
                such an entry is skipped.
        """
        ...

    def scatter(self, out: Tensor, index: Tensor, value: Tensor, layout: Layout, block: int) -> None:
        """``out[index] = value``, in place; padding and anything outside [0, layout.length) is ignored."""
        ...

    def expand(self, out: Tensor, index: Sequence[Tensor], value: Sequence[Tensor], layout: Layout) -> None:
        """Writes all of ``out`` in one pass: the blocks' values at their positions, zeros elsewhere.

        Args:
            out: (n,) any float dtype; values are cast to it.
            index, value: one sorted list per block; padding and anything outside a block is ignored.
        """
        ...

    def merge_sum(self, a: Sparse, b: Sparse) -> Sparse:
        """The sum of two sparse vectors of one length: the union of their indices; ``a + b`` where both have one."""
        ...

    def elias_fano_encode(self, index: Tensor, m: int, out: Tensor) -> None:
        """Codes k strictly increasing indices below m.

        Args:
            index: (k,) int64.
            out: (wire.elias_fano_words(k, m),) int32, every word overwritten, unused bits zero.
        """
        ...

    def elias_fano_decode(self, words: Tensor, k: int, m: int, flags: Tensor) -> Tensor:
        """The k indices below m that ``words`` codes.

        Args:
            words: (wire.elias_fano_words(k, m),) int32, any bits at all.
            flags: DAMAGED is set unless ``words`` is exactly what ``elias_fano_encode`` writes for the result.

        Returns:
            (k,) int64, strictly increasing, in [0, m): 0, 1, ..., k - 1 if damaged. The host waits for nothing.

        Raises:
            SparcommError: ``words`` has the wrong length, or k > m.
        """
        ...

    def bitmap_encode(self, index: Tensor, m: int, out: Tensor) -> None:
        """Codes k strictly increasing indices below m as a bitmap: bit i % 32 of word i // 32.

        Args:
            out: (wire.bitmap_words(m),) int32, every word overwritten, unused bits zero.
        """
        ...

    def bitmap_decode(self, words: Tensor, k: int, m: int, flags: Tensor) -> Tensor:
        """As ``elias_fano_decode``, of the (wire.bitmap_words(m),) words of a bitmap."""
        ...

    def rice_encode(self, index: Tensor, m: int, out: Tensor) -> int:
        """Golomb-Rice codes k strictly increasing indices below m: their gaps, in as few bits as such a code can.

        ``docs/wire-format.md`` has the layout. The number of low bits is the one (the smallest, if several) that makes
        the code shortest; where it is 0 the code is a bitmap. Nothing is written for k = 0 and k = m. The host waits
        for the device: this is for bags of variable length only.

        Args:
            index: (k,) int64.
            out: (wire.rice_words(k, m),) int32, whose beginning is overwritten; the rest stays as it is.

        Returns:
            How many words that is. Unused bits of the last one are zero.

        Raises:
            SparcommError: ``out`` has another length, or m is 2^60 or more.
        """
        ...

    def rice_decode(self, words: Tensor, k: int, m: int, flags: Tensor) -> Tensor:
        """The k indices below m that ``words`` codes. The host waits for the device.

        Args:
            words: int32, as many as ``rice_encode`` returned, but any number of any bits at all is safe.
            flags: DAMAGED is set unless ``words`` is exactly what ``rice_encode`` writes for the result.

        Returns:
            (k,) int64, strictly increasing, in [0, m): 0, 1, ..., k - 1 if damaged.

        Raises:
            SparcommError: k > m, or m is 2^60 or more.
        """
        ...

    def quantize(self, value: Tensor, scale: Tensor, code: Tensor, seed: int | None) -> Tensor:
        """Writes values as int8 codes; groups of ``wire.GROUP`` consecutive ones share a scale, a power of two.

        A value is ``code * 2^(scale - 134)``, exact in float32 and float64. The scale is the one at which the group's
        largest finite magnitude is coded as 64 to 127 (0 if it is below 2^-127), so integers up to 127 come through as
        they are. Float64 goes by way of float32, as in ``narrow``. For finite values ``value - decoded`` is exact in
        the working dtype, but for those below half a unit that random bits lift to a whole one.

        What rounds to 128 becomes 127, as do inf and what random bits would lift there; NaN becomes 0. Neither inf
        nor NaN can be told from the codes: they travel as the status bit of the bag, which makes the step void.

        Args:
            value: (k,) working dtype.
            scale: (wire.scales(k),) uint8, overwritten.
            code: (k,) int8, -127 to 127, overwritten.
            seed: None rounds to nearest, ties to even. 0 to 2^32 - 1 rounds down after adding a random number of
                [0, 1), in units of the scale: the 32-bit word of which ``round_stochastic`` takes the top half, times
                2^-32, added in float64. Where nothing saturates the expected value is ``value``: exactly if it is a
                multiple of 2^-32 units, as all above 2^-9 are, else to within 2^-32 units.

        Returns:
            (k,) what a receiver will read, of ``value``'s dtype, in memory of its own.

        Raises:
            SparcommError: a shape or dtype does not fit.
        """
        ...

    def dequantize(self, scale: Tensor, code: Tensor, dtype: torch.dtype, flags: Tensor) -> Tensor:
        """Values in the working dtype ``dtype`` from what ``quantize`` wrote; finite whatever the bytes.

        Args:
            flags: DAMAGED is set if a code is -128, which is never written; it counts as -127.

        Raises:
            SparcommError: a shape or dtype does not fit.
        """
        ...

    def narrow(self, value: Tensor, out: Tensor) -> Tensor:
        """Writes ``value`` in the wire dtype of ``out``, and returns what a receiver will read from it.

        Rounds to nearest even (float64 by way of float32). Finite values beyond the wire dtype's range become
        its largest finite value; inf and NaN stay.

        Args:
            value: (k,) working dtype.
            out: (k,) float32, bfloat16 or float16, overwritten.

        Returns:
            (k,) of ``value``'s dtype, in memory of its own.
        """
        ...

    def widen(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Wire values (float32, bfloat16, float16) in the working dtype ``dtype``, in memory of their own."""
        ...

    def round_stochastic(self, x: Tensor, out: Tensor, seed: int) -> None:
        """Writes ``x`` as bfloat16, up or down at random, so that the expected value is ``x`` itself.

        The discarded 16 bits of the magnitude, plus 16 random ones, carry into the kept bits or not. The random ones
        are the top half of ``mix(mix(i ^ mix(seed)) + mix(seed))`` in uint32 arithmetic, i the element's position and
        ``mix`` that of ``checksum``: they depend on nothing but (seed, i modulo 2^32).

        What bfloat16 can represent stays as it is, zeros' signs, subnormals, inf and NaN (quiet, of its sign)
        included. Beyond bfloat16's largest finite value there is no neighbour above: finite values never become inf.

        Args:
            x: (n,) float32.
            out: (n,) bfloat16, overwritten.
            seed: 0 to 2^32 - 1; another one gives independent rounding.

        Raises:
            SparcommError: ``x`` is not float32, ``out`` not bfloat16, or they differ in shape.
        """
        ...

    def checksum(self, words: Tensor) -> Tensor:
        """A 32-bit checksum of a bag, with word 3 (where it is stored) counted as 0.

        The sum modulo 2^32 of ``mix(words[i] ^ (i * 0x9E3779B9))`` with a bijective ``mix``: any change of a single
        word is detected, words may be summed in any order, and a word that moves is noticed.

        Args:
            words: (at least 4,) int32.

        Returns:
            () int32 on the same device.
        """
        ...
