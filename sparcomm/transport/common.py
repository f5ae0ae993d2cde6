"""What every transport shares, so that a backend only moves bytes: checks, booking, Bruck's gather, ordered sums.

A backend subclasses :class:`BaseTransport` and supplies ``_transfer``, ``_all_to_all``, ``_native_all_reduce``,
``_make_split`` and ``_die``. Everything a caller can see (traffic, tags, errors for bad arguments, the order of
additions) is written here once, and is therefore the same on every backend.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sparcomm.clock import Range
from sparcomm.errors import ConfigError, PeerError
from sparcomm.transport.base import Link, Op, Traffic, Transport
from sparcomm.transport.probe import probe
from sparcomm.transport.reduction import check_reducible, reduce_rows

Self = TypeVar("Self", bound="BaseTransport")


class Part(NamedTuple):
    """One tensor of a call, without keeping it alive."""

    label: str
    dtype: torch.dtype
    shape: torch.Size
    peer: int = -1

    def __str__(self) -> str:
        return f"{self.label} {describe(self.dtype, self.shape)}{f' {self.peer}' if self.peer >= 0 else ''}"


class Call(NamedTuple):
    """One rank's current operation, for messages. Ranks agree on a collective when their calls are equal."""

    name: str
    op: str = ""
    parts: tuple[Part, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join([*map(str, self.parts), *([self.op] if self.op else [])])})"


def parts_of(send: Tensor | None, to: int, recv: Tensor | None, source: int) -> tuple[Part, ...]:
    """The parts of an exchange."""
    out = () if send is None else (Part("send to", send.dtype, send.shape, to),)
    return out if recv is None else (*out, Part("recv from", recv.dtype, recv.shape, source))


class Shared:
    """What a transport and its sub-groups have in common: one set of counters, one context, one fate.

    Attributes:
        dead: why this rank can no longer take part; "" = it can.
        aborted: whether peers have been told so.
    """

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.context = ""
        self.dead = ""
        self.aborted = False


