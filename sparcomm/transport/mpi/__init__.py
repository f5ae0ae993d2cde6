"""The transport over MPI, by mpi4py: ``mpirun -n 8 python train.py`` with whatever MPI the cluster has.

Tensors are handed over where they lie: CPU tensors always, CUDA tensors if the library takes their pointers
(``library.cuda_aware``); others go through cached (pinned, if CUDA) host memory. Everything moves as bytes, since MPI
knows neither bfloat16 nor float16; only the native all_reduce has to know dtypes.

Every wait is a loop with a time limit (waiting.py), in which a rank also hears that another has given up (notices.py).
Calls that MPI does not let go of end the job when they take longer (watchdog.py). Exchanging all with all is point to
point: it names the rank that is late.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from torch import Tensor

from sparcomm.errors import PeerError
from sparcomm.transport.base import Op
from sparcomm.transport.common import BaseTransport, nbytes
from sparcomm.transport.limits import as_timedelta
from sparcomm.transport.mpi.library import MPI, cuda_aware
from sparcomm.transport.mpi.notices import RollCall
from sparcomm.transport.mpi.seats import Seat, take, take_some
from sparcomm.transport.mpi.types import LONGEST, TYPES, view
from sparcomm.transport.mpi.waiting import Interrupted, pending, strand, wait
from sparcomm.transport.mpi.watchdog import Guard
from sparcomm.transport.mpi.world import local, node_of, nodes, notices, world
from sparcomm.transport.staging import Staging, as_bytes

__all__ = ["MpiTransport"]

TIMEOUT = timedelta(minutes=5)
_LOCAL_SIZE = "LOCAL_WORLD_SIZE"

# float16 and bfloat16, which MPI does not know, are added in float32 and rounded once; bool is a byte.
_VIA = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.bool: torch.uint8}


class MpiTransport(BaseTransport):
    """A transport over an MPI communicator. Blocks the host.

    Args:
        comm: whose ranks to take; a duplicate is used, and the making of it is collective. None = all ranks.
        device: where tensors usually live, for ``measure``.
        timeout: how long any wait may take, timedelta or seconds.
        seat: a place in a group that is made already, instead of ``comm``: for ``split``.

    Raises:
        ConfigError: MPI allows no threads or has ended; ``timeout`` is no time; ``comm`` has ranks that mpirun did not
            start.
        PeerError: a rank did not come in time.
    """

    def __init__(
        self,
        comm: MPI.Intracomm | None = None,
        *,
        device: torch.device | str | None = None,
        timeout: timedelta | float = TIMEOUT,
        seat: Seat | None = None,
    ) -> None:
        self._timeout = as_timedelta(timeout)
        if seat is None:
            seat = take(world() if comm is None else comm, self._timeout.total_seconds())
        super().__init__(seat.comm.Get_rank(), seat.comm.Get_size(), seat.family)
        self.comm, self._family, self._ranks = seat.comm, seat.family, seat.ranks
        self._members = zlib.crc32(repr(seat.ranks).encode())  # tells this group from others of the family
        self.nodes: Sequence[Sequence[int]] = nodes([node_of()[rank] for rank in seat.ranks])
        self._device = torch.device(device) if device is not None else None
        self._process, self._staging = os.getpid(), Staging()
        self._tags = int(self.comm.Get_attr(MPI.TAG_UB) or 32767)

    @classmethod
    def world(cls, *, device: torch.device | str | None = None, timeout: timedelta | float = TIMEOUT) -> MpiTransport:
        """Over all ranks that mpirun has started. Collective.

        Sets LOCAL_WORLD_SIZE, unless it is set, to the number of ranks that share this one's memory.
        """
        os.environ.setdefault(_LOCAL_SIZE, str(local()[1]))
        return cls(device=device, timeout=timeout)

    @classmethod
    def over(
        cls, ranks: Sequence[int], *, device: torch.device | str | None = None, timeout: timedelta | float = TIMEOUT
    ) -> MpiTransport:
        """Over some ranks of the job, in that order. Collective over these; none of them may be missing.

        Raises:
            ConfigError: they are no ranks of the job or this one is not among them; not all ranks, and the job's
                others have not called ``world()``.
            PeerError: a rank did not come in time.
        """
        seat = take_some(ranks, as_timedelta(timeout).total_seconds())
        return cls(device=device, timeout=timeout, seat=seat)

    # ---- moving bytes -----------------------------------------------------------------------------------------

    def _transfer(
        self, send: Tensor | None, to: int, recv: Tensor | None, source: int, capacity: bool, tag: int
    ) -> None:
        """Posts the receive first, so that a message in flight finds its place."""
        out = None if send is None else self._outgoing("send", send)
        into = None if recv is None else self._incoming(recv, keep=capacity)
        self._move([] if out is None else [(out, to)], [] if into is None else [(into, source)], tag)
        if recv is not None and into is not None:
            self._arrived("recv", recv, into)

    def _all_to_all(self, out: Tensor, x: Tensor, tag: int) -> None:
        sent, got = self._outgoing("send", x).view(self.size, -1), self._incoming(out).view(self.size, -1)
        r, p = self.rank, self.size
        sends = [(sent[(r + shift) % p], (r + shift) % p) for shift in range(1, p)]
        self._move(sends, [(got[(r - shift) % p], (r - shift) % p) for shift in range(1, p)], tag)
        got[r].copy_(sent[r])
        self._arrived("recv", out, got.view(-1))

    def _move(self, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]], tag: int) -> None:
        """Sends and receives bytes that lie where MPI can reach them."""
        slot, requests, types = tag % self._tags, list[MPI.Request](), list[MPI.Datatype]()
        try:
            for message, peer in receives:
                requests.append(self.comm.Irecv(_block(message, types), peer, slot))
            for message, peer in sends:
                requests.append(self.comm.Isend(_block(message, types), peer, slot))
            self._wait(requests, [peer for _, peer in (*receives, *sends)], tag, sends, receives)
        except MPI.Exception as error:
            strand(requests, sends, receives)
            raise self._failure(sorted({peer for _, peer in (*receives, *sends)}), tag, str(error)) from error
        finally:
            for made in types:
                made.Free()

    def _native_all_reduce(self, x: Tensor, op: Op) -> None:
        """MPI's blocking Allreduce: Open MPI's Iallreduce takes 3 times as long for long tensors.

        It comes behind a barrier that can be left, so that only a rank that stops within it needs the watchdog.
        """
        self._tag += 1
        flat = x.detach().view(-1)
        known = flat.to(_VIA.get(x.dtype, x.dtype))
        host = self._outgoing("send", known).view(known.dtype)
        peers = [i for i in range(self.size) if i != self.rank]
        try:
            self._all_here(peers)
            with Guard(self._timeout.total_seconds(), lambda: self._waiting(peers, self._tag, "in MPI_Allreduce")):
                for part in host.split(LONGEST // known.element_size()) if host.numel() else ():
                    place = [view(part), part.numel(), TYPES[part.dtype]]
                    self.comm.Allreduce(MPI.IN_PLACE, place, MPI.SUM if op == "sum" else MPI.MAX)
        except MPI.Exception as error:
            raise self._failure(peers, self._tag, str(error)) from error
        self._arrived("send", known, host.view(torch.uint8))
        if known.data_ptr() != flat.data_ptr():
            flat.copy_(known)

    def _all_here(self, peers: list[int]) -> None:
        """A barrier with a time limit."""
        board, limit = notices(), self._timeout.total_seconds()
        roll = RollCall(board, (self._family.number, self._members, self._tag), self._ranks, limit)
        request = self.comm.Ibarrier()

        def listen() -> str:
            roll.look()
            return board.look(self._family.number, lambda: self._ranks)

        self._until(request.Test, listen, [request], lambda: roll.late() or peers, self._tag)

    def _wait(self, requests: list[MPI.Request], peers: list[int], tag: int, *buffers: object) -> None:
        """Waits for all messages, each from or to the peer of the same number."""
        statuses = list[MPI.Status]()
        try:
            if MPI.Request.Testall(requests, statuses):
                return

            def late() -> list[int]:
                return sorted({peers[i] for i in pending(requests)})

            def listen() -> str:
                return notices().look(self._family.number, lambda: [self._ranks[peer] for peer in late()])

            self._until(lambda: MPI.Request.Testall(requests, statuses), listen, requests, late, tag, *buffers)
        except MPI.Exception as error:
            codes = [(peer, status.Get_error()) for peer, status in zip(peers, statuses, strict=False)]
            wrong = [(peer, code) for peer, code in codes if code not in (MPI.SUCCESS, MPI.ERR_PENDING)]
            why = "; ".join(sorted({MPI.Get_error_string(code) for _, code in wrong})) or str(error)
            strand(requests, *buffers)
            raise self._failure(sorted({peer for peer, _ in wrong} or set(peers)), tag, why) from None

    def _until(
        self, done: Callable[[], bool], listen: Callable[[], str], requests: list[MPI.Request],
        late: Callable[[], list[int]], tag: int, *buffers: object,
    ) -> None:  # fmt: skip
        """Waits; what is given up keeps its memory, since MPI may write to it later."""
        try:
            wait(done, self._timeout.total_seconds(), listen)
        except Interrupted as error:
            missing = late()
            strand(requests, *buffers)
            raise self._failure(missing, tag, str(error)) from None
        except KeyboardInterrupt:
            strand(requests, *buffers)
            self._shared.dead = self._shared.dead or f"{self._waiting(late(), tag, 'interrupted')}"
            raise

    def _waiting(self, peers: list[int], tag: int, why: str) -> str:
        who = f"rank {peers[0]}" if len(peers) == 1 else f"ranks {peers}"
        return f"{self.where()}: waiting for {who} of {self.size} (tag {tag}): {why}"

    def _failure(self, peers: list[int], tag: int, why: str) -> PeerError:
        """The error of a wait on those peers, after which this transport is of no use."""
        text = self._waiting(peers, tag, why)
        self._shared.dead = self._shared.dead or text
        return PeerError(text)

    # ---- which way a tensor goes ------------------------------------------------------------------------------

    def _direct(self, t: Tensor) -> bool:
        """Whether MPI can reach the tensor where it lies; the host then waits until its device has written it."""
        if t.device.type == "cpu":
            return True
        if t.device.type == "cuda" and cuda_aware():
            torch.cuda.current_stream(t.device).synchronize()
            return True
        return False

    def _outgoing(self, slot: str, t: Tensor) -> Tensor:
        """The bytes of ``t`` where MPI can read them."""
        return as_bytes(t) if self._direct(t) else self._staging.out(slot, t)

    def _incoming(self, t: Tensor, *, keep: bool = False) -> Tensor:
        """Bytes that MPI can write for ``t``; with ``keep`` they start as its present ones."""
        if self._direct(t):
            return as_bytes(t)
        return self._staging.out("recv", t) if keep else self._staging.room("recv", t)

    def _arrived(self, slot: str, t: Tensor, host: Tensor) -> None:
        """Writes to ``t`` what has come elsewhere."""
        if host.data_ptr() != t.data_ptr():
            self._staging.back(slot, t, host)

    # ---- groups -----------------------------------------------------------------------------------------------

    def _probe_device(self) -> torch.device:
        return self._device or torch.device("cpu")

    def _make_split(self, members: list[int], color: int) -> MpiTransport:
        # Colors and keys may be any integers, MPI's must fit an int: the first member names the group.
        peers = [i for i in range(self.size) if i != self.rank]
        with Guard(self._timeout.total_seconds(), lambda: self._waiting(peers, self._tag, "in MPI_Comm_split")):
            comm = MPI.Intracomm(self.comm.Split(members[0], members.index(self.rank)))
        seat = Seat(comm, self._family, [self._ranks[member] for member in members])
        return MpiTransport(device=self._device, timeout=self._timeout, seat=seat)

    def _die(self) -> None:
        try:
            notices().post(self._family.number, self._family.ranks, self._shared.dead)
        except MPI.Exception:
            return  # MPI itself is broken: peers find out by the time limit

    def close(self) -> None:
        """Ends this transport's communicator. Idempotent; MPI expects it of all ranks, but waits for none."""
        if os.getpid() != self._process or self._closed:
            return
        super().close()
        self._staging.clear()
        if not self._shared.dead and not MPI.Is_finalized():  # a dead one may have messages under way
            self.comm.Free()


def _block(message: Tensor, types: list[MPI.Datatype]) -> tuple[MPI.buffer, int, MPI.Datatype]:
    """Where and how long a message is. Long ones are counted in blocks, by a datatype that is added to ``types``."""
    memory, size = view(message), nbytes(message)
    if size <= LONGEST:
        return memory, size, MPI.BYTE
    block = MPI.BYTE.Create_contiguous(LONGEST)
    whole, rest = divmod(size, LONGEST)
    made = MPI.Datatype.Create_struct([whole, rest], [0, whole * LONGEST], [block, MPI.BYTE]).Commit()
    block.Free()
    types.append(made)
    return memory, 1, made
