"""The ranks that MPI was started with: a communicator of our own over them, their nodes, and how they end together."""

from __future__ import annotations

import functools
import sys
import threading
import time
import traceback
from types import TracebackType

from sparcomm.errors import ConfigError, PeerError
from sparcomm.transport.mpi.library import MPI
from sparcomm.transport.mpi.notices import Notices
from sparcomm.transport.mpi.waiting import Interrupted, wait

START = 300.0  # seconds in which all ranks have to come
GRACE = 3.0  # seconds that the other ranks have, after an error here, to end with its text before all are killed
_LEVELS = {
    MPI.THREAD_SINGLE: "MPI_THREAD_SINGLE",
    MPI.THREAD_FUNNELED: "MPI_THREAD_FUNNELED",
    MPI.THREAD_SERIALIZED: "MPI_THREAD_SERIALIZED",
    MPI.THREAD_MULTIPLE: "MPI_THREAD_MULTIPLE",
}


@functools.cache
def world() -> MPI.Intracomm:
    """A duplicate of COMM_WORLD that is sparcomm's, the same one at every call. The first call is collective.

    Raises:
        ConfigError: MPI has ended, or cannot be called from several threads.
        PeerError: not all ranks came within ``START`` seconds.
    """
    if MPI.Is_finalized():
        raise ConfigError("MPI has been finalized, and cannot be started again in the same process")
    level = MPI.Query_thread()
    if level < MPI.THREAD_MULTIPLE:
        raise ConfigError(
            f"MPI runs at thread level {_LEVELS[level]}, must be MPI_THREAD_MULTIPLE, since the hook communicates from "
            "a thread of its own: import sparcomm before mpi4py.MPI, or an MPI that is built with threads"
        )
    comm, request = MPI.COMM_WORLD.Idup()  # not Dup, which would take a core from those who are still importing
    try:
        wait(request.Test, START, str)
    except Interrupted as error:
        raise PeerError(f"starting: not all of {MPI.COMM_WORLD.Get_size()} ranks came here: {error}") from None
    comm.Set_name("sparcomm")
    return comm


@functools.cache
def notices() -> Notices:
    """How ranks tell each other that they give up. The first call is collective over COMM_WORLD."""
    return Notices(world().Dup())


@functools.cache
def local() -> tuple[int, int]:
    """(this rank's number on its node, ranks of its node): those that share memory. The first call is collective."""
    node = world().Split_type(MPI.COMM_TYPE_SHARED, world().Get_rank())
    found = node.Get_rank(), node.Get_size()
    node.Free()
    return found


# ---- ending it ----------------------------------------------------------------------------------------------------


@functools.cache
def abort_on_error() -> None:
    """From now on an exception that nobody catches, on any thread, ends all ranks with status 1; it is printed first.

    Without this a rank that fails waits in MPI_Finalize for the others, who wait for it. Ranks that wait in a
    transport get the error's text, and have ``GRACE`` seconds to end with it. Collective at the first call.
    """
    board, others = notices(), world().Get_size() > 1
    before, before_in_threads = sys.excepthook, threading.excepthook

    def end(error: BaseException) -> None:
        """Prints, tells the others, lets them end, and ends them."""
        if MPI.Is_finalized():
            return
        shown = "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
        head = f"[rank {world().Get_rank()} of {world().Get_size()}] "
        # Not sys.stderr: torch calls this hook with a buffer there, to add its prefix to the text afterwards.
        stream = sys.__stderr__ or sys.stderr
        stream.write("".join(f"{head}{line}\n" for line in shown.splitlines()))
        sys.stdout.flush()
        stream.flush()
        if others:
            board.fail(f"{type(error).__name__}: {error}")
            deadline = time.monotonic() + GRACE
            while not board.all_failed() and time.monotonic() < deadline:
                time.sleep(0.01)
        MPI.COMM_WORLD.Abort(1)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if before is not sys.__excepthook__:
            before(kind, error, trace)
        end(error)

    def hook_in_threads(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is None or isinstance(args.exc_value, SystemExit):
            before_in_threads(args)
        else:
            end(args.exc_value)

    sys.excepthook, threading.excepthook = hook, hook_in_threads
