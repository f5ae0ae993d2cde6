"""Real ranks for tests: processes with torch.distributed on Gloo, started once per pytest process and reused.

    results = pool(4).run(check_something, 1e-3, timeout=30)       # check_something(rank, size, 1e-3) on 4 ranks
    results = spawn(3, kill_rank_one)                              # in fresh processes: for tests that kill ranks

The function must be at the top level of a file: it travels as (file, name) and is loaded by path, arguments and
results as plain pickles. Each rank runs one torch thread, with warnings as errors. A rank that raises, dies or does not
answer makes ``run`` raise ``RankError`` with every rank's traceback; the processes are then replaced.
Starting Python and torch takes seconds, so worlds of all sizes share processes: a world of 2 uses the first two. On a
busy machine it takes a minute: the time limit of a run begins when all of its ranks have started.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import functools
import importlib
import importlib.util
import inspect
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

WORLD_TIMEOUT = timedelta(seconds=60)
START = 90.0  # seconds for processes to import torch and load the kernels: less than pytest gives a test
GRACE = 3.0  # seconds for the other ranks to report, once one has failed
PR_SET_PDEATHSIG = 1


class RankError(AssertionError):
    """At least one rank raised, died or timed out. ``errors`` maps ranks to what they reported."""

    def __init__(self, message: str, errors: dict[int, str]) -> None:
        super().__init__(message)
        self.errors = errors


@dataclass
class Died:
    """In place of the result of a rank whose process ended (``spawn`` only); negative = by that signal."""

    returncode: int


@dataclass
class Job:
    """What a rank is asked to do."""

    module: str
    file: str
    qualname: str
    args: bytes  # unpickled after the module is loaded, since it may define their classes
    world: int
    size: int
    port: int


class Rank:
    """One process, seen from pytest."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.log = tempfile.TemporaryFile(mode="w+b")  # noqa: SIM115  (lives as long as the process)
        self.pipe, theirs = Pipe()
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        command = [sys.executable, __file__, str(theirs.fileno()), str(rank), str(os.getpid())]
        self.process = subprocess.Popen(
            command, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log
        )
        theirs.close()
        self.ready = False

    def start(self, left: float) -> None:
        """Returns when it can take jobs. Raises RankError if it does not come to that in so many seconds."""
        if self.ready:
            return
        try:
            if not self.pipe.poll(max(left, 0.0)):
                raise RankError(f"rank {self.rank} has not started in {START} s; its stacks:\n{self.stacks()}", {})
            self.ready = bool(self.pipe.recv_bytes())
        except (EOFError, OSError):
            text = f"rank {self.rank} died at start, code {self.process.wait()}\n{self.tail()}"
            raise RankError(text, {self.rank: text}) from None

    def stacks(self) -> str:
        """What its threads are doing, written by faulthandler, behind what else it has printed."""
        with contextlib.suppress(OSError):
            self.process.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5)  # the time it takes to write them
        return self.tail()

    def tail(self) -> str:
        """The end of what the process printed."""
        self.log.seek(0)
        return self.log.read().decode(errors="replace")[-6000:].strip()

    def stop(self) -> None:
        """Ends the process at once."""
        self.process.kill()
        self.process.wait()
        self.pipe.close()
        self.log.close()


