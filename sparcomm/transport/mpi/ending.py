"""How the ranks of a job end: together, and with the text of what went wrong first.

MPI_Finalize waits for all ranks. So a rank whose program fails, or is over early, would wait there for the others, who
wait for it in their calls, for ever. Here it says so before.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import math
import os
import sys
import threading
import time
import traceback
from types import TracebackType

from sparcomm.transport.mpi.library import MPI
from sparcomm.transport.mpi.notices import EVERY, Notices
from sparcomm.transport.mpi.waiting import Interrupted, wait

GRACE = 3.0  # seconds that the other ranks have, after an error here, to end with its text before all are killed
LAST = 10.0  # seconds after that in which MPI must have killed them
LEAVE = 1.0  # seconds after which a rank at its end tells those who have not come to theirs

_boards: list[Notices] = []  # one, from when all ranks can be told something
_once = threading.Lock()


@functools.cache
def install() -> None:
    """From now on an exception that nobody catches, on any thread, ends all ranks with status 1; it is printed first.

    Ranks that wait in a transport get its text, and have ``GRACE`` seconds to end with it. Not collective.
    """
    before, before_in_threads = sys.excepthook, threading.excepthook
    process = os.getpid()

    def ours() -> bool:
        """Not a process that was forked, as DataLoader's workers are, in which MPI must not be called."""
        return os.getpid() == process and not MPI.Is_finalized()

    def end(error: BaseException) -> None:
        shown = "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
        end_job(shown, f"{type(error).__name__}: {error}")

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if before is not sys.__excepthook__ or not ours():
            before(kind, error, trace)
        if ours():
            end(error)

    def hook_in_threads(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is None or isinstance(args.exc_value, SystemExit) or not ours():
            before_in_threads(args)
        else:
            end(args.exc_value)

    sys.excepthook, threading.excepthook = hook, hook_in_threads


def tell_by(board: Notices) -> None:
    """From now on all ranks can be told. Also, a rank whose program is over tells those who are not there yet."""
    _boards.append(board)
    atexit.register(_leave, os.getpid())


def end_job(shown: str, told: str) -> None:
    """Prints, tells the others, lets them end, and ends them, and this process.

    Args:
        shown: what is printed here.
        told: what those get who wait for this rank.
    """
    head = f"[rank {MPI.COMM_WORLD.Get_rank()} of {MPI.COMM_WORLD.Get_size()}] "
    # Not sys.stderr: torch calls excepthook with a buffer there, to add its prefix to the text afterwards.
    stream = sys.__stderr__ or sys.stderr

    def say(text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a pipe that nobody reads any more, a stream that is closed
            stream.write("".join(f"{head}{line}\n" for line in text.splitlines()))
            stream.flush()

    say(shown)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):  # a stream without a file
        faulthandler.dump_traceback_later(GRACE + LAST, exit=True, file=stream)  # whatever MPI is caught in
    with _once:
        for board in _boards:
            board.fail(told)
            deadline = time.monotonic() + GRACE
            while (silent := board.silent()) and time.monotonic() < deadline:
                time.sleep(0.01)
            if silent:
                say(f"no answer within {GRACE:g} s, and so stuck or busy: {_ranks(silent)}")
        MPI.COMM_WORLD.Abort(1)


def _ranks(ranks: list[int]) -> str:
    first = ", ".join(map(str, ranks[:20]))
    return f"rank {first}" if len(ranks) == 1 else f"ranks {first}{', ...' if len(ranks) > 20 else ''}"


def _leave(process: int) -> None:
    """Waits for all to come to their end, as MPI_Finalize does, but not silently."""
    if os.getpid() != process or MPI.Is_finalized():
        return
    (board,) = _boards
    with contextlib.suppress(MPI.Exception):
        here = board.everyone_leaves()
        try:
            wait(here.Test, LEAVE, str)
        except Interrupted:
            board.leave()
            try:
                wait(here.Test, math.inf, lambda: board.look(EVERY))
            except Interrupted as stop:
                board.fail(f"its program was over: {stop}")
