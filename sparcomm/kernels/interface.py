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
from sparcomm.layout import Layout
from sparcomm.sparse import Sparse


class Working:
    """The sums of one step: gradient + residual and what others sent, minus what was passed on.

    Made by ``compensate`` or ``survey``. Opaque: each implementation derives its own. Every block goes its way alone:
    ``merge``, ``count_above``, then one selection (``select`` or ``above``), ``deduct``, ``merge`` again, ``settle``.

    Attributes:
        out: (n,) gradient + residual, where ``settle`` has not put a sum; of a survey, the vector looked at.
        layout: how it is cut into blocks.
    """

    out: Tensor
    layout: Layout


class Kernels(BitKernels, Protocol):
    """A module (or object) that implements all loops over n or k for one kind of device. Thread-safe."""

    def compensate(
        self,
        grad: Tensor,
        residual: Tensor | None,
        out: Tensor,
        layout: Layout,
        k: int,
        flags: Tensor,
        floor: Tensor | None = None,
    ) -> Working:
        """``out = grad + residual`` in the working dtype, and the sums of a step, which start as that.

        Args:
            grad: (n,) float32, float16, bfloat16 or float64.
            residual: (n,) working dtype, or None for zeros.
            out: (n,) working dtype, overwritten; must not overlap ``grad`` or ``residual``, nor be changed while the
                result is in use.
            k: how many positions of each block will be asked for. Only a hint: no result depends on it.
            flags: NONFINITE is set if any element of the result is inf or NaN; kept, for ``merge``.
            floor: (blocks,) working dtype, on the CPU: a magnitude that somewhat more than k positions of each block
                reach, for whoever knows one; an entry that is negative or not finite says nothing. Only a hint, too.

        Raises:
            SparcommError: a vector has another shape than ``layout`` says, or ``floor`` another shape or dtype than
                said above.
        """
        ...

    def survey(self, x: Tensor, layout: Layout, k: int, flags: Tensor, floor: Tensor | None = None) -> Working:
        """The sums of a step that start as ``x``, which is only read: for selecting from a vector that is there.

        Args:
            x: (n,) working dtype, not to be changed while the result is in use. It is the result's ``out``; as it is
                read only, ``settle`` is an error.
            k, flags, floor: as of ``compensate``, which raises the same errors.
        """
        ...

    def select(self, work: Working, block: int, k: int) -> tuple[Tensor, Tensor]:
        """The k largest sums of a block by magnitude, exactly; ties to the lowest position, padding after zeros.

        Args:
            k: 0 to layout.length. A block is selected from once.

        Returns:
            (k,) int64, strictly increasing local positions, and (k,) sums; zero for padding.

        Raises:
            SparcommError: k is out of range, or the block has been selected from before.
        """
        ...

    def count_above(self, work: Working, block: int, threshold: float) -> int:
        """How many sums of a block have a magnitude above ``threshold``, compared exactly. The host waits for it.

        Args:
            threshold: 0 or more, finite. Padding, being zero, never counts; NaN always does.

        Raises:
            SparcommError: a threshold that is neither, or the block has been selected from.
        """
        ...

    def above(self, work: Working, block: int, threshold: float, k: int) -> tuple[Tensor, Tensor]:
        """The first k positions of a block whose magnitude is above ``threshold``: the block's one selection.

        Where there are fewer, the lowest positions that are not among them fill up, padding last, with value zero: they
        are sent as nothing, and ``deduct`` takes nothing from their sums.

        Args:
            threshold: as of ``count_above``.
            k: 0 to layout.length.

        Returns:
            (k,) int64, strictly increasing local positions, and (k,) sums; zero for what fills up.

        Raises:
            SparcommError: as ``select`` and ``count_above``.
        """
        ...

    def merge(self, work: Working, block: int, index: Tensor, value: Tensor) -> None:
        """Adds ``value`` to a block's sums at ``index``; ``out`` stays as it is.

        Before anything is selected from the block, or once what was selected has been deducted: then it adds to what
        is left, and the block can neither be selected from nor deducted from any more.

        Sets NONFINITE if a sum is inf or NaN, DAMAGED if an index is outside [0, layout.length), which is skipped.
        Of a deducted block, however, a sum of finite numbers that is too large becomes the largest finite value, and
        is not flagged: that happens on the one rank that keeps what several dropped alike, after the flags have gone
        round, so that the others could not know of it.

        Args:
            index: strictly increasing; padding is ignored.

        Raises:
            SparcommError: the block has been selected from, but nothing deducted yet.
        """
        ...

    def deduct(self, work: Working, block: int, value: Tensor) -> None:
        """Takes ``value`` (k,) from the sums of a block that were selected, in their order: what of them was sent.

        Raises:
            SparcommError: another number than were selected, or something was merged into the block since then.
        """
        ...

    def settle(self, work: Working, block: int, index: Tensor) -> None:
        """``out = sums`` at the positions ``index`` of a block; padding and anything outside it is ignored.

        Args:
            index: strictly increasing.

        Raises:
            SparcommError: ``work`` is a survey, whose vector is not to be written.
        """
        ...

    def top(self, index: Tensor, value: Tensor, k: int) -> Tensor:
        """Places, in a sparse list, of its k largest values by magnitude; ties to the first.

        Args:
            index: (m,) int64, strictly increasing.
            value: (m,) working dtype.
            k: 0 to m.

        Returns:
            (k,) int64, strictly increasing, in [0, m).

        Raises:
            SparcommError: k is out of range, or the two differ in shape.
        """
        ...

    def sample(self, grad: Tensor, residual: Tensor | None, count: int) -> Tensor:
        """Elements of ``grad + residual``, one from each of ``count`` equal shares of the vector, in its order.

        Where in share i depends on i alone, as if at random: equal distances could fall in step with a gradient. The
        i-th is at floor((i + c_i) n / count), c_i the top 24 bits of i * 0x9E3779B97F4A7C15 modulo 2^64, as a fraction.

        Args:
            grad: (n,) any gradient dtype.
            residual: (n,) working dtype, or None for zeros.
            count: a power of two. If n is less, all elements are returned.

        Returns:
            (min(count, n),) working dtype.

        Raises:
            SparcommError: a count that is no power of two, or vectors that are not flat or not of one shape.
        """
        ...

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
