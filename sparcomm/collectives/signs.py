"""Sums of which one bit an element travels, in two phases: packed signs to their owners, and the owners' verdicts back.

A vector is cut into one chunk for each rank, the chunk's owner, in whole words of 32 signs. all_to_all of one bag a
chunk, the owner decides, all_gather of the verdicts. A bag's payload is one word of scale (float32) where there are
scales, the words of signs (1 = negative), and as many of presence where zeros are told apart. So every rank sends
2(p-1) bags of n/p bits, whatever p is: one bit for an element and phase. Every rank, owners included, reads the
verdicts from the bytes that were gathered.

Scales have 8 significant bits (bfloat16's), so that a value minus a scale, and sums of a few of those, need no more
bits than float32 has: what error feedback keeps is then the exact difference. Each chunk has a scale of its own: its
owner knows the whole chunk and nothing of the others, and layers that differ in magnitude share a scale less often.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.clock import Clock, Range
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.dense import log2_ceil
from sparcomm.errors import ConfigError
from sparcomm.kernels.interface_bits import RULES, Rule
from sparcomm.seeds import mixed
from sparcomm.transport.base import Transport
from sparcomm.workspace import Workspace

LARGEST = torch.finfo(torch.bfloat16).max

# (mean of |V| of a chunk of which the owner has V in sum, sum of the other ranks' scales of it) -> the verdict's scale.
Weigh = Callable[[Tensor, Tensor], Tensor]


def check_rule(name: str, rule: Any) -> None:
    """Raises ConfigError unless ``rule`` is one of RULES."""
    if rule not in RULES:
        raise ConfigError(f"{name}={rule!r}: must be one of {', '.join(map(repr, RULES))}")


def check_flag(name: str, flag: Any) -> None:
    """Raises ConfigError unless ``flag`` is a bool."""
    if not isinstance(flag, bool):
        raise ConfigError(f"{name}={flag!r}: must be True or False")


def scale_of(mean: Tensor) -> Tensor:
    """() float32 of 8 significant bits: ``mean`` (()), rounded; at most bfloat16's largest value; NaN stays."""
    return mean.to(torch.float32).clamp(max=LARGEST).to(torch.bfloat16).to(torch.float32)


class Ballot(NamedTuple):
    """What a payload says of one chunk, as views of it.

    Attributes:
        scale: () float32, or None where there are no scales.
        signs: (words,) int32, bit 1 = negative.
        present: (words,) int32, bit 1 = not zero; None where zeros are not told apart.
    """

    scale: Tensor | None
    signs: Tensor
    present: Tensor | None

    @property
    def worth(self) -> Tensor:
        """The scale, of a ballot that has one."""
        assert self.scale is not None
        return self.scale


