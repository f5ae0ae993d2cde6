"""The contract of the kernels of bitmaps and of votes between signs, a part of ``interface.Kernels``.

A bitmap over m positions is (wire.bitmap_words(m),) int32: bit i % 32 of word i // 32 is position i, and the unused
bits of the last word are zero. ``rows`` are (p, w) int32, one bitmap of each of p ranks; the words of a row lie side by
side, but rows may lie apart, as the payloads of bags do. Of signs a 1 means negative.

Where neither sign is right, because an element is zero or a vote is tied, a rule decides: "positive", "negative", or
"alternate", which takes bit i % 32 of ``bits.noise(first + i // 32, seed)``: on average each sign in half of the cases,
and the same on all ranks, into however many pieces a vector is cut. ``first`` is the place of the first word given
within the whole vector's words, and may be any integer of 0 or more.

Every kernel raises SparcommError for words that are not int32, arguments whose sizes do not belong together, vectors
that are not flat and contiguous, and an unknown rule.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

from torch import Tensor

Rule = Literal["positive", "negative", "alternate"]
RULES: tuple[Rule, ...] = get_args(Rule)


class BitKernels(Protocol):
    """Bitmaps and votes; see ``interface.Kernels``."""

    def pack(self, mask: Tensor, out: Tensor) -> None:
        """Writes ``mask`` as a bitmap.

        Args:
            mask: (m,) bool.
            out: (wire.bitmap_words(m),) int32, every word overwritten.
        """
        ...

    def unpack(self, words: Tensor, m: int) -> Tensor:
        """(m,) bool: the inverse of ``pack``. What the unused bits say makes no difference."""
        ...

    def support(self, x: Tensor, width: int, out: Tensor) -> None:
        """Writes the bitmap of the keys of ``x`` that hold a non-zero.

        Args:
            x: (n,) any gradient dtype. -0.0 is a zero, NaN is none.
            width: elements of a key, 1 or more: key j is [j * width, (j + 1) * width), and the last may be shorter.
            out: (wire.bitmap_words(ceil(n / width)),) int32, every word overwritten.
        """
        ...

    def popcount(self, words: Tensor) -> Tensor:
        """() int64: how many bits of all words are one."""
        ...

    def prefix(self, words: Tensor) -> Tensor:
        """(w,) int64: how many ones there are in all words before each."""
        ...

    def ones(self, words: Tensor) -> Tensor:
        """(popcount,) int64: the positions of the ones, increasing. The host waits for their number."""
        ...

    def rank(self, words: Tensor, prefix: Tensor, index: Tensor) -> Tensor:
        """(k,) int64: how many ones lie before each position.

        Args:
            words: (w,) int32.
            prefix: (w,) int64, from ``prefix`` of the same words.
            index: (k,) int64, in any order. None lie before a position below 0, all before one from 32 w on.
        """
        ...

    def unite(self, rows: Tensor, out: Tensor) -> None:
        """Writes to ``out`` (w,) the OR of ``rows`` (p, w), p of 1 or more; ``out`` may be one of the rows."""
        ...

    def pack_signs(
        self, x: Tensor, zero: Rule, seed: int, first: int, out: Tensor, present: Tensor | None, flags: Tensor
    ) -> None:
        """Writes the signs of ``x``, and the bitmap of what has one.

        Args:
            x: (m,) any gradient dtype. NaN and inf have the sign that their bits say.
            zero: the rule for zeros of both signs, unless ``present`` is given.
            seed, first: of "alternate".
            out: (wire.bitmap_words(m),) int32, every word overwritten.
            present: as long, overwritten by the bitmap of non-zeros (NaN is one); then zeros are 0 in ``out``. Or None.
            flags: NONFINITE is set if any element is inf or NaN.
        """
        ...

    def vote(
        self, rows: Tensor, present: Tensor | None, tie: Rule, seed: int, first: int, out: Tensor, voted: Tensor | None
    ) -> None:
        """Writes to each bit of ``out`` what more than half of those who vote say there.

        Without ``present`` bits that are 0 in all rows, such as unused ones, become 0 whatever the rule: no tie.

        Args:
            rows: (p, w) int32, p from 1 to 65535.
            present: (p, w) int32: a rank votes where its bit is 1, and only its votes there are looked at. None: all
                vote everywhere.
            tie: the rule for as many votes on either side.
            seed, first: of "alternate".
            out: (w,) int32, every word overwritten; 0 where nobody votes. It may be one of the rows.
            voted: (w,) int32, overwritten by the OR of ``present``, of which it may be a row; None without it.
        """
        ...

    def spread_signs(self, words: Tensor, present: Tensor | None, scale: Tensor, out: Tensor) -> None:
        """Writes -scale where a bit of ``words`` is 1, scale where it is 0, and 0 where ``present`` is given and 0.

        Args:
            words, present: (wire.bitmap_words(m),) int32.
            scale: () of the dtype of ``out``.
            out: (m,) working dtype, every element overwritten.
        """
        ...

    def add_signs(self, words: Tensor, present: Tensor | None, scale: Tensor, out: Tensor) -> None:
        """``out +=`` what ``spread_signs`` of the same arguments would write."""
        ...

    def absolute_sum(self, x: Tensor) -> Tensor:
        """() float64: the sum of magnitudes of ``x`` (n,), any gradient dtype.

        The last bits may differ between implementations and devices, but not between calls, nor with threads.
        """
        ...
