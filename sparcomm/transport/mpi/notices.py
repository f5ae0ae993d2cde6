"""What ranks tell each other outside of their calls: a few bytes on a communicator of their own.

MPI has no way to make another rank's wait fail, and without ULFM none to go on after a death. So every wait of ours is
a loop that also looks here. A notice says that a rank has given up a group (a family: a transport and all its
sub-groups) or altogether, that its program is over, or that it has been waiting for long at some place.
"""

from __future__ import annotations

import math
import struct
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from sparcomm.transport.mpi.library import MPI

EVERY = 0  # the family of all families: that rank's process is about to end
LINGER = 1.0  # seconds in which what a rank has sent before it left has certainly arrived
_FAILED, _LEFT, _HERE = range(3)
Place = tuple[int, int, int]  # family, group in it, number of the call
_HEAD, _PLACE = struct.Struct("<qq"), struct.Struct("<qq")  # kind, family; the rest of a place
_LONGEST = 2000  # bytes of a text, so that it is sent at once, whether or not anybody receives it


def _nobody() -> Iterable[int]:
    return ()


class Notices:
    """A rank's mailbox, for all its groups. Usable from several threads.

    Args:
        comm: over all ranks of the job, used for nothing else.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm, self.rank, self.size = comm, comm.Get_rank(), comm.Get_size()
        self._lock = threading.Lock()
        self._failed: dict[int, str] = {}  # by family
        self._ending: set[int] = set()
        self._left: dict[int, float] = {}  # since when it is known, by rank
        self._here: dict[Place, set[int]] = {}
        self._sent: list[tuple[bytes, MPI.Request]] = []
        self._families = 0

    def new_family(self, comm: MPI.Intracomm) -> tuple[MPI.Request, bytearray]:
        """Starts to agree on a number (8 bytes) that no other family of the job has; collective.

        It is the first rank's, and made of its own: several threads may do this at once, for different groups.
        """
        with self._lock:
            self._families += 1
            number = bytearray((self._families * self.size + self.rank).to_bytes(8, "little"))
        return comm.Ibcast([number, 8, MPI.BYTE]), number

    # ---- telling ----------------------------------------------------------------------------------------------

    def post(self, family: int, ranks: Iterable[int], text: str) -> None:
        """Tells these ranks of the job that this one has given up the family. Does not wait for them."""
        self._send(_FAILED, family, ranks, text.encode()[:_LONGEST])

    def fail(self, text: str) -> None:
        """Tells all ranks that this one's process ends."""
        self.post(EVERY, range(self.size), text)

    def leave(self) -> None:
        """Tells all ranks that this one's program is over, and will call nothing any more."""
        self._send(_LEFT, EVERY, range(self.size), b"")

    def _send(self, kind: int, family: int, ranks: Iterable[int], more: bytes) -> None:
        message = _HEAD.pack(kind, family) + more
        with self._lock:
            for rank in ranks:
                if rank != self.rank:
                    request = self._comm.Isend([message, len(message), MPI.BYTE], rank, 0)
                    self._sent.append((message, request))

    # ---- hearing ----------------------------------------------------------------------------------------------

    def look(self, family: int, needed: Callable[[], Iterable[int]] = _nobody) -> str:
        """Why there is no point in waiting on: a rank of that family has given up, or one of the ``needed`` has left.

        Args:
            family: EVERY, or that of a transport; the first notice about it that has come counts.
            needed: ranks of the job for which the caller waits, asked for if any have left.

        Returns:
            "" = nothing.
        """
        with self._lock:
            self._read()
            if told := self._failed.get(family) or self._failed.get(EVERY, ""):
                return told
            past = time.monotonic() - LINGER
            gone = {rank for rank, since in self._left.items() if since < past}
        missing = sorted(gone.intersection(needed())) if gone else []
        if not missing:
            return ""
        who = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {missing}"
        return f"{who} of the job came to the end of the program (or sys.exit) before"

    def _read(self) -> None:
        status = MPI.Status()
        while (message := self._comm.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, status)) is not None:
            data = bytearray(status.Get_count(MPI.BYTE))
            message.Recv([data, len(data), MPI.BYTE])
            source, (kind, family) = status.Get_source(), _HEAD.unpack_from(data)
            if kind == _LEFT:
                self._left.setdefault(source, time.monotonic())
            elif kind == _HERE:
                place = family, *_PLACE.unpack(data[_HEAD.size :])
                self._here.setdefault(place, set()).add(source)
            else:
                text = data[_HEAD.size :].decode(errors="replace")
                self._failed.setdefault(family, f"rank {source} of the job failed: {text}")
                if family == EVERY:
                    self._ending.add(source)

    def silent(self) -> list[int]:
        """The other ranks that have not said that their process ends."""
        with self._lock:
            self._read()
            return [rank for rank in range(self.size) if rank != self.rank and rank not in self._ending]

    def everyone_leaves(self) -> MPI.Request:
        """Completes when all ranks have called it."""
        return self._comm.Ibarrier()

    # ---- who is late ------------------------------------------------------------------------------------------

    def say_here(self, place: Place, ranks: Iterable[int]) -> None:
        """Tells these ranks that this one waits at a place."""
        self._send(_HERE, place[0], ranks, _PLACE.pack(*place[1:]))

    def not_here(self, place: Place, ranks: Sequence[int]) -> list[int]:
        """Which of these have not said so: their numbers in the sequence."""
        with self._lock:
            self._read()
            came = self._here.pop(place, set[int]())
        return [i for i, rank in enumerate(ranks) if rank != self.rank and rank not in came]


class RollCall:
    """Who is late, where MPI does not say who has come: in its collectives.

    Who has waited for half of the time says so to the others. Who has said nothing when a rank's time is over has come
    later than that one by half of it, if at all.

    Args:
        place: where, the same numbers on all ranks, and at no other time.
        ranks: of the job.
        limit: seconds from now.
    """

    def __init__(self, board: Notices, place: Place, ranks: Sequence[int], limit: float) -> None:
        self._board, self._place, self._ranks = board, place, ranks
        self._half = time.monotonic() + limit / 2

    def look(self) -> None:
        """To be called now and then."""
        if time.monotonic() > self._half:
            self._half = math.inf
            self._board.say_here(self._place, self._ranks)

    def late(self) -> list[int]:
        """Numbers in ``ranks`` of who is late; none before half of the time is over."""
        return [] if self._half < math.inf else self._board.not_here(self._place, self._ranks)
