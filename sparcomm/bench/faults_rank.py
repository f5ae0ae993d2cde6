"""One rank of a world in which a fault is injected: it trains until it cannot, and says what it has seen."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparcomm.algorithms.base import Algorithm
from sparcomm.algorithms.dense import Dense
from sparcomm.algorithms.spardl import SparDL
from sparcomm.algorithms.topk import TopKAllGather
from sparcomm.bench.faults_plan import STEPS, Plan
from sparcomm.ddp import HookState, attach
from sparcomm.ddp.board import Board
from sparcomm.ddp.step import Step
from sparcomm.errors import NotInitializedError
from sparcomm.transport.torchdist import TorchTransport
from sparcomm.transport.torchdist.local import join_world, limit_world

CAUGHT = 3  # exit status of a survivor that has caught the error
JOIN_LIMIT = 40.0  # seconds
BUCKET_MB = 0.02
FLUSH_EVERY = 6


class Injected(Exception):
    """What victims raise."""


class Trigger:
    """Lets the fault of ``plan`` happen on this rank: once, when its time or its point has come."""

    def __init__(self, plan: Plan, rank: int, folder: Path) -> None:
        self.plan, self.armed = plan, rank == plan.victim
        self.step, self.flushing, self._passed, self._folder = 0, False, 0, folder
        self._lock = threading.Lock()

    def install(self) -> None:
        """Puts points into the code of this process, if it is the victim's."""
        if not self.armed:
            return
        places = [
            (Board, "exchange", "attach"), (TorchTransport, "met", "attach"), (HookState, "reduce_bucket", "bucket"),
            (Step, "reduce", "reduce"), (Step, "commit", "commit"),
            (TorchTransport, "_transfer", "transfer"), (TorchTransport, "_all_to_all", "transfer"),
        ]  # fmt: skip
        for owner, name, point in places:
            _wrap(owner, name, lambda point=point: self.passing(point))

    def start_clock(self) -> None:
        """From here on, ``plan.delay`` counts."""
        if self.armed and self.plan.point == "delay":
            timer = threading.Timer(self.plan.delay, self.strike)
            timer.daemon = True
            timer.start()

    def passing(self, point: str) -> None:
        """To be called at every point; may not return."""
        if not self.armed or (self.step < self.plan.step and self.step < STEPS):
            return
        if point == "transfer" and self.flushing:
            point = "flush"
        # A delay that was too long, or a point that this algorithm never passes, strikes between steps at last.
        if point == self.plan.point or (point == "between" and self.step >= STEPS):
            with self._lock:
                self._passed += 1
                due = self._passed >= self.plan.count or self.step >= STEPS
            if due:
                self.strike()

    def strike(self) -> None:
        """The fault itself, after the time has been written down."""
        with self._lock:
            if not self.armed:
                return
            self.armed = False
            (self._folder / "struck").write_text(repr(time.monotonic()))
        if self.plan.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.plan.kind == "stall":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.plan.kind in ("raise", "hook"):
            raise Injected(f"injected on rank {self.plan.victim}")
        elif self.plan.kind in ("leave", "close"):
            raise _Leave


class _Leave(Exception):
    """The victim goes."""


def _wrap(owner: type, name: str, before: Callable[[], None]) -> None:
    inner = getattr(owner, name)

    def outer(*args: Any, **kwargs: Any) -> Any:
        before()
        return inner(*args, **kwargs)

    setattr(owner, name, outer)


class Net(nn.Module):
    """Small layers, so that there are several buckets; passes a point in the middle."""

    def __init__(self, passing: Callable[[str], None]) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(6)])
        self._passing = passing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, 64) -> (b, 64)."""
        for i, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if i == 2:
                self._passing("forward")
        return x


def algorithm_of(plan: Plan, rank: int) -> Algorithm:
    """What this rank attaches; with the kind "differ", the victim's is another one."""
    known: dict[str, Algorithm] = {
        "spardl": SparDL(density=0.05),
        "direct": SparDL(density=0.05, schedule="direct", values="bfloat16"),
        "topk": TopKAllGather(density=0.05),
    }
    if plan.kind == "differ" and rank == plan.victim:
        others = [SparDL(density=0.06), SparDL(density=0.05, values="float16"), Dense()]
        return others[plan.number % len(others)]
    return known[plan.algorithm]


