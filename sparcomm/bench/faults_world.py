"""Worlds of real processes in which one rank comes to grief, seen from outside; and what is to be said of each."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparcomm.bench.faults_plan import ALGORITHMS, Plan, reference
from sparcomm.errors import SparcommError
from sparcomm.transport.torchdist.local import Meeting

START_LIMIT = 90.0  # seconds to come to the fault
EXIT_LIMIT, LONGEST_EXIT = 8.0, 90.0  # seconds to end in, once the error is known: without using the CPU; at all


class Forks:
    """The process that forks ranks. Use as a context: on leaving it, every rank that is left over dies with it."""

    def __init__(self) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sparcomm.bench.faults_fork"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=env,
        )  # fmt: skip
        assert self._process.stdout is not None
        if "ready" not in self._process.stdout.readline():
            raise SparcommError("the process that forks ranks did not start")
        os.set_blocking(self._process.stdout.fileno(), False)
        self._buffer = ""
        self._files = tempfile.TemporaryDirectory(prefix="sparcomm-faults-", ignore_cleanup_errors=True)
        self.folder = Path(self._files.name)
        self.pids: dict[tuple[str, int], int] = {}
        self.statuses: dict[int, int] = {}

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._files.cleanup()

    def start(self, **job: Any) -> None:
        """Forks a rank that does ``job``."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")

    def read(self) -> None:
        """Takes in what has been said of pids and endings."""
        assert self._process.stdout is not None
        try:
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return
        if not chunk:
            raise SparcommError(f"the process that forks ranks has ended with status {self._process.wait()}")
        *lines, self._buffer = (self._buffer + chunk.decode()).split("\n")
        for line in lines:
            said = json.loads(line)
            if "ended" in said:
                self.statuses[said["ended"]] = said["status"]
            else:
                self.pids[said["world"], said["rank"]] = said["pid"]


@dataclass
class Outcome:
    """What came of one injection.

    Attributes:
        seconds: until each survivor knew, by rank.
        hangs: survivors that did not know in time, or did not end.
        wrongs: where bits differ from those of an undisturbed run, in words.
        unclean: odd exit statuses, threads left, aborts, in words.
        named, misnamed, survivors: how many blame the victim, blame another, and are there.
        texts: what the survivors' errors say, by rank.
    """

    plan: Plan
    seconds: dict[int, float] = field(default_factory=dict[int, float])
    late: list[int] = field(default_factory=list[int])
    hangs: list[str] = field(default_factory=list[str])
    wrongs: list[str] = field(default_factory=list[str])
    unclean: list[str] = field(default_factory=list[str])
    named: int = 0
    misnamed: int = 0
    survivors: int = 0
    texts: dict[int, str] = field(default_factory=dict[int, str])

    @property
    def bad(self) -> bool:
        """Whether something happened that never may."""
        return bool(self.hangs or self.wrongs or self.unclean or self.late)


class World:
    """One injection under way."""

    def __init__(self, forks: Forks, plan: Plan, slack: float) -> None:
        self.plan, self.slack, self._forks = plan, slack, forks
        self.folder = Path(tempfile.mkdtemp(dir=forks.folder))
        self._meeting = Meeting()  # one each: a store that stands still for a moment must not disturb other worlds
        self.name = f"{plan.kind} {plan.number}"
        self.begun = time.monotonic()
        self.hangs: list[str] = []
        self._exits: float | None = None
        self._used, self._moved = -1, 0.0
        for rank in range(plan.size):
            forks.start(plan=asdict(plan), rank=rank, world=self.name, port=self._meeting.port, folder=str(self.folder))

    @property
    def survivors(self) -> list[int]:
        """The ranks that must come to know."""
        # A victim whose error arises within the hook, or in comparing settings, hears of it like everyone else.
        return [r for r in range(self.plan.size) if r != self.plan.victim or self.plan.kind in ("hook", "differ")]

    def done(self) -> bool:
        """Whether it is over; ends what hangs."""
        waiting = [r for r in self.survivors if self._status(r) is None]
        if not waiting:
            self._kill([self.plan.victim])
            return all(self._status(r) is not None for r in range(self.plan.size))
        now, struck = time.monotonic(), self._read("struck")
        known = [r for r in self.survivors if (self.folder / f"{r}.json").exists()]
        if len(known) == len(self.survivors):
            limit = self._exit_limit(waiting)
        else:
            limit = self.begun + START_LIMIT if struck is None else float(struck)
            limit += self.plan.timeout + self.slack
        if now > limit and not self.hangs:
            what = "has not ended after its error" if len(known) == len(self.survivors) else "has not come to know"
            for r in waiting:
                self._signal(r, signal.SIGUSR1)
            time.sleep(0.5)  # the time it takes to write the stacks
            self.hangs = [
                f"rank {r} {what}, {limit - self.begun:.1f} s after its start: {self._log(r)}" for r in waiting
            ]
            self._kill(list(range(self.plan.size)))
        return False

    def outcome(self, references: dict[str, list[dict[str, Any]]]) -> Outcome:
        """What is to be said of it; removes its files."""
        result = Outcome(self.plan, hangs=self.hangs, survivors=len(self.survivors))
        struck = self._read("struck")
        begun = float(struck) if struck is not None else 0.0
        seen = {r: json.loads(text) for r in range(self.plan.size) if (text := self._read(f"{r}.json"))}
        if struck is None:  # a different configuration strikes when all have come
            begun = max([s.get("ready", 0.0) for s in seen.values()], default=0.0)
        for r in self.survivors:
            if r not in seen or "known" not in seen[r]:
                if not self.hangs:
                    result.unclean.append(f"rank {r} said nothing, status {self._status(r)}: {self._log(r)}")
                continue
            result.seconds[r] = max(0.0, seen[r]["known"] - begun)
            told = f" [{seen[r]['told']}]" if seen[r].get("told") else ""
            result.texts[r] = f"{seen[r]['stage']}: {seen[r]['cause']}: {seen[r]['cause_text']}{told}"
            if result.seconds[r] > self.plan.timeout + self.slack:
                result.late.append(r)
            _judge_name(result, seen[r], self.plan)
            result.wrongs += compare(seen[r], references[self.plan.algorithm][r])
            result.unclean += self._manners(r, seen[r])
        shutil.rmtree(self.folder)
        return result

    def results(self) -> list[dict[str, Any]]:
        """What the ranks of a reference run have seen; removes its files."""
        texts = [self._read(f"{r}.json") for r in range(self.plan.size)]
        if None in texts:
            raise SparcommError(f"an undisturbed run failed: {[self._log(r) for r in range(self.plan.size)]}")
        shutil.rmtree(self.folder)
        return [json.loads(text or "") for text in texts]

    def _manners(self, rank: int, seen: dict[str, Any]) -> Iterator[str]:
        """What is wrong with how a survivor ended."""
        status, wanted = self._status(rank), 3 if self.plan.caught else 1
        if status != wanted and not self.hangs:
            yield f"rank {rank} ended with status {status} instead of {wanted}: {self._log(rank)}"
        if seen.get("threads"):
            yield f"rank {rank} has threads left: {seen['threads']}"
        if "terminate called" in self._log(rank):
            yield f"rank {rank}: {self._log(rank)}"

    def _status(self, rank: int) -> int | None:
        return self._forks.statuses.get(self._forks.pids.get((self.name, rank), -1))

    def _read(self, name: str) -> str | None:
        path = self.folder / name
        return (path.read_text() or None) if path.exists() else None

    def _exit_limit(self, waiting: list[int]) -> float:
        """Ending takes a second of CPU time, which on a busy machine may be half a minute: who works does not hang."""
        used = sum(cpu_ticks(self._forks.pids[self.name, r]) for r in waiting)
        now = time.monotonic()
        if self._exits is None:
            self._exits = now
        if used != self._used:
            self._used, self._moved = used, now
        return min(self._moved + EXIT_LIMIT, self._exits + LONGEST_EXIT)

    def _log(self, rank: int) -> str:
        return (self._read(f"{rank}.log") or "")[-3000:]

    def _signal(self, rank: int, number: int) -> None:
        pid = self._forks.pids.get((self.name, rank))
        if pid is not None and self._status(rank) is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, number)

    def _kill(self, ranks: list[int]) -> None:
        for r in ranks:
            self._signal(r, signal.SIGKILL)