@dataclass(frozen=True)
class Cut:
    """How n >= 1 elements are cut into a chunk for each of ``size`` ranks, and what is sent of one."""

    n: int
    size: int
    scaled: bool
    masked: bool

    @property
    def words(self) -> int:
        """Words of signs of a chunk; the last ones may be filled in part or not at all."""
        return -(-wire.bitmap_words(self.n) // self.size)

    @property
    def payload(self) -> int:
        """Words of a payload."""
        return self.scaled + self.words * (1 + self.masked)

    @property
    def traffic(self) -> tuple[int, int, int]:
        """(rounds, messages, bytes sent per rank) of one sum."""
        if self.size == 1:
            return 0, 0, 0
        bag = wire.WORD * (wire.HEADER_WORDS + self.payload)
        return 1 + log2_ceil(self.size), self.size - 1 + log2_ceil(self.size), 2 * (self.size - 1) * bag

    def first(self, rank: int) -> int:
        """Number, in the whole vector, of the first word of a rank's chunk."""
        return rank * self.words

    def elements(self, rank: int) -> slice:
        """Where a rank's chunk lies."""
        return slice(*(min(self.n, 32 * self.first(r)) for r in (rank, rank + 1)))

    def used(self, rank: int) -> int:
        """Words that a rank's chunk fills, at least in part."""
        span = self.elements(rank)
        return wire.bitmap_words(span.stop - span.start)

    def ballot(self, payload: Tensor, rank: int) -> Ballot:
        """The parts of a payload about ``rank``'s chunk, or of many payloads: (..., words)."""
        start, used = int(self.scaled), self.used(rank)
        scale = payload[..., 0].view(torch.float32) if self.scaled else None
        second = start + self.words
        present = payload[..., second : second + used] if self.masked else None
        return Ballot(scale, payload[..., start : start + used], present)


class Signs:
    """One sum by signs over the ranks of a transport.

    Args:
        zero: the sign of zeros where they are not told apart, one of RULES; "alternate" is a hash of place and step.
    """

    def __init__(
        self, cut: Cut, zero: str, bags: Bags, transport: Transport, clock: Clock, workspace: Workspace
    ) -> None:
        self._cut, self._bags, self._transport = cut, bags, transport
        self._zero: Rule = cast(Rule, zero)
        self._clock, self._space, self._kernels = clock, workspace, bags.kernels
        # Ties have a seed of their own: a tie between a zero's sign and a vote must not always go to the former.
        self._zeros, self._ties = mixed(bags.step, bags.unit, 0), mixed(bags.step, bags.unit, 1)
        words = wire.HEADER_WORDS + cut.payload
        self._buffers = [workspace.take(cut.size * words, torch.int32, bags.device) for _ in range(2)]
        self._rows, self._arrived = (b.view(cut.size, words) for b in self._buffers)

    def vote(self, x: Tensor, tie: str, out: Tensor) -> None:
        """Writes the majority's sign times p, or times the sum of all scales, to ``out``. Collective.

        Sets bags' non-finite bit if anything in ``x``, or the sum of scales, is not finite.

        Args:
            x: (n,) any gradient dtype, only read.
            tie: the sign where as many voted for one as for the other, one of RULES. Where zeros are told apart and
                nobody voted the sum is 0.
            out: (n,) working dtype, overwritten.
        """
        cut, rank = self._cut, self._transport.rank
        with self._clock.span("code"):
            for chunk in range(cut.size):
                mine = self._pack(x[cut.elements(chunk)], chunk, self._rows[chunk])
                if cut.scaled:
                    mine.worth.copy_(scale_of(self._mean(x[cut.elements(chunk)], mine.present)))
        self._swap()
        with self._clock.span("code"):
            votes = cut.ballot(self._arrived[:, wire.HEADER_WORDS :], rank)
            verdict = self._blank(self._rows[0], rank)
            args = (cast(Rule, tie), self._ties, cut.first(rank), verdict.signs, verdict.present)
            with Range("vote"):
                if verdict.signs.numel():
                    self._kernels.vote(votes.signs, votes.present, *args)
            if cut.scaled:
                total = torch.zeros((), dtype=torch.float64, device=x.device)
                for scale in votes.worth:  # in rank order
                    total = total + scale
                verdict.worth.copy_(total)
                self._bags.note_nonfinite(verdict.worth.view(1))
        self._spread(out)

    def compensate(self, x: Tensor, weigh: Weigh, out: Tensor) -> None:
        """Writes a sum to ``out`` and leaves in ``x`` what this rank still owes, to the last bit. Collective.

        What a rank sends of another's chunk is the mean of |x| with x's signs. The owner adds what comes to its own
        ``x``, which goes nowhere and so is not rounded to a sign twice: V. The verdict is V's signs times the scale
        that ``weigh`` gives, and what V differs from it stays with the owner.

        Sets bags' non-finite bit if anything in ``x`` or V is not finite.

        Args:
            x: (n,) working dtype, gradient + residual; overwritten.
            out: (n,) working dtype, overwritten.
        """
        cut, rank, others = self._cut, self._transport.rank, torch.zeros((), dtype=torch.float64, device=x.device)
        own = x[cut.elements(rank)]
        with self._clock.span("code"):
            for chunk in range(cut.size):
                if chunk != rank:
                    part = x[cut.elements(chunk)]
                    mine = self._pack(part, chunk, self._rows[chunk])
                    self._settle(part, mine, scale_of(self._mean(part, mine.present)))
        self._swap()
        with self._clock.span("code"):
            for source in range(cut.size):
                if source != rank:
                    came = cut.ballot(self._arrived[source, wire.HEADER_WORDS :], rank)
                    self._add(own, came, came.worth)
                    others = others + came.worth
            verdict = self._pack(own, rank, self._rows[0])
            self._settle(own, verdict, scale_of(weigh(self._mean(own, verdict.present), others)))
        self._spread(out)

    # ---- a chunk -----------------------------------------------------------------------------------------------------

    def _blank(self, bag: Tensor, chunk: int) -> Ballot:
        """The ballot of ``chunk`` in a bag, whose payload is zeros as far as the ballot does not cover it."""
        payload = bag[wire.HEADER_WORDS :]
        if self._cut.used(chunk) < self._cut.words:
            payload.zero_()
        return self._cut.ballot(payload, chunk)

    def _pack(self, x: Tensor, chunk: int, bag: Tensor) -> Ballot:
        """Writes the signs of ``x``, a chunk, into a bag. Its scale is yet to be written."""
        ballot = self._blank(bag, chunk)
        where = (self._zeros, self._cut.first(chunk))
        with Range("encode"):
            if x.numel():
                self._kernels.pack_signs(x, self._zero, *where, ballot.signs, ballot.present, self._bags.flags)
        return ballot

    def _mean(self, x: Tensor, present: Tensor | None) -> Tensor:
        """() float64: the mean of |x|; of those present only, since the others are sent as zeros; 0 of none."""
        if not x.numel():
            return torch.zeros((), dtype=torch.float64, device=x.device)
        total = self._kernels.absolute_sum(x)
        # As a tensor: by a plain number GPUs divide with an error in the last bit.
        whole = torch.full_like(total, x.numel()) if present is None else self._kernels.popcount(present).clamp(min=1)
        return total / whole

    def _settle(self, x: Tensor, ballot: Ballot, scale: Tensor) -> None:
        """Writes the scale of what is sent of ``x``, and takes from ``x`` what that says."""
        ballot.worth.copy_(scale)
        self._add(x, ballot, -scale)

    def _add(self, x: Tensor, ballot: Ballot, scale: Tensor) -> None:
        if x.numel():
            self._kernels.add_signs(ballot.signs, ballot.present, scale.to(x.dtype), x)

    # ---- the two phases ----------------------------------------------------------------------------------------------

    def _swap(self) -> None:
        """Sends every chunk to its owner; the own one, neither sealed nor opened, stays."""
        rank, size = self._transport.rank, self._cut.size
        if size == 1:
            self._arrived = self._rows
            return
        with self._clock.span("code"):
            for chunk in range(size):
                if chunk != rank:
                    self._bags.seal(self._rows[chunk])
        with self._clock.span("wire"):
            self._transport.all_to_all(self._arrived, self._rows)
        with self._clock.span("code"):
            for source in range(size):
                if source != rank:
                    self._bags.open(self._arrived[source], source)

    def _spread(self, out: Tensor) -> None:
        """Gathers the verdicts, which are in the first row, and writes them out."""
        cut, one = self._cut, torch.full((), float(self._cut.size), dtype=out.dtype, device=out.device)
        if cut.size > 1:
            with self._clock.span("code"):
                self._bags.seal(self._rows[0])
            with self._clock.span("wire"):
                self._transport.all_gather(self._arrived, self._rows[0])
        with self._clock.span("code"):
            for rank, bag in enumerate(self._arrived):
                payload = bag[wire.HEADER_WORDS :] if cut.size == 1 else self._bags.open(bag, rank)
                part, verdict = out[cut.elements(rank)], cut.ballot(payload, rank)
                with Range("decode"):
                    if part.numel():
                        scale = one if verdict.scale is None else verdict.scale.to(out.dtype)
                        self._kernels.spread_signs(verdict.signs, verdict.present, scale, part)
        self._space.give(*self._buffers)
