"""k sorted indices below m and their values as one run of words.

Indices: nothing when k = m (all positions). ``"elias-fano"``: Elias-Fano or a bitmap, whichever is shorter (the bitmap
from a density of about 0.25 on), of a length that depends on k and m only. ``"rice"``: Golomb-Rice codes of the gaps
(a bitmap is one of them), of a length that depends on the indices. At 1 % Elias-Fano costs 8.6 bits an index and
Rice 8.1, where the entropy of a random set is 8.08 and a plain 32-bit index 32.

Values: float32, bfloat16, float16, or int8 in groups that share a power of two as their scale (8.25 bits a value),
padded to a whole word. What a receiver reads is exact in the working dtype: the sender knows what was rounded off.

Sources: Elias, "Efficient storage and retrieval by content and address of static files", 1974; Rice & Plaunt, "Adaptive
variable-length coding for efficient compression of spacecraft television data", 1971.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.clock import Range
from sparcomm.dtypes import WIRE_DTYPES
from sparcomm.errors import ConfigError, SparcommError
from sparcomm.kernels import Kernels

VALUES = (*WIRE_DTYPES, "int8")
ROUNDINGS = ("nearest", "stochastic")
INDICES = ("elias-fano", "rice")
STOCHASTIC = ("bfloat16", "int8")


def check_values(values: str = "float32", rounding: str = "nearest", indices: str = "elias-fano") -> None:
    """Raises ConfigError, naming the choices, unless there is such a way to code values and indices."""
    given = (("values", values, VALUES), ("rounding", rounding, ROUNDINGS), ("indices", indices, INDICES))
    for name, value, allowed in given:
        if value not in allowed:
            raise ConfigError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")
    if rounding == "stochastic" and values not in STOCHASTIC:
        raise ConfigError(
            f"rounding={rounding!r} with values={values!r}: values must be one of {', '.join(map(repr, STOCHASTIC))}"
        )


class Encoded(NamedTuple):
    """What ``Packet.encode`` did.

    Attributes:
        value: (k,) the values as the receiver will read them, in the dtype of those that were given.
        words: how many words were written.
    """

    value: Tensor
    words: int


@dataclass(frozen=True)
class Packet:
    """A coded sparse vector of exactly ``k`` entries out of ``m``.

    Attributes:
        values: one of VALUES.
        rounding: "nearest" (ties to even), or "stochastic": up or down at random, so that the expected value is right.
        indices: one of INDICES.

    Raises:
        ConfigError: one of these, or k or m, is not allowed.
    """

    k: int
    m: int
    values: str = "float32"
    rounding: str = "nearest"
    indices: str = "elias-fano"

    def __post_init__(self) -> None:
        check_values(self.values, self.rounding, self.indices)
        if not 0 <= self.k <= self.m:
            raise ConfigError(f"k={self.k}: must be from 0 to m={self.m}")

    @functools.cached_property
    def static(self) -> bool:
        """Whether every message has ``words`` words, whatever it says."""
        return self.indices != "rice" or self.k in (0, self.m)

    @functools.cached_property
    def index_words(self) -> int:
        """Words that the indices take, at most if not ``static``."""
        if self.k in (0, self.m):
            return 0
        if self.indices == "rice":
            return wire.rice_words(self.k, self.m)
        return min(wire.elias_fano_words(self.k, self.m), wire.bitmap_words(self.m))

    @functools.cached_property
    def value_words(self) -> int:
        """Words that the values take."""
        return wire.words(8 * self._value_bytes)

    @functools.cached_property
    def words(self) -> int:
        """Words in all, at most if not ``static``."""
        return self.index_words + self.value_words

    @functools.cached_property
    def _value_bytes(self) -> int:
        if self.values == "int8":
            return wire.scales(self.k) + self.k
        return self.k * WIRE_DTYPES[self.values].itemsize

    @functools.cached_property
    def _is_bitmap(self) -> bool:
        return wire.bitmap_words(self.m) <= wire.elias_fano_words(self.k, self.m)

    def encode(self, index: Tensor, value: Tensor, out: Tensor, kernels: Kernels, seed: int = 0) -> Encoded:
        """Writes ``index`` (k,) int64, strictly increasing, and ``value`` (k,) into ``out`` (words,) int32.

        Args:
            out: its first ``Encoded.words`` words are overwritten: all of them if ``static``.
            seed: 0 to 2^32 - 1, for stochastic rounding; another one gives independent rounding.

        Returns:
            The values as the receiver will read them, with which the sender goes on, and the words to send.
        """
        with Range("encode"):
            return self._encode(index, value, out, kernels, seed)

    def _encode(self, index: Tensor, value: Tensor, out: Tensor, kernels: Kernels, seed: int) -> Encoded:
        if not self.static:
            split = self.value_words
            decoded = self._encode_values(value, out[:split], kernels, seed)
            return Encoded(decoded, split + kernels.rice_encode(index, self.m, out[split:]))
        split = self.index_words
        if split and self._is_bitmap:
            kernels.bitmap_encode(index, self.m, out[:split])
        elif split:
            kernels.elias_fano_encode(index, self.m, out[:split])
        return Encoded(self._encode_values(value, out[split:], kernels, seed), self.words)

    def _encode_values(self, value: Tensor, out: Tensor, kernels: Kernels, seed: int) -> Tensor:
        raw = out.view(torch.uint8)
        raw[self._value_bytes :] = 0  # the padding is part of the checksum
        if self.values == "int8":
            scale, code = self._int8(raw)
            return kernels.quantize(value, scale, code, seed if self.rounding == "stochastic" else None)
        narrow = out.view(WIRE_DTYPES[self.values])[: self.k]
        if self.rounding == "nearest":
            return kernels.narrow(value, narrow)
        single = value
        if value.dtype != torch.float32:
            single = torch.empty_like(value, dtype=torch.float32)
            kernels.narrow(value, single)  # saturates, where a cast would make infinities
        kernels.round_stochastic(single, narrow, seed)
        return kernels.widen(narrow, value.dtype)

    def decode(self, words: Tensor, dtype: torch.dtype, flags: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
        """Reads (index, value) back from ``words``, values in the working ``dtype``; damage sets a bit of ``flags``.

        Args:
            words: just those that ``encode`` wrote. If not ``static``, any number of them is safe.

        Returns:
            (k,) int64, strictly increasing, below m; (k,) values. What does not decode gives the first k positions, and
            zeros where not even the values are there.

        Raises:
            SparcommError: ``static``, and the number of words is another.
        """
        with Range("decode"):
            return self._decode(words, dtype, flags, kernels)

    def _decode(self, words: Tensor, dtype: torch.dtype, flags: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
        if not self.static:
            split = self.value_words
            if words.numel() < split:
                flags |= wire.DAMAGED
                return torch.arange(self.k, device=words.device), words.new_zeros(self.k, dtype=dtype)
            index = kernels.rice_decode(words[split:], self.k, self.m, flags)
            return index, self._decode_values(words[:split], dtype, flags, kernels)
        if words.numel() != self.words:
            raise SparcommError(f"{self} in {words.numel()} words: needs {self.words}")
        split = self.index_words
        if not split:
            index = torch.arange(self.k, device=words.device)
        elif self._is_bitmap:
            index = kernels.bitmap_decode(words[:split], self.k, self.m, flags)
        else:
            index = kernels.elias_fano_decode(words[:split], self.k, self.m, flags)
        return index, self._decode_values(words[split:], dtype, flags, kernels)

    def _decode_values(self, words: Tensor, dtype: torch.dtype, flags: Tensor, kernels: Kernels) -> Tensor:
        if self.values == "int8":
            return kernels.dequantize(*self._int8(words.view(torch.uint8)), dtype, flags)
        return kernels.widen(words.view(WIRE_DTYPES[self.values])[: self.k], dtype)

    def _int8(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """The scales and the codes among the value bytes."""
        scales = wire.scales(self.k)
        return raw[:scales], raw[scales : self._value_bytes].view(torch.int8)