class Ranks:
    """Processes that can form worlds of any size."""

    def __init__(self) -> None:
        self.ranks: list[Rank] = []
        self.store: Any = None
        self.world = 0
        self.world_size = 0

    def call(self, size: int, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        """``fn(rank, size, *args)`` on ``size`` ranks; a result is the function's, Died, or RankError is raised."""
        self.prepare(size)
        # A script's own functions must not run the script again.
        where = (fn.__module__.replace("__main__", "main_script"), file_of(fn), fn.__qualname__)
        job = pickle.dumps(Job(*where, pickle.dumps(args), self.world, size, self.store.port))
        active = self.ranks[:size]
        for r in active:
            with contextlib.suppress(OSError):  # a dead one is noticed below
                r.pipe.send_bytes(job)
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while waiting := {r.pipe: r for r in active if r.rank not in results and r.rank not in errors}:
            left = deadline - time.monotonic()
            if left <= 0:
                silent = f"no answer (time limit of the run: {timeout} s); its stacks:\n"
                errors |= {r.rank: silent + r.stacks() for r in waiting.values()}
                break
            for pipe in wait(list(waiting), left):
                r = waiting[pipe]
                try:
                    ok, value = pickle.loads(r.pipe.recv_bytes())
                except (EOFError, OSError):
                    results[r.rank] = Died(r.process.wait())
                    continue
                (results if ok else errors)[r.rank] = value
                if not ok:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if errors:
            text = [f"\n--- rank {r} of {size} ---\n{errors[r]}" for r in sorted(errors)]
            text += [f"\n--- rank {r} of {size} died, code {v.returncode} ---\n{self.ranks[r].tail()}"
                     for r, v in results.items() if isinstance(v, Died)]  # fmt: skip
            raise RankError("".join(text), errors)
        return [results[r] for r in range(size)]

    def prepare(self, size: int) -> None:
        """Enough processes that are ready, and a number that names the world they form."""
        if self.store is None:
            import torch.distributed as dist

            # Like torchrun's, the store lives outside the ranks, on a port that the system chooses.
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.ranks += [Rank(r) for r in range(len(self.ranks), size)]
        deadline = time.monotonic() + START
        for r in self.ranks[:size]:
            r.start(deadline - time.monotonic())
        if size != self.world_size:
            self.world, self.world_size = self.world + 1, size

    def stop(self) -> None:
        """Ends all processes."""
        for r in self.ranks:
            r.stop()
        self.ranks, self.store, self.world_size = [], None, 0


_shared = Ranks()
atexit.register(_shared.stop)


@dataclass(frozen=True)
class Pool:
    """A world of ``size`` reused ranks."""

    size: int

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """``[fn(rank, size, *args) for each rank]``, run together. Raises RankError if any fails, also by dying."""
        try:
            results = _shared.call(self.size, fn, args, timeout)
        except BaseException:
            _shared.stop()
            raise
        dead = {r: str(v) for r, v in enumerate(results) if isinstance(v, Died)}
        if dead:
            logs = "".join(f"\n--- rank {r}: {v} ---\n{_shared.ranks[r].tail()}" for r, v in dead.items())
            _shared.stop()
            raise RankError(logs, dead)
        return results


def pool(size: int) -> Pool:
    """The pool of that size."""
    return Pool(size)


def spawn(size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """Like ``pool(size).run`` in fresh processes that end afterwards; a rank that died counts as ``Died``."""
    ranks = Ranks()
    try:
        return ranks.call(size, fn, args, timeout)
    finally:
        ranks.stop()


def file_of(fn: Callable[..., Any]) -> str:
    """The file a function is in. Raises TypeError for one that another process cannot find there."""
    if "<" in fn.__qualname__:
        raise TypeError(f"{fn.__qualname__} is not at the top level of its file, so ranks cannot load it")
    return str(Path(inspect.getsourcefile(fn) or "").resolve())


# ---- inside a rank ------------------------------------------------------------------------------------------------


@functools.cache
def load(module: str, file: str) -> Any:
    """The module in ``file``, under the name it has in pytest, so that pickles of its classes fit."""
    try:
        found = importlib.import_module(module)
        if Path(found.__file__ or "").resolve() == Path(file):
            return found
    except ImportError:
        pass
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[module])
    return sys.modules[module]


def join_world(world: int, rank: int, size: int, port: int) -> None:
    """Leaves the present world, if any, and forms the one with that number."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    store = dist.PrefixStore(f"world {world}", dist.TCPStore("127.0.0.1", port, is_master=False))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=WORLD_TIMEOUT)


def work(job: Job, rank: int, current: int) -> object:
    """Does one job and returns the function's result."""
    if job.world != current:
        join_world(job.world, rank, job.size, job.port)
    module = load(job.module, job.file)
    fn = functools.reduce(getattr, job.qualname.split("."), module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fn(rank, job.size, *pickle.loads(job.args))


def serve(pipe: Connection, rank: int, parent: int) -> None:
    """Does jobs until pytest is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before it could be tied to us
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    import torch

    from sparcomm.kernels import warm_up

    torch.set_num_threads(1)
    warm_up()
    pipe.send_bytes(b"ready")
    current = 0
    with contextlib.suppress(EOFError):
        while True:
            job: Job = pickle.loads(pipe.recv_bytes())
            try:
                answer = pickle.dumps((True, work(job, rank, current)))
            except BaseException:  # noqa: BLE001  (pytest.fail and sys.exit are failures of the test, too)
                answer = pickle.dumps((False, traceback.format_exc()))
            current = job.world
            pipe.send_bytes(answer)


if __name__ == "__main__":
    # Under the name that pickles of Job give it.
    from support.pool import serve as serve_jobs

    serve_jobs(Connection(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3]))
