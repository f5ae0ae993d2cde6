"""The contract of the kernels of a step's sums and of selection, a part of ``interface.Kernels``, where letters are."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sparcomm.layout import Layout


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


class SumKernels(Protocol):
    """A step's sums, selection and sampling; see ``interface.Kernels``."""

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

    def gaussian(self, x: Tensor, z: float, wanted: float, doubt: float, times: int) -> Tensor:
        """Gaussian-k's thresholds: ``mean(x) + z std(x)``, adjusted to how many magnitudes exceed it.

        Up to ``times`` times they are counted: fewer than ``2/3 wanted - doubt`` halve the threshold, more than ``4/3
        wanted + doubt`` raise it by half, else it stays. Source: Shi et al., arXiv 1911.08772.

        Args:
            x: (n,) float32 or float64, n of 1 or more.

        Returns:
            (2,) float64: the threshold last counted, and the one that came of it; not finite where ``x`` is not. The
            last bits may differ between implementations and devices, but not between calls.

        Raises:
            SparcommError: ``x`` is empty, not flat and contiguous, or of another dtype.
        """
        ...