class BaseTransport(ABC):
    """A :class:`~sparcomm.transport.base.Transport` over a backend's transfers.

    Sub-groups made by ``split`` share this transport's ``traffic`` and ``context``, so that counts add up. Making
    them is set-up: it is not booked. An exchange with oneself is a local copy: 1 round, 0 messages, 0 bytes.
    Bytes are counted as ``numel * element_size`` of what was passed; with ``capacity=True`` the received bytes are
    those of the bound, because no backend reports the true length.

    Attributes:
        call: the present or last operation.
    """

    def __init__(self, rank: int, size: int, shared: Shared | None = None) -> None:
        self.rank, self.size = rank, size
        self._shared = shared or Shared()
        self._tag = 0  # number of this transport's transfers so far: the same on all ranks at matching calls
        self.call = Call("")
        self.siblings: Mapping[int, int] = {}
        self.nodes: Sequence[Sequence[int]] = ()
        self.subgroups: dict[str, tuple[int, int, Transport]] = {}
        self._closed = False

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent and received so far, in this group and its sub-groups."""
        return self._shared.traffic

    @traffic.setter
    def traffic(self, value: Traffic) -> None:
        self._shared.traffic = value

    @property
    def context(self) -> str:
        """Free text put into error messages; set by the caller."""
        return self._shared.context

    @context.setter
    def context(self, value: str) -> None:
        self._shared.context = value

    # ---- the five verbs ---------------------------------------------------------------------------------------

    def exchange(
        self, send: Tensor | None, to: int, recv: Tensor | None, source: int, *, capacity: bool = False
    ) -> None:
        """See ``Transport.exchange``. ``to`` is ignored without ``send``, ``source`` without ``recv``.

        Raises:
            ConfigError: a peer outside the group, a tensor that is not contiguous, or self on one side only.
            PeerError: the peer failed, or did not answer in time.
        """
        sent, received = nbytes(send), nbytes(recv)
        self._check_exchange(send, to, recv, source)
        self._enter(Call("exchange", "capacity" if capacity else "", parts_of(send, to, recv, source)))
        local = (send is not None and to == self.rank) or (recv is not None and source == self.rank)
        with Range("exchange"):
            self._exchange(send, to, recv, source, capacity)
        if local:
            self.traffic.book(1, 0, 0, 0)
        else:
            self.traffic.book(1, int(send is not None), sent, received)

    def all_to_all(self, out: Tensor, x: Tensor) -> None:
        """See ``Transport.all_to_all``. Raises ConfigError unless shapes are equal (p, ...), PeerError."""
        self._check_pair("all_to_all", out, x, tuple(x.shape))
        if x.dim() == 0 or x.shape[0] != self.size:
            raise ConfigError(f"all_to_all: x has shape {tuple(x.shape)}, must have {self.size} rows, one per rank")
        if overlap(out, x):
            raise ConfigError("all_to_all: out and x overlap in memory, must be separate tensors")
        self._enter(Call("all_to_all", "", (Part("x", x.dtype, x.shape),)))
        with Range("all_to_all"):
            self._route(out, x)
        self._book_route(x)

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """See ``Transport.all_gather``. ``x`` may be ``out[rank]``. Raises ConfigError on shapes, PeerError."""
        self._check_pair("all_gather", out, x, (self.size, *x.shape))
        if overlap(out, x) and out[self.rank].data_ptr() != x.data_ptr():
            raise ConfigError("all_gather: x overlaps out in memory, but is not out[rank]")
        self._enter(Call("all_gather", "", (Part("x", x.dtype, x.shape),)))
        with Range("all_gather"):
            self._gather(out, x)
        self._book_gather(x)

    def all_reduce(self, x: Tensor, op: Op = "sum", *, native: bool = False) -> None:
        """See ``Transport.all_reduce``. float16 and bfloat16 sums are made in float32 and rounded once.

        Raises:
            ConfigError: an unknown op, a dtype the op has no meaning for, ``native`` with band or bor.
            PeerError: a peer failed, or did not answer in time.
        """
        check_reducible(x, op, native)
        self._check_contiguous("all_reduce", x)
        self._enter(Call("all_reduce", f"{op}, native" if native else op, (Part("x", x.dtype, x.shape),)))
        if native:
            with Range("all_reduce"):
                if self.size > 1:
                    self._native_all_reduce(x, op)
            steps, sent = 2 * (self.size - 1), 2 * (self.size - 1) * nbytes(x) // self.size
            self.traffic.book(steps, steps, sent, sent)
        else:
            with Range("all_reduce"):
                self._ordered_all_reduce(x, op)

    def _ordered_all_reduce(self, x: Tensor, op: Op) -> None:
        """all_to_all of p padded chunks, a sum in rank order, all_gather; booked."""
        if self.size == 1:
            self.traffic.book(1, 0, 0, 0)
            return
        flat = x.view(-1)
        chunk = -(-flat.numel() // self.size)
        rows = flat
        if chunk * self.size != flat.numel():
            rows = flat.new_zeros(chunk * self.size)
            rows[: flat.numel()] = flat
        rows = rows.view(self.size, chunk)
        parts = torch.empty_like(rows)
        self._route(parts, rows)
        mine = reduce_rows(parts, op)
        # rows has been sent, so it can take the result: no second buffer, and none at all when p divides n.
        self._gather(rows, mine)
        if rows.data_ptr() != flat.data_ptr():
            flat.copy_(rows.view(-1)[: flat.numel()])
        self._book_route(rows)
        self._book_gather(mine)

    def split(self: Self, color: int, key: int) -> Self:
        """See ``Transport.split``. The sub-group shares ``traffic`` and ``context``; making it is not booked."""
        self._enter(Call("split"))
        pairs = torch.empty((self.size, 2), dtype=torch.int64, device="cpu")
        self._gather_setup(pairs, torch.tensor([color, key], dtype=torch.int64, device="cpu"))
        rows: list[list[int]] = pairs.tolist()
        members = sorted((k, r) for r, (c, k) in enumerate(rows) if c == color)
        made = self._make_split([r for _, r in members], color)
        made.siblings = dict(sorted(Counter(c for c, _ in rows).items()))
        return made

    def measure(self) -> Link:
        """See ``Transport.measure``: exchanges with the next rank, of few bytes and of 1 MiB (probe.py)."""
        self._enter(Call("measure"))
        to, source = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        found = probe(lambda x, y: self._exchange(x, to, y, source, False), self._probe_device())
        every = torch.empty((self.size, 2), dtype=torch.float64, device="cpu")
        self._gather_setup(every, torch.tensor(found, dtype=torch.float64, device="cpu"))
        latency, per_byte = every.amax(dim=0).tolist()
        return Link(latency, 1 / per_byte)

    def _probe_device(self) -> torch.device:
        return torch.device("cpu")  # what this transport can send

    # ---- the end ----------------------------------------------------------------------------------------------

    def abort(self, reason: str = "aborted") -> None:
        """Gives up: peers waiting for this rank fail with PeerError, and so does every later call here.

        Covers the transport this one was split from and all its sub-groups. Idempotent, never raises.
        """
        if not self._shared.aborted:
            self._shared.aborted, self._shared.dead = True, self._shared.dead or reason
            self._die()

    def close(self) -> None:
        """Frees what this transport owns, ``subgroups`` too; later calls raise PeerError. Idempotent, and local."""
        self._closed = True
        for _, _, group in list(self.subgroups.values()):
            group.close()
        self.subgroups.clear()

    # ---- what a backend supplies ------------------------------------------------------------------------------

    @abstractmethod
    def _transfer(
        self, send: Tensor | None, to: int, recv: Tensor | None, source: int, capacity: bool, tag: int
    ) -> None:
        """Moves one message out and one in, with checked arguments and peers other than this rank."""

    @abstractmethod
    def _all_to_all(self, out: Tensor, x: Tensor, tag: int) -> None:
        """``all_to_all`` for p > 1, own row included."""

    @abstractmethod
    def _native_all_reduce(self, x: Tensor, op: Op) -> None:
        """The backend's own all_reduce for p > 1; ``op`` is sum or max."""

    @abstractmethod
    def _make_split(self: Self, members: list[int], color: int) -> Self:
        """The sub-group of the given ranks of this group, in that order; every rank calls it with its own group."""

    @abstractmethod
    def _die(self) -> None:
        """Makes peers' waits on this rank fail; must not raise."""

    def _enter(self, call: Call) -> None:
        """Opens a call; a backend may extend it."""
        if self._shared.dead or self._closed:
            raise PeerError(f"{self.where(call)}: this transport has ended: {self._shared.dead or 'closed'}")
        self.call = call

    def _gather_setup(self, out: Tensor, x: Tensor) -> None:
        """An all_gather of CPU tensors for set-up; backends that cannot take CPU tensors override it."""
        self._gather(out, x)

    # ---- shared parts, not booked -----------------------------------------------------------------------------

    def _exchange(self, send: Tensor | None, to: int, recv: Tensor | None, source: int, capacity: bool) -> None:
        self._tag += 1
        if send is not None and to == self.rank:
            assert recv is not None
            recv.view(-1)[: send.numel()].copy_(send.view(-1))
        elif send is not None or recv is not None:
            self._transfer(send, to, recv, source, capacity, self._tag)

    def _route(self, out: Tensor, x: Tensor) -> None:
        self._tag += 1
        if self.size > 1:
            self._all_to_all(out, x, self._tag)
        else:
            out.copy_(x)

    def _gather(self, out: Tensor, x: Tensor) -> None:
        """Bruck: in the round with gap g this rank passes min(g, p-g) blocks, its own first, to rank-g.

        Blocks lie at their final place from the start. Only a message that wraps round the end of ``out`` is copied.
        Bruck et al., "Efficient algorithms for all-to-all communications in multiport message-passing systems",
        IEEE TPDS 8(11), 1997.
        """
        p, r = self.size, self.rank
        if out[r].data_ptr() != x.data_ptr():
            out[r].copy_(x)
        gap = 1
        while gap < p:
            count = min(gap, p - gap)
            start = (r + gap) % p
            recv, wraps = out[start : start + count], start + count > p
            if wraps:
                recv = out.new_empty((count, *x.shape))
            send = out[r : r + count] if r + count <= p else torch.cat((out[r:], out[: r + count - p]))
            self._exchange(send, (r - gap) % p, recv, start, False)
            if wraps:
                out[start:].copy_(recv[: p - start])
                out[: start + count - p].copy_(recv[p - start :])
            gap *= 2

    def _book_route(self, x: Tensor) -> None:
        others = nbytes(x) // self.size * (self.size - 1)
        self.traffic.book(1, self.size - 1, others, others)

    def _book_gather(self, x: Tensor) -> None:
        rounds, total = (self.size - 1).bit_length(), nbytes(x) * (self.size - 1)
        self.traffic.book(rounds, rounds, total, total)

    # ---- checks -----------------------------------------------------------------------------------------------

    def where(self, call: Call | None = None) -> str:
        """The context and the call, for messages."""
        return f"{self.context or 'sparcomm'}: {call or self.call}"

    def _check_contiguous(self, name: str, *tensors: Tensor) -> None:
        for t in tensors:
            if not t.is_contiguous():
                raise ConfigError(f"{name}: {shape_of(t)} has stride {t.stride()}, must be contiguous")

    def _check_pair(self, name: str, out: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
        self._check_contiguous(name, out, x)
        if out.dtype != x.dtype or tuple(out.shape) != shape:
            raise ConfigError(f"{name}: out is {shape_of(out)}, must be {shape_of(x, shape)} for x {shape_of(x)}")

    def _check_exchange(self, send: Tensor | None, to: int, recv: Tensor | None, source: int) -> None:
        for name, t, peer in (("to", send, to), ("source", recv, source)):
            if t is not None:
                self._check_contiguous("exchange", t)
                if not 0 <= peer < self.size:
                    raise ConfigError(f"exchange: {name}={peer}, must be a rank from 0 to {self.size - 1}")
        mine = (send is not None and to == self.rank, recv is not None and source == self.rank)
        if mine[0] != mine[1]:
            raise ConfigError(f"exchange: rank {self.rank} is its own peer on one side only (to={to}, source={source})")
        if send is None or recv is None:
            return
        if mine[0] and (send.dtype != recv.dtype or send.numel() > recv.numel()):
            raise ConfigError(f"exchange with self: send {shape_of(send)} does not fit recv {shape_of(recv)}")
        if overlap(send, recv):
            raise ConfigError("exchange: send and recv overlap in memory, must be separate tensors")


def nbytes(t: Tensor | None) -> int:
    """Bytes of a tensor's elements; 0 for None."""
    return 0 if t is None else t.numel() * t.element_size()


def shape_of(t: Tensor, shape: tuple[int, ...] | None = None) -> str:
    """Dtype and shape in short, as in ``float32[4, 8]``; another ``shape`` may be given."""
    return describe(t.dtype, t.shape if shape is None else shape)


def describe(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """As in ``float32[4, 8]``."""
    return f"{str(dtype).removeprefix('torch.')}[{', '.join(map(str, shape))}]"


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors share bytes."""
    start, other = a.data_ptr(), b.data_ptr()
    return 0 < start < other + nbytes(b) and 0 < other < start + nbytes(a) and a.device == b.device
