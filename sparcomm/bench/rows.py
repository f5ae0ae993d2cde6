"""One row: a child on every rank, watched by its parent; ended everywhere as soon as it has failed anywhere."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from sparcomm.bench import child
from sparcomm.bench.child import PATIENCE, Job
from sparcomm.bench.options import Common
from sparcomm.bench.world import World

LOOK = 0.5  # seconds between looks at what the other ranks have published
GRACE = 2.0  # seconds a child has to end by itself after another rank's has failed
ENDED = "ended because another rank had failed"
# What a rank may say before the one that failed has said why: its connection broke.
ECHOES, BROKEN = ("PeerError", "RemoteError", ENDED), "by peer"


@dataclass
class Row:
    """What is shown of one algorithm. Everything is None in a row that failed, but the error.

    Attributes:
        seconds: median over steps of the slowest rank's time.
        cpu_seconds: of the busiest rank, median over steps.
        bytes_sent, rounds, messages: of the busiest rank in one step.
        over: what the messages went over.
        energy: see gradient.captured.
        exact_cost: whether what was counted is what ``cost()`` says; None for what is not ours.
        bound: whether ``cost()`` is only a bound, because sizes depend on the data.
        link_bytes: that left the busiest host's interface in one step, headers included.
        extra: further entries.
    """

    algorithm: str
    numel: int
    size: int
    seconds: float | None = None
    cpu_seconds: float | None = None
    bytes_sent: int | None = None
    rounds: int | None = None
    messages: int | None = None
    kept: int | None = None
    energy: float | None = None
    error: str | None = None
    over: str = "gloo"
    exact_cost: bool | None = None
    bound: bool = False
    link_bytes: float | None = None
    extra: dict[str, Any] = field(default_factory=dict[str, Any])


class Runner:
    """Runs rows one after another on one rank; a context, within which the children's server lives.

    Children are forked by a process of their own that has done nothing but import what they need: as clean as fresh
    ones, and seconds of CPU cheaper.
    """

    def __init__(self, world: World, options: Common) -> None:
        self._world, self._options, self._number = world, options, 0
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ[name] = str(options.threads)
        self._context: Any = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
        with contextlib.suppress(AttributeError):
            self._context.set_forkserver_preload(["sparcomm.cli", "sparcomm.bench.preload"])

    def run(self, kind: str, typed: str, numel: int, over: str = "gloo") -> Row:
        """One row. Collective: the same on every rank.

        Args:
            kind: the module that measures; see ``child.Job``.
            typed: the algorithm.
            numel: elements of the gradient.
            over: see ``options.WAYS``.

        Raises:
            PeerError: the bench itself, not a child of it, has ended on another rank.
        """
        world, self._number = self._world, self._number + 1
        key = f"{world.token}/{self._number}"
        with tempfile.TemporaryDirectory(prefix="sparcomm-bench-") as folder:
            log = Path(folder) / "log"
            job = Job(kind, typed, self._options, world.rank, world.size, world.host, world.port, key, str(log), over)
            outcome = self._child(job, key) if over == "gloo" else self._inside(job, key)
        world.set(f"{key}/outcome/{world.rank}", outcome)
        patience = self._options.timeout + PATIENCE
        outcomes = [world.get(f"{key}/outcome/{rank}", patience) for rank in range(world.size)]
        if failed := [(o["echo"], o["order"], rank, o["error"]) for rank, o in enumerate(outcomes) if "error" in o]:
            *_, rank, text = min(failed)
            return Row(typed, numel, world.size, error=f"rank {rank}: {text}", over=over)
        return combine(typed, numel, [o["result"] for o in outcomes], over)

    def _inside(self, job: Job, key: str) -> dict[str, Any]:
        """The same as ``_child``, in this process."""
        from sparcomm.bench import inside

        outcome = inside.measured(job)
        return outcome | (self._publish(key, outcome["error"]) if "error" in outcome else {})

    def _child(self, job: Job, key: str) -> dict[str, Any]:
        """Runs the rank's child to its end: {"result": ...}, or {"error": ...} and what ``_publish`` says of it."""
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(target=child.run, args=(job, there, 0), daemon=True)
        with _ended(process):
            process.start()
            there.close()
            message, value = self._watch(process, here, key)
            if message == "result":
                process.join(GRACE)
        if message == "ended":
            message, value = "error", f"{_ending(process.exitcode)}{_last_line(Path(job.log))}"
        if message == "result":
            return {"result": value}
        return {"error": value, **self._publish(key, value)}

    def _watch(self, process: Any, connection: Connection, key: str) -> tuple[str, Any]:
        """("result", sample), ("error", text) or ("ended", None)."""
        timeout, last, looked = self._options.timeout, time.monotonic(), time.monotonic()
        progress, failed = 0, float("inf")
        while True:
            if connection in wait([connection, process.sentinel], LOOK):
                try:
                    message, value = connection.recv()
                except (EOFError, OSError):  # it has ended without a word
                    process.join(GRACE)
                    return "ended", None
                if message != "step":
                    return message, value
                progress, last = value, time.monotonic()
            elif process.exitcode is not None and not connection.poll():
                return "ended", None
            now = time.monotonic()
            if now - last > timeout:
                return "error", f"timed out: no step completed in {timeout:g} s, {progress} before that"
            if now - looked > LOOK:
                looked = now
                if failed == float("inf") and self._world.store.check([f"{key}/errors"]):
                    failed = now
            if now - failed > GRACE:
                return "error", ENDED

    def _publish(self, key: str, text: str) -> dict[str, Any]:
        """Tells the other ranks. The first to do so is the one that is shown, unless it only met another's end."""
        return {"order": self._world.store.add(f"{key}/errors", 1), "echo": text.startswith(ECHOES) or BROKEN in text}


def combine(typed: str, numel: int, samples: list[dict[str, Any]], over: str = "gloo") -> Row:
    """One row from all ranks' samples."""
    slowest = [max(step) for step in zip(*(s["seconds"] for s in samples), strict=True)]
    busiest = max(samples, key=lambda s: s["bytes_sent"])
    counted = [busiest["rounds"], busiest["messages"], busiest["bytes_sent"]]
    links = [s["link_bytes"] for s in samples if s["link_bytes"] is not None]
    return Row(
        typed, numel, len(samples),
        seconds=statistics.median(slowest),
        cpu_seconds=max(statistics.median(s["cpu"]) for s in samples),
        bytes_sent=busiest["bytes_sent"], rounds=busiest["rounds"], messages=busiest["messages"],
        kept=samples[0]["kept"], energy=samples[0]["energy"],
        exact_cost=None if busiest["cost"] is None else _as_said(busiest, counted), bound=busiest["bound"],
        link_bytes=max(links) if links else None,
        over=over,
        extra=samples[0]["extra"],
    )  # fmt: skip


def _as_said(sample: dict[str, Any], counted: list[int]) -> bool:
    """Whether what was counted is what ``cost()`` says, or at most that, where it is a bound."""
    if sample["bound"]:
        return all(c <= most for c, most in zip(counted, sample["cost"], strict=True))
    return sample["cost"] == counted


@contextlib.contextmanager
def _ended(process: Any) -> Iterator[None]:
    """Leaves no process behind."""
    try:
        yield
    finally:
        if process.pid is not None and process.exitcode is None:
            process.kill()
            process.join()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _last_line(log: Path) -> str:
    """The last thing the process printed, after a colon."""
    try:
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    said = [line for line in lines if line]
    return f": {said[-1]}" if said else ""
