"""How a rank that gives up is heard by those who wait for it: a few bytes on a communicator of their own.

MPI has no way to make another rank's wait fail, and without ULFM none to go on after a death. So every wait of ours is
a loop that also looks here. A message names the group that it is about (a family: a transport and all its sub-groups),
or is about the whole rank, which ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from sparcomm.transport.mpi.library import MPI

EVERY = 0  # the family of all families: that rank's process is about to end
_LONGEST = 2000  # bytes of a text, so that it is sent at once, whether or not anybody receives it


class Notices:
    """A rank's mailbox, for all its groups. Usable from several threads.

    Args:
        comm: over all ranks of the job, used for nothing else.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm, self.rank, self.size = comm, comm.Get_rank(), comm.Get_size()
        self._lock = threading.Lock()
        self._told: dict[int, str] = {}  # by family
        self._ending: set[int] = set()
        self._sent: list[tuple[bytes, MPI.Request]] = []
        self._families = 0

    def new_family(self, comm: MPI.Intracomm) -> tuple[MPI.Request, bytearray]:
        """Starts to agree on a number that no family of any of these ranks has; collective, see ``named``."""
        answer = bytearray(8)
        with self._lock:
            mine = (self._families + 1).to_bytes(8, "little")
        return comm.Iallreduce([mine, 1, MPI.INT64_T], [answer, 1, MPI.INT64_T], MPI.MAX), answer

    def named(self, answer: bytearray) -> int:
        """The number that has been agreed on."""
        number = int.from_bytes(answer, "little")
        with self._lock:
            self._families = max(self._families, number)
        return number

    def post(self, family: int, ranks: Iterable[int], text: str) -> None:
        """Tells these ranks of the job that this one has given up. Does not wait for them."""
        message = text.encode()[:_LONGEST]
        with self._lock:
            for rank in ranks:
                if rank != self.rank:
                    request = self._comm.Isend([message, len(message), MPI.BYTE], rank, family)
                    self._sent.append((message, request))

    def look(self, family: int) -> str:
        """Why a rank of that family has given up, as the first notice that has come says; "" = none has."""
        with self._lock:
            status = MPI.Status()
            while (message := self._comm.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, status)) is not None:
                text = bytearray(status.Get_count(MPI.BYTE))
                message.Recv([text, len(text), MPI.BYTE])
                source, about = status.Get_source(), status.Get_tag()
                self._told.setdefault(about, f"rank {source} of the job failed: {text.decode(errors='replace')}")
                if about == EVERY:
                    self._ending.add(source)
            return self._told.get(family) or self._told.get(EVERY, "")

    def fail(self, text: str) -> None:
        """Tells all ranks that this one's process ends, once."""
        self.post(EVERY, range(self.size), text)

    def all_failed(self) -> bool:
        """Whether all the others' processes are ending, too."""
        self.look(EVERY)
        with self._lock:
            return len(self._ending) == self.size - 1
