"""What a transport is: one rank's view of its group, and the traffic it has caused so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from sparcomm.errors import ConfigError

Op = Literal["sum", "max", "band", "bor"]


@dataclass
class Traffic:
    """Counters of one rank, the same on every transport.

    exchange: 1 round, at most 1 message. all_to_all: 1 round, p-1 messages (the own slot is free).
    all_gather: ceil(log2 p) rounds of one message (Bruck). Our all_reduce: their sum. ``native=True``: booked
    by formula, 2(p-1) rounds and messages, 2(p-1)/p of the tensor's bytes.
    """

    rounds: int = 0
    messages: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0

    def book(self, rounds: int, messages: int, sent: int, received: int) -> None:
        """Adds to the counters."""
        self.rounds += rounds
        self.messages += messages
        self.bytes_sent += sent
        self.bytes_received += received


@dataclass(frozen=True)
class Link:
    """A network link: seconds of latency per message and bytes per second. Default: 1 Gbit/s Ethernet.

    Raises ConfigError for a negative latency or a bandwidth that is not positive.
    """

    latency: float = 1e-4
    bandwidth: float = 125e6

    def __post_init__(self) -> None:
        if not self.latency >= 0 or not self.bandwidth > 0:
            raise ConfigError(f"{self}: latency must be at least 0 seconds, bandwidth above 0 bytes per second")


class Transport(Protocol):
    """Moves contiguous tensors of any dtype between the ranks of a group.

    Blocking in program order; on CUDA it only orders the stream. All ranks of the group make the same calls in
    the same order, with sizes that agree; sizes are known to both ends beforehand. Not thread-safe.

    Attributes:
        rank, size: this rank's number in the group, and the number of ranks.
        traffic: what this rank has sent and received so far.
        context: free text put into error messages ("step 12, unit 3"); set by the caller.
        siblings: sizes of all groups of the ``split`` that made this one, by color, the same on all its ranks; {} if
            none did.
        nodes: the ranks of every node, those that share memory; () if the transport does not know.
        subgroups: (color, key, group) of what ``collectives.groups.split_once`` has made of this one, by name; they
            are closed with it.
    """

    rank: int
    size: int
    siblings: Mapping[int, int]
    nodes: Sequence[Sequence[int]]
    subgroups: dict[str, tuple[int, int, Transport]]

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent and received so far."""
        ...

    @property
    def context(self) -> str:
        """Put into error messages."""
        ...

    @context.setter
    def context(self, value: str) -> None: ...

    def exchange(
        self, send: Tensor | None, to: int, recv: Tensor | None, source: int, *, capacity: bool = False
    ) -> None:
        """Sends ``send`` to rank ``to`` while receiving into ``recv`` from ``source``; None = nothing that way.

        With ``capacity=True`` ``recv`` is an upper bound: a shorter message fills its beginning, and the rest is
        left as it was (the bag's header gives the length). Refused on NCCL.
        """
        ...

    def all_to_all(self, out: Tensor, x: Tensor) -> None:
        """Row i of ``x`` (p, ...) goes to rank i; row i of ``out`` (p, ...) comes from rank i."""
        ...

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """Row i of ``out`` (p, *x.shape) becomes rank i's ``x``."""
        ...

    def all_reduce(self, x: Tensor, op: Op = "sum", *, native: bool = False) -> None:
        """Reduces ``x`` over ranks in place, in rank order: the same bits on every rank and backend.

        ``native=True`` (sum and max only) uses the backend's own collective, whose last bit may differ.
        """
        ...

    def split(self, color: int, key: int) -> Transport:
        """A transport over the ranks that gave the same ``color``, ordered by ``key`` (then rank); collective."""
        ...

    def measure(self) -> Link:
        """The slowest rank's link to its neighbour, the same on all ranks; collective, and not booked as traffic."""
        ...

    def close(self) -> None:
        """Frees what this transport owns, ``subgroups`` included. Idempotent, not collective."""
        ...