def cpu_ticks(pid: int) -> int:
    """CPU time that a process has used, in clock ticks; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def _judge_name(result: Outcome, seen: dict[str, Any], plan: Plan) -> None:
    blamed = seen["blamed"]
    listed = seen["cause"] == "ConfigMismatch" and f"rank {plan.victim}: " in seen["cause_text"]
    own = seen["rank"] == plan.victim and seen["cause"] == "Injected"
    told = re.findall(r"rank (\d+) (?:has|does|failed)", seen.get("told", ""))
    if blamed == [plan.victim] or listed or own or told == [str(plan.victim)]:
        result.named += 1
    elif blamed or told:
        result.misnamed += 1


def compare(seen: dict[str, Any], undisturbed: dict[str, Any]) -> list[str]:
    """Where a rank's weights between steps, its weights after the error, or what it owes differ from the reference."""
    steps = len(seen["params"])
    found: list[str] = []
    rank = f"rank {seen['rank']}"
    if seen["params"] != undisturbed["params"][:steps]:
        at = next(i for i, (a, b) in enumerate(zip(seen["params"], undisturbed["params"], strict=False)) if a != b)
        found.append(f"{rank}: weights after {at} steps are not those of an undisturbed run")
    if steps and seen.get("last", seen["params"][-1]) != seen["params"][-1]:
        found.append(f"{rank}: weights changed in the step that failed")
    committed = seen.get("committed", -1)
    if committed >= 0:
        if committed not in (steps - 1, steps):
            found.append(f"{rank}: says {committed} steps are committed, but has trained {steps - 1}")
        elif seen["owes"] != _owed(undisturbed, committed, within=committed == steps):
            found.append(f"{rank}: what it owes after {committed} steps is not what an undisturbed run owes")
    return found


def _owed(undisturbed: dict[str, Any], step: int, *, within: bool) -> str:
    """What an undisturbed run owes after ``step`` steps; ``within``: before the flush, if one follows that step."""
    before: dict[str, str] = undisturbed.get("before_flush", {})
    return before[str(step)] if within and str(step) in before else undisturbed["owed"][step]


def references(forks: Forks, size: int) -> dict[str, list[dict[str, Any]]]:
    """What the ranks of an undisturbed run have seen, by algorithm."""
    found: dict[str, list[dict[str, Any]]] = {}
    for number, name in enumerate(ALGORITHMS):
        (world,) = run_all(forks, [reference(number, name, size)], 1, 60.0)
        found[name] = world.results()
    return found


def run_all(forks: Forks, plans: list[Plan], at_once: int, slack: float) -> Iterator[World]:
    """Runs the plans, ``at_once`` worlds at a time; yields each when it is over."""
    left, running = list(plans), list[World]()
    while left or running:
        while left and len(running) < at_once:
            running.append(World(forks, left.pop(0), slack))
        time.sleep(0.02)
        forks.read()
        for world in [w for w in running if w.done()]:
            running.remove(world)
            yield world