def digest(tensors: Sequence[torch.Tensor]) -> str:
    """A hash of their bits."""
    made = hashlib.blake2b(digest_size=8)
    for t in tensors:
        made.update(t.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def tensors_in(thing: Any) -> list[torch.Tensor]:
    """All tensors in nested containers, dicts by sorted key."""
    if isinstance(thing, torch.Tensor):
        return [thing] if thing.numel() else []
    if isinstance(thing, dict):
        return [t for key in sorted(thing, key=str) for t in tensors_in(thing[key])]
    if isinstance(thing, (list, tuple)):
        return [t for item in thing for t in tensors_in(item)]
    return []


class Run:
    """The training of one rank, and what is known of it."""

    def __init__(self, plan: Plan, rank: int, folder: Path) -> None:
        self.plan, self.rank, self.folder = plan, rank, folder
        self.trigger = Trigger(plan, rank, folder)
        self.state: HookState | None = None
        self.seen: dict[str, Any] = {"rank": rank, "params": [], "owed": [], "before_flush": {}, "stage": "joining"}

    def train(self, port: int, world: str) -> None:
        """Trains; returns when the planned number of steps is done, which happens in reference runs only."""
        plan, trigger = self.plan, self.trigger
        join_world(port, world, self.rank, plan.size, rank_hosts=plan.rank_hosts, timeout=JOIN_LIMIT)
        ddp = DistributedDataParallel(Net(trigger.passing), bucket_cap_mb=BUCKET_MB)
        self.params = list(ddp.parameters())
        optimizer = torch.optim.SGD(self.params, lr=0.05)
        self.meet()
        limit_world(plan.timeout)
        self.seen["stage"], self.seen["ready"] = "attach", time.monotonic()
        trigger.install()
        _flaw(plan)
        trigger.start_clock()
        trigger.passing("before")
        timeout = 600.0 if plan.flaw == "patient" else plan.timeout
        self.state = state = attach(ddp, algorithm_of(plan, self.rank), timeout=timeout)
        last = plan.step if plan.kind == "none" else 10 * STEPS
        for step in range(last + 1):
            self.note()
            trigger.step, self.seen["stage"] = step, f"step {step}"
            trigger.passing("between")
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1000 * step + self.rank))
            optimizer.zero_grad()
            (ddp(x) - x.roll(1, 1)).square().mean().backward()
            if step % FLUSH_EVERY == FLUSH_EVERY - 1 and hasattr(state, "flush"):
                if plan.kind == "none":
                    self.seen["before_flush"][step + 1] = self.owed()[1]
                trigger.flushing = True
                state.flush()
                trigger.flushing = False
            optimizer.step()

    def meet(self) -> None:
        """Waits for the others, so that no fault hits what PyTorch does while a module is made."""
        (self.folder / f"{self.rank}.ready").touch()
        deadline = time.monotonic() + JOIN_LIMIT
        while len(list(self.folder.glob("*.ready"))) < self.plan.size and time.monotonic() < deadline:
            time.sleep(0.005)

    def note(self) -> None:
        """Remembers the bits of weights and residuals between two steps; reading the latter waits for the worker."""
        self.seen["params"].append(digest(self.params))
        if self.plan.kind == "none" and self.state is not None:
            self.seen["owed"].append(self.owed()[1])

    def owed(self) -> tuple[int, str]:
        """The committed step, and a hash of what this rank owes."""
        assert self.state is not None
        saved = self.state.state_dict()
        return self.state.step, digest(tensors_in(saved))

    def failed(self, error: BaseException) -> None:
        """Writes down what the error was and what is left after it."""
        seen, state = self.seen, self.state
        seen["known"] = time.monotonic()
        seen["type"], seen["text"] = type(error).__name__, str(error)
        cause: BaseException = error
        if state is not None:
            try:
                state.raise_if_failed()
                seen["told"] = state.blame()  # it was not the hook's error, but one of DDP's own operations
            except BaseException as original:  # noqa: BLE001  (all kinds are data here)
                cause = original
            seen["last"] = digest(self.params)
            try:
                seen["committed"], seen["owes"] = self.owed()
            except NotInitializedError:
                seen["committed"] = -1
        seen["cause"], seen["cause_text"] = type(cause).__name__, str(cause)
        seen["blamed"] = list(getattr(cause, "ranks", ()) or ([cause.rank] if hasattr(cause, "rank") else []))  # type: ignore[attr-defined]
        if self.plan.caught and state is not None:
            state.close()
            seen["threads"] = [t.name for t in threading.enumerate() if t.name.startswith("sparcomm")]

    def write(self) -> None:
        """Leaves what was seen for the driver."""
        part = self.folder / f"{self.rank}.part"
        part.write_text(json.dumps(self.seen))
        part.rename(self.folder / f"{self.rank}.json")


def _flaw(plan: Plan) -> None:
    """Breaks the hook on purpose: the harness must find it."""
    if plan.flaw == "leaky":
        inner = Step.reduce

        def reduce(self: Step, unit: Any) -> None:
            inner(self, unit)
            if unit.residual is not None:
                unit.residual.mul_(0.5)

        Step.reduce = reduce  # type: ignore[method-assign]


def be_rank(job: dict[str, Any]) -> None:
    """Does a rank's job. Ends the process with CAUGHT, or by the error that ended training, or returns."""
    plan, rank, folder = Plan(**job["plan"]), int(job["rank"]), Path(job["folder"])
    run = Run(plan, rank, folder)
    try:
        run.train(job["port"], job["world"])
    except _Leave:
        if plan.kind == "close" and run.state is not None:
            run.state.close()
            _wait_for_others(plan, folder)
        return
    except Injected as error:
        # The victim's own code; what is raised inside the hook's work comes out of backward() as a RuntimeError.
        run.seen["type"] = type(error).__name__
        raise
    except BaseException as error:
        run.failed(error)
        run.write()
        if plan.caught:
            sys.exit(CAUGHT)
        raise
    run.write()


def _wait_for_others(plan: Plan, folder: Path) -> None:
    deadline = time.monotonic() + 10 * plan.timeout
    while len(list(folder.glob("*.json"))) < plan.size - 1 and time.monotonic() < deadline:
        time.sleep(0.05)
