"""Bags: a payload behind a 16-byte header that says what it is, whether all was finite, and what it must sum to.

Header, four words: magic u8 | status u8 | unit u16, step u32, payload length in words u32, checksum u32 over
everything else. A status bit is the OR of all its sender had seen when it sealed the bag, so the final all-gather
tells every rank whether any rank saw an inf or NaN, without a round of its own.

A bag's length is known to its receiver beforehand, or bounded, and then read from the header (``variable=True``).

On CPU a damaged bag raises at once. Where the host does not wait for the device, damage becomes a bit that travels in
all later bags and makes every step after it fail (``State.damage``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.errors import ConfigError, DamagedBag
from sparcomm.kernels import Kernels

_STATUS = 0xFF00


def _signed(word: int) -> int:
    """A 32-bit word as int32 holds it."""
    return word - (1 << 32) if word & 0x80000000 else word


def all_finite(x: Tensor) -> Tensor:
    """() bool: no inf or NaN among the elements of ``x``. One pass without temporaries; the host waits for nothing."""
    if not x.numel():
        return torch.ones((), dtype=torch.bool, device=x.device)
    low, high = torch.aminmax(x)  # both are NaN if any element is
    return torch.isfinite(low) & torch.isfinite(high)


class Bags:
    """Seals and opens the bags of one ``reduce``, collecting their status bits in ``flags`` ((1,) uint8)."""

    def __init__(
        self, kernels: Kernels, unit: int, step: int, device: torch.device, damage: Tensor | None = None
    ) -> None:
        self.kernels, self.device = kernels, device
        self.flags = torch.zeros(1, dtype=torch.uint8, device=device) if damage is None else damage.clone()
        self.unit, self.step = unit & 0xFFFF, step & 0xFFFFFFFF
        self._first = _signed(wire.MAGIC | self.unit << 16)

    def empty(self, payload_words: int, rows: int | None = None) -> Tensor:
        """An unsealed bag (words,) int32, or ``rows`` of them (rows, words). Contents undefined."""
        shape = (wire.HEADER_WORDS + payload_words,)
        return torch.empty(shape if rows is None else (rows, *shape), dtype=torch.int32, device=self.device)

    def seal(self, bag: Tensor) -> None:
        """Writes the header of ``bag``, whose payload is in place, with the status seen so far."""
        length = bag.numel() - wire.HEADER_WORDS
        if self.device.type == "cpu":
            header = bag.numpy()
            header[0] = _signed(wire.MAGIC | int(self.flags) << 8 | self.unit << 16)
            header[1], header[2] = _signed(self.step), length
            header[3] = int(self.kernels.checksum(bag))
        else:
            bag[0:1] = (self.flags.to(torch.int32) << 8) | self._first
            bag[1].fill_(_signed(self.step))  # bag[1] = number would be a copy for which the host waits
            bag[2].fill_(length)
            bag[3] = self.kernels.checksum(bag)

    def open(self, bag: Tensor, source: int, *, variable: bool = False) -> Tensor:
        """The payload of a bag from rank ``source``, a view. Takes its status into ``flags``.

        Args:
            variable: the bag fills the beginning of ``bag``, as far as its header says; else all of it.

        Raises:
            DamagedBag: (CPU) header, length or checksum are not those of this unit and step.
            ConfigError: ``variable``, and the host would have to wait for a device to know the length.
        """
        if variable:
            bag = bag[: self.length(bag, source)]
        elif self.device.type != "cpu":
            return self._open_on_device(bag)
        else:
            self._read_header(bag, source, bag.numel() - wire.HEADER_WORDS)
        first, checksum = bag[: wire.HEADER_WORDS : 3].tolist()
        if int(self.kernels.checksum(bag)) != checksum:
            raise self._damaged(source, "fails its checksum")
        if status := first >> 8 & 0xFF:
            self.flags |= status
            self.check(source)
        return bag[wire.HEADER_WORDS :]

    def length(self, bag: Tensor, source: int) -> int:
        """Words, header included, of the bag from rank ``source`` at the beginning of ``bag``.

        Raises:
            DamagedBag: the header is not that of this unit and step, or says more words than there are.
            ConfigError: not on CPU.
        """
        if self.device.type != "cpu":
            raise ConfigError(
                f"a bag of variable length on {self.device}: the host would have to wait for its header, "
                'so that only CPUs take them; use indices="elias-fano"'
            )
        return wire.HEADER_WORDS + self._read_header(bag, source)

    def _read_header(self, bag: Tensor, source: int, expected: int | None = None) -> int:
        """Payload words by the header, which must fit this unit and step, and ``expected`` or else the buffer."""
        room = bag.numel() - wire.HEADER_WORDS
        if room < 0:
            raise self._damaged(source, f"has {bag.numel()} words, less than a header")
        first, step, length = (word & 0xFFFFFFFF for word in bag[:3].tolist())
        fields = (("magic", first & 0xFF, wire.MAGIC), ("unit", first >> 16, self.unit), ("step", step, self.step))
        wrong = [f"{name} {got} instead of {want}" for name, got, want in fields if got != want]
        if expected is not None and length != expected:
            wrong.append(f"length {length} instead of {expected}")
        elif length > room:
            wrong.append(f"length {length} instead of at most {room}")
        if wrong:
            raise self._damaged(source, f"has {', '.join(wrong)}")
        return length

    def _damaged(self, source: int, what: str) -> DamagedBag:
        return DamagedBag(f"step {self.step}, unit {self.unit}: bag from rank {source} {what}")

    def _open_on_device(self, bag: Tensor) -> Tensor:
        length = bag.numel() - wire.HEADER_WORDS
        bad = ((bag[0:1] & ~_STATUS) != self._first) | (bag[1:2] != _signed(self.step)) | (bag[2:3] != length)
        bad |= self.kernels.checksum(bag) != bag[3:4]
        self.flags |= (bag[0:1] >> 8 & 0xFF).to(torch.uint8) | bad.to(torch.uint8) * wire.DAMAGED
        return bag[wire.HEADER_WORDS :]

    def check(self, source: int) -> None:
        """Raises DamagedBag (CPU) if a decoder found what ``source`` sent impossible, or ``source`` says it had."""
        if self.device.type == "cpu" and int(self.flags) & wire.DAMAGED:
            raise DamagedBag(f"step {self.step}, unit {self.unit}: what rank {source} sent does not decode")

    def note_nonfinite(self, x: Tensor) -> None:
        """Sets the non-finite bit if ``x`` holds an inf or NaN."""
        self.flags |= (~all_finite(x)).to(torch.uint8) * wire.NONFINITE

    def ok(self) -> Tensor:
        """() bool: nothing non-finite, nothing damaged in anything seen. After an all-gather the same on all ranks."""
        return self.flags[0] == 0

    def refuse_damage(self) -> None:
        """Raises DamagedBag if damage was ever seen, for hosts about to go on by what came; they wait for the device.

        On CPU it has raised already.
        """
        damage = self.damage()
        if damage is not None and bool(damage):
            raise DamagedBag(f"step {self.step}, unit {self.unit}: a bag, now or in an earlier step, was damaged")

    def damage(self) -> Tensor | None:
        """What ``State.damage`` must be from now on: None on CPU, where damage has raised."""
        return None if self.device.type == "cpu" else self.flags & wire.DAMAGED
