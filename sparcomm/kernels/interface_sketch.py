"""The contract of the kernels that hash keys into tables: count-sketches of floats, and exact tables of integers.

Letters: k keys, ``width`` lanes. ``key`` is (k,) int64, strictly increasing, 0 to 2^32 - 1, k < 2^31: numbers of blocks
of ``width`` consecutive elements. ``value`` is (k * width,), key after key. A table is (rows, columns * width), of at
least one row and column: cell (r, c) holds ``width`` lanes. Its dtype is float32 or float64 (a count-sketch) or int32
(arithmetic modulo 2^32, which peeling undoes). All of them are contiguous.

In row r, with ``word = noise(key, (seed + r * 0x9E3779B9) mod 2^32)``, ``noise`` the 32-bit words of
``round_stochastic``, a key goes to the bucket ``word * columns >> 32``, with the sign -1 if ``word`` is odd, else 1.
Row r hashes into row r of the table only: three rows are at once a count-sketch of three rows and the three parts of
a 3-partite IBLT.

Every kernel raises SparcommError if a shape or dtype is not as said here, or the keys are not. Who reads the keys on
another device than a CPU would have to wait, so there they are trusted: wrong ones give wrong results, in bounds.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor


class SketchKernels(Protocol):
    """Tables of hashed keys: what can be summed over ranks without agreeing on positions first."""

    def sketch(self, key: Tensor, value: Tensor, width: int, seed: int, out: Tensor) -> None:
        """Overwrites ``out`` with the table of these keys: zeros, then ``cell += sign * value``.

        Sums of floats are made in the order of the keys, cell by cell, so their bits are defined.

        Args:
            value: of ``out``'s dtype; inf and NaN spoil the cells that they go to.
            out: (rows, columns * width).
        """
        ...

    def occupancy(self, key: Tensor, seed: int, columns: int, out: Tensor) -> None:
        """Overwrites ``out`` (rows, columns) int32: how many of ``key`` each bucket holds."""
        ...

    def estimate(
        self,
        table: Tensor,
        key: Tensor,
        width: int,
        seed: int,
        counts: Tensor | None,
        how: Literal["median", "mean", "projection"],
    ) -> Tensor:
        """What a table of floats says of keys.

        Args:
            table: float32 or float64, only read.
            counts: (rows, columns) int32, only read: the ``occupancy`` of all keys that the table may hold. For
                ``how="projection"`` only, else None.
            how: "median" of the rows' ``sign * cell`` (of an even number of them the mean of the middle two, NaN
                counting as largest), their "mean", or "projection": the mean of ``sign * cell / count``, for one row
                the orthogonal projection onto what the table can hold. A row whose count is below 1 adds 0.

        Returns:
            (k * width,) of the table's dtype. Means are sums in the order of the rows, from 0, over their number.
        """
        ...

    def peel(self, table: Tensor, key: Tensor, width: int, seed: int, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decodes a table of integers exactly: a key that is alone in one of its cells has its value there.

        In rounds: all keys that are alone in a cell are read (from the lowest row in which they are) and then taken
        from all their cells, until no round finds one. Of a table that was summed from ``sketch``es of subsets of
        ``key`` the values are the sums modulo 2^32, whatever overflowed in between, and neither they nor ``done``
        depend on an order. Any other table gives wrong values, but the same in every implementation.
        The host waits for a device in each round.

        Args:
            table: int32, used up: what is left is the table of the keys that are not done.
            counts: (rows, columns) int32, the ``occupancy`` of ``key``, used up alike. Anything else gives wrong
                results, which end and stay in bounds, but depend on the implementation.

        Returns:
            (k * width,) int32 values, 0 where not done; (k,) bool, done; () int64, rounds that found a key.
        """
        ...

    def to_fixed(self, value: Tensor, exponent: int, limit: int, out: Tensor) -> Tensor:
        """Writes values as integers in units of ``2^exponent``, rounded to nearest, ties to even.

        Args:
            value: (k,) float32 or float64.
            exponent: -1022 to 1022. The quotient is worked out in float64.
            limit: 1 to 2^31 - 1, the largest magnitude that is written; what is beyond becomes that, NaN 0.
            out: (k,) int32, overwritten.

        Returns:
            () bool: whether anything was beyond the limit, or NaN.
        """
        ...

    def from_fixed(self, fixed: Tensor, exponent: int, dtype: torch.dtype) -> Tensor:
        """``fixed * 2^exponent`` in the working dtype ``dtype``, rounded once; inf where that is too large.

        Args:
            fixed: (k,) int32.
            exponent: -1022 to 1022.
        """
        ...
