"""One ``reduce`` of SparDL under way: Spar-Reduce-Scatter, the teams' meeting, the all-gather, the residuals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sparcomm import wire
from sparcomm.algorithms.base import Part, sent_at
from sparcomm.algorithms.spardl.schedule import Scheme, log_schedule
from sparcomm.algorithms.spardl.width import SparDLState
from sparcomm.clock import Range
from sparcomm.codecs.packet import Packet
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.groups import split_once
from sparcomm.collectives.variable import gather_bags, route_bags
from sparcomm.dtypes import working_dtype
from sparcomm.layout import Layout
from sparcomm.seeds import mixed
from sparcomm.selectors import Choice, Memo
from sparcomm.sparse import Sparse
from sparcomm.transport.base import Transport

if TYPE_CHECKING:
    from sparcomm.algorithms.spardl import SparDL

Rows = Tensor | Sequence[Tensor | None]  # one bag a rank: (p, words), or of lengths of their own


class Cut(NamedTuple):
    """A list that was cut to what a bag holds: positions and decoded values sent, and the bag."""

    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    value: Tensor
    bag: Tensor


class Run:
    """The sums, what was chosen of each block, and the next residual, ``out``.

    Attributes:
        team: this rank's team; its rank there is its position, and the block that it owns.
        peers: the ranks at the same position of all teams, or None if there is one team.
        dropped: of the own block, what this rank keeps of values that were not its own to send: see ``keep``.
    """

    def __init__(
        self, algorithm: SparDL, scheme: Scheme, grad: Tensor, residual: Tensor | None, state: SparDLState, memo: Memo,
        cut: Layout, bags: Bags, transport: Transport,
    ) -> None:  # fmt: skip
        self.algorithm, self.scheme, self.cut, self.whole = algorithm, scheme, cut, transport
        self.bags, self.clock, self.kernels = bags, state.clock, bags.kernels
        self.team, self.peers = _groups(transport, scheme.teams)
        self.chosen: list[Tensor | None] = [None] * cut.blocks
        self.values: list[Tensor | None] = [None] * cut.blocks  # decoded, of what was chosen
        self.dropped: list[Tensor] = []
        self.wants_sent = state.wants_sent
        self.dtype = working_dtype(grad.dtype)
        self.out = state.workspace.take(grad.numel(), self.dtype, grad.device)
        self.stages = 0
        with self.clock.span("select"):
            self.choice: Choice = algorithm.chooser.taking().start(
                self.kernels, grad, residual, self.out, cut, self.packet().k, bags.flags, memo
            )
        self.work = self.choice.work

    def packet(self, blocks: int = 1, quota: int | None = None) -> Packet:
        """How a bag of ``blocks`` blocks is coded, with ``quota`` entries a block instead of k_b."""
        return self.algorithm.packet(self.cut.numel, self.cut.blocks, blocks, quota)

    def seed(self, *place: int) -> int:
        """Of this stage's stochastic rounding. Ranks that round copies of one list must give the same ``place``."""
        self.stages += 1
        return mixed(self.bags.step, self.bags.unit, self.stages, *place)

    # ---- bags ----------------------------------------------------------------------------------------------------

    def pack(self, blocks: list[int], quota: int | None = None, room: Tensor | None = None) -> Cut:
        """Cuts each of ``blocks`` to its quota, and moves what was chosen into a sealed bag, ``room`` if given."""
        packet = self.packet(len(blocks), quota)
        share = packet.k // len(blocks)
        with self.clock.span("select"):
            selected = [self.choice.take(b, share) for b in blocks]
            index, value = [i for i, _ in selected], [v for _, v in selected]
        with self.clock.span("code"):
            joined = torch.cat([i + at * self.cut.length for at, i in enumerate(index)]) if len(index) > 1 else index[0]
            values = torch.cat(value) if len(value) > 1 else value[0]
            sent = self.encode(packet, joined, values, self.seed(self.whole.rank), room=room)
            for at, (i, b) in enumerate(zip(index, blocks, strict=True)):
                self.chosen[b], decoded = i, sent.value[at * share : (at + 1) * share]
                self.kernels.deduct(self.work, b, decoded)
                self.values[b] = decoded
        return sent

    def encode(
        self, packet: Packet, index: Tensor, value: Tensor, seed: int, *, ahead: int = 0, room: Tensor | None = None
    ) -> Cut:
        """Codes entries into a bag; sealed, unless there are words ``ahead`` that the caller has still to fill."""
        bag = self.bags.empty(ahead + packet.words) if room is None else room
        start = wire.HEADER_WORDS + ahead
        coded = packet.encode(index, value, bag[start:], self.kernels, seed)
        bag = bag[: start + coded.words]
        if not ahead:
            self.bags.seal(bag)
        return Cut(index, coded.value, bag)

    def decode(self, packet: Packet, bag: Tensor | None, source: int, ahead: int = 0) -> tuple[Tensor, Tensor]:
        """Positions and values in a bag from rank ``source`` of the group that sent it."""
        assert bag is not None  # only a rank's own place is empty
        payload = self.bags.open(bag, source, variable=not packet.static)
        found = packet.decode(payload[ahead:], self.dtype, self.bags.flags, self.kernels)
        self.bags.check(source)
        return found

    def swap(self, group: Transport, bag: Tensor, to: int, source: int, packet: Packet) -> Tensor:
        """Sends a bag and receives one of the same packet."""
        recv = self.bags.empty(packet.words)
        with self.clock.span("wire"):
            group.exchange(bag, to, recv, source, capacity=not packet.static)
        return recv

    def gather_rows(self, group: Transport, bag: Tensor, packet: Packet, ahead: int = 0) -> Rows:
        """All ranks' bags."""
        with self.clock.span("wire"):
            if not packet.static:
                return gather_bags(self.bags, group, bag, ahead + packet.words)
            rows = self.bags.empty(ahead + packet.words, rows=group.size)
            group.all_gather(rows, bag)
        return rows

    # ---- Spar-Reduce-Scatter ---------------------------------------------------------------------------------------

    def merge(self, blocks: list[int], bag: Tensor | None, source: int) -> None:
        """Adds the content of a bag from rank ``source`` of the team to ``blocks``."""
        with self.clock.span("code"):
            packet = self.packet(len(blocks))
            share = packet.k // len(blocks)
            index, value = self.decode(packet, bag, source)
            with Range("merge"):
                for at, b in enumerate(blocks):
                    part, start = slice(at * share, (at + 1) * share), at * self.cut.length
                    self.kernels.merge(self.work, b, index[part] - start if at else index[part], value[part])

    def scatter_log(self) -> None:
        """Spar-Reduce-Scatter in ceil(log2 N) rounds of one bag each way."""
        rank, size = self.team.rank, self.team.size
        for gap, count in log_schedule(size):
            away = [(rank + gap + c) % size for c in range(count)]
            mine = [(rank + c) % size for c in range(count)]
            to, source = (rank + gap) % size, (rank - gap) % size
            recv = self.swap(self.team, self.pack(away).bag, to, source, self.packet(count))
            self.merge(mine, recv, source)

    def scatter_direct(self) -> None:
        """Every block straight to its owner, in one all_to_all."""
        rank, size, packet = self.team.rank, self.team.size, self.packet()
        if packet.static:
            send = self.bags.empty(packet.words, rows=size)
            recv: Rows = torch.empty_like(send)
            send[rank].zero_()  # the own slot never leaves, but its bytes are copied
            for b in range(size):
                if b != rank:
                    self.pack([b], room=send[b])
            with self.clock.span("wire"):
                self.team.all_to_all(recv, send)
        else:
            out = [None if b == rank else self.pack([b]).bag for b in range(size)]
            with self.clock.span("wire"):
                recv = route_bags(self.team, out, packet.words)
        for source in range(size):
            if source != rank:
                self.merge([rank], recv[source], source)

    # ---- all-gather --------------------------------------------------------------------------------------------------

    def gather(self, mine: Tensor, ahead: int = 0) -> tuple[list[Part], Tensor | None]:
        """All-gathers the blocks' sums in the team: the final entries by block; and the sum of the words ahead."""
        packet = self.packet()
        rows = self.gather_rows(self.team, mine, packet, ahead)
        with self.clock.span("code"):
            parts = [Part(*self.decode(packet, rows[b], b, ahead), self.cut, b) for b in range(self.team.size)]
            if not ahead:
                return parts, None
            words = [row[wire.HEADER_WORDS] for row in rows if row is not None]
            return parts, torch.stack(words).sum().to(torch.int64)

    # ---- residuals ---------------------------------------------------------------------------------------------------

    def keep(self, whole: Sparse, sent: Cut, place: Tensor, keeper: bool) -> None:
        """Adds to the own block what was cut from a list that several ranks hold copies of: at one of them, ``keeper``.

        Args:
            whole: the list. sent: what went on of it. place: (k,) where in ``whole`` that was.
        """
        if not keeper or self.algorithm.residuals != "global":
            return
        rest = whole.value.clone()
        rest[place] -= sent.value
        self.kernels.merge(self.work, self.team.rank, whole.index, rest)
        if not self.wants_sent:
            return
        gone = torch.ones_like(whole.index, dtype=torch.bool).index_fill_(0, place, False)
        self.dropped.append(whole.index[gone])

    def collect_residuals(self, final: list[Tensor]) -> None:
        """Turns ``out`` into the next residual (paper: global residual collection).

        A position outside the final set reached nobody: every rank keeps its own share, as ``out`` has it, which also
        covers what intermediate ranks had merged there. Inside it, a rank keeps what it did not pass on.
        """
        rule = self.algorithm.residuals
        with Range("settle"):
            for b, keep in enumerate(final):
                chosen = self.chosen[b]
                assert chosen is not None  # every block is sent once, or owned
                if rule != "global":  # nobody keeps what others had sent and was dropped on the way
                    keep = chosen if rule == "local" else chosen[torch.isin(chosen, keep, assume_unique=True)]
                self.kernels.settle(self.work, b, keep)

    def sent(self, final: list[Tensor]) -> Tensor:
        """``Reduced.sent``: the global positions whose own mass left this rank for good."""
        index, where = list[Tensor](), list[Tensor]()
        for b, keep in enumerate(final):
            chosen, value = self.chosen[b], self.values[b]
            assert chosen is not None
            assert value is not None
            left = value != 0  # a zero takes nothing away, be it rounded or a selector's filler
            if self.algorithm.residuals != "local":
                left &= torch.isin(chosen, keep, assume_unique=True)
            if b == self.team.rank:
                for back in self.dropped:
                    left &= torch.isin(chosen, back, assume_unique=True, invert=True)
            index.append(self.cut.to_global(chosen, b))
            where.append(left)
        return sent_at(torch.cat(index), torch.cat(where), self.cut.numel)


def _groups(transport: Transport, teams: int) -> tuple[Transport, Transport | None]:
    """(this rank's team, the ranks at its position of all teams). Made once a transport; then collective."""
    if teams == 1:
        return transport, None
    team, position = divmod(transport.rank, transport.size // teams)
    return (
        split_once(transport, f"spardl {teams} teams", team, position),
        split_once(transport, f"spardl across {teams} teams", position, team),
    )
