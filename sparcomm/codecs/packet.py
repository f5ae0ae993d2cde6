"""k sorted indices below m and their values as one run of words, whose length depends on k, m and dtype only.

Indices: nothing when k = m (all positions), else Elias-Fano or a bitmap, whichever is shorter (the bitmap from a
density of about 0.25 on). At 1 % Elias-Fano costs 8.6 bits an index, where the entropy of a random set is 8.08
and a plain 32-bit index 32. Values: float32, bfloat16 or float16, packed, padded to a whole word.
Source of the index code: Elias, "Efficient storage and retrieval by content and address of static files", 1974.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.kernels import Kernels


@dataclass(frozen=True)
class Packet:
    """A coded sparse vector of exactly ``k`` entries out of ``m``, values as ``dtype``."""

    k: int
    m: int
    dtype: torch.dtype

    @functools.cached_property
    def index_words(self) -> int:
        """Words that the indices take."""
        if self.k in (0, self.m):
            return 0
        return min(wire.elias_fano_words(self.k, self.m), wire.bitmap_words(self.m))

    @property
    def value_words(self) -> int:
        """Words that the values take."""
        return wire.words(8 * self.k * self.dtype.itemsize)

    @functools.cached_property
    def words(self) -> int:
        """Words in all."""
        return self.index_words + self.value_words

    @functools.cached_property
    def _is_bitmap(self) -> bool:
        return wire.bitmap_words(self.m) <= wire.elias_fano_words(self.k, self.m)

    def encode(self, index: Tensor, value: Tensor, out: Tensor, kernels: Kernels) -> Tensor:
        """Writes ``index`` (k,) int64, strictly increasing, and ``value`` (k,) into ``out`` (words,) int32.

        Returns the (k,) values as the receiver will read them, in ``value``'s dtype: the sender goes on with these.
        """
        split = self.index_words
        if split and self._is_bitmap:
            kernels.bitmap_encode(index, self.m, out[:split])
        elif split:
            kernels.elias_fano_encode(index, self.m, out[:split])
        if self.k % 2 and self.dtype.itemsize == 2:
            out[-1] = 0  # the padding half-word is part of the checksum
        return kernels.narrow(value, out[split:].view(self.dtype)[: self.k])

    def decode(self, words: Tensor, dtype: torch.dtype, flags: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
        """Reads (index, value) back from ``words``, values in the working ``dtype``; damage sets a bit of ``flags``.

        Whatever the bytes, the k indices returned are below m and in order.
        """
        split = self.index_words
        if not split:
            index = torch.arange(self.k, device=words.device)
        elif self._is_bitmap:
            index = kernels.bitmap_decode(words[:split], self.k, self.m, flags)
        else:
            index = kernels.elias_fano_decode(words[:split], self.k, self.m, flags)
        return index, kernels.widen(words[split:].view(self.dtype)[: self.k], dtype)
