"""p ranks as threads of one process: for tests, and for asking what an algorithm would cost on a given network.

    run = sim.run(4, lambda t: t.all_reduce(torch.ones(8)), link=Link(latency=1e-3, bandwidth=125e6))
    run.results, run.traffic, run.seconds

One rank runs at a time, and hands over only when it has to wait, always to the rank that has been ready longest.
So runs are deterministic, threads never compete for the interpreter, and "nobody can go on" is a plain fact, found
at once, instead of a timeout.

**Clock.** The alpha-beta model, per rank, communication only (computing is free). A message of b bytes keeps its
sender's link busy for b/bandwidth and arrives latency + b/bandwidth after it was started. An exchange ends at
max(own time after sending, arrival). An all_to_all puts p-1 messages one after the other onto the sender's link, to
rank+1, rank+2, ..., and ends when the last has left and all others have arrived; receiving is never the bottleneck.
Making sub-groups takes no time, but waits for all. ``all_reduce(native=True)`` waits for the last rank and then takes
a ring's 2(p-1) (latency + b/(p bandwidth)).
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from torch import Tensor

from sparcomm.errors import ConfigError, DisagreementError, PeerError
from sparcomm.threads import serial
from sparcomm.transport.base import Link, Op, Traffic
from sparcomm.transport.common import BaseTransport, Call, Shared, nbytes, shape_of

R = TypeVar("R")


@dataclass
class Run(Generic[R]):
    """What a run gave, by rank, and its virtual duration (the slowest rank's clock)."""

    results: list[R]
    traffic: list[Traffic]
    seconds: float


def run(size: int, fn: Callable[[SimTransport], R], link: Link | None = None, *, timeout: float = 60.0) -> Run[R]:
    """Calls ``fn(transport)`` on ``size`` ranks and returns when all have returned.

    The first rank that raises ends the run: the others' waits and later calls raise PeerError, and its exception is
    raised here, with a note that names the rank.

    Raises:
        DisagreementError: ranks called different operations, sizes, dtypes or peers, wait for each other in a
            circle or for a rank that has finished, or sent what nobody received; names every rank's current call.
        ConfigError: ``size`` below 1.
        TimeoutError: ``timeout`` seconds of real time have passed; the message shows where each rank stands. A rank
            that is computing cannot be stopped: its thread goes on until its next call.
    """
    if size < 1:
        raise ConfigError(f"size={size}, must be at least 1")
    return cast("Run[R]", _World(size, fn, link or Link(), timeout).run())


@dataclass
class _Message:
    tag: int
    call: Call
    data: Tensor
    arrival: float


@dataclass
class _Wait:
    """What a blocked rank waits for. The sender fills ``arrival``, having copied straight into ``recv``."""

    transport: SimTransport
    peer: int
    recv: Tensor
    capacity: bool
    tag: int
    arrival: float = -1.0


class SimTransport(BaseTransport):
    """One simulated rank's view of its group. Made by ``run`` and ``split``.

    Attributes:
        me: this rank's number in the whole run.
        group: names the group; () is the one of all ranks.
        members: the group's ranks as numbers of the whole run.
    """

    def __init__(self, world: _World, group: tuple[object, ...], members: list[int], me: int, shared: Shared) -> None:
        super().__init__(members.index(me), len(members), shared)
        self.members = members
        self._world, self.group, self.me = world, group, me

    def _enter(self, call: Call) -> None:
        world = self._world
        world.current[self.me] = self
        if world.failure is not None:
            raise world.peer_error(self.where(call))
        super()._enter(call)

    def _transfer(
        self, send: Tensor | None, to: int, recv: Tensor | None, source: int, capacity: bool, tag: int
    ) -> None:
        if send is not None:
            self._world.post(self, to, send, tag)
        if recv is not None:
            self._world.take(self, source, recv, capacity, tag)

    def _all_to_all(self, out: Tensor, x: Tensor, tag: int) -> None:
        p, r = self.size, self.rank
        out[r].copy_(x[r])
        for shift in range(1, p):
            self._world.post(self, (r + shift) % p, x[(r + shift) % p], tag)
        for shift in range(1, p):
            self._world.take(self, (r - shift) % p, out[(r - shift) % p], False, tag)

    def _native_all_reduce(self, x: Tensor, op: Op) -> None:
        # Moved by our own all_reduce on a free link, which leaves every clock at the last rank's start.
        world, p, counted, call = self._world, self.size, self.traffic, self.call
        link, self.traffic = world.links[self.me], Traffic()
        world.links[self.me] = Link(0.0, float("inf"))
        try:
            self._ordered_all_reduce(x, op)
        finally:
            world.links[self.me], self.traffic, self.call = link, counted, call
        world.time[self.me] += 2 * (p - 1) * (link.latency + nbytes(x) / (p * link.bandwidth))

    def _gather_setup(self, out: Tensor, x: Tensor) -> None:
        world = self._world
        link, world.links[self.me] = world.links[self.me], Link(0.0, float("inf"))
        try:
            self._gather(out, x)
        finally:
            world.links[self.me] = link

    def measure(self) -> Link:
        """The links of the run are known."""
        self._enter(Call("measure"))
        links = self._world.links
        return Link(max(links[m].latency for m in self.members), min(links[m].bandwidth for m in self.members))

    def _make_split(self, members: list[int], color: int) -> SimTransport:
        group = (*self.group, self._tag, color)
        return SimTransport(self._world, group, [self.members[r] for r in members], self.me, self._shared)

    def _die(self) -> None:
        self._world.abort(self.me)


class _World:
    """The scheduler of one run. Only the rank whose turn it is touches it, so it needs no lock."""

    def __init__(self, size: int, fn: Callable[[SimTransport], object], link: Link, timeout: float) -> None:
        self.size, self.fn, self.timeout = size, fn, timeout
        self.links, self.time = [link] * size, [0.0] * size
        self.shared = [Shared() for _ in range(size)]
        self.results: list[object] = [None] * size
        self.current: list[SimTransport | None] = [None] * size
        self.waits: list[_Wait | None] = [None] * size
        self.finished, self.started = [False] * size, [False] * size
        # By group, sender and receiver: messages sent before their receiver asked for them.
        self.mail: dict[tuple[object, ...], deque[_Message]] = {}
        self.ready: deque[int] = deque(range(size))
        self.failure: BaseException | None = None
        self.failed_rank = -1
        self.workers = _hire(size)
        self.done = threading.Lock()

    # ---- one run, seen from the caller ------------------------------------------------------------------------

    def run(self) -> Run[object]:
        self.done.acquire()
        for rank, worker in enumerate(self.workers):
            worker.job = (self, rank)
        self.next()
        if not self.done.acquire(timeout=self.timeout):
            raise self.overtime()
        _idle.extend(self.workers)
        if self.failure is None:
            self.check_mail()
        if self.failure is not None:
            failure, self.failure = self.failure, None  # no cycle through the traceback
            raise failure
        return Run(self.results, [s.traffic for s in self.shared], max(self.time))

    def overtime(self) -> TimeoutError:
        """Ends an endless run as well as threads allow: the next call of any rank raises."""
        frames, text = sys._current_frames(), self.describe()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        busy = [w for r, w in enumerate(self.workers) if self.started[r] and not self.finished[r] and not self.waits[r]]
        stacks = "".join("".join(traceback.format_stack(frames[w.ident])) for w in busy if w.ident in frames)
        error = TimeoutError(f"run of {self.size} ranks has not ended after {self.timeout} s{text}\nrunning:\n{stacks}")
        self.failure = self.failure or error
        return error

    def check_mail(self) -> None:
        lost = [(key, m) for key, box in self.mail.items() for m in box]
        if lost and not any(s.dead for s in self.shared):
            (*_, source, to), m = lost[0]
            self.fail(DisagreementError(f"rank {to} never received {shape_of(m.data)} of rank {source}'s {m.call}"))

    def main(self, rank: int) -> None:
        """What rank ``rank``'s thread does."""
        transport = SimTransport(self, (), list(range(self.size)), rank, self.shared[rank])
        self.current[rank], self.started[rank] = transport, True
        try:
            self.results[rank] = self.fn(transport)
        except BaseException as error:  # noqa: BLE001  (raised again in the caller)
            self.fail(error, rank)
        self.finished[rank] = True
        self.release_waiters(rank)
        if self.failure is not None or (not self.ready and not all(self.finished)):
            self.fail(self.disagreement("all ranks wait"))
        self.next()

    # ---- handing over -----------------------------------------------------------------------------------------

    def next(self) -> None:
        """Gives the turn away for good: the caller has finished."""
        while self.ready:
            rank = self.ready.popleft()
            if self.failure is not None and not self.started[rank]:
                self.finished[rank] = True
                continue
            self.workers[rank].wake.release()
            return
        self.done.release()

    def block(self, me: int, wait: _Wait) -> None:
        """Gives the turn away until the message has come, or never will."""
        self.waits[me] = wait
        if not self.ready or self.failure is not None:
            self.fail(self.disagreement("all ranks wait"))
        while self.ready and not self.started[self.ready[0]] and self.failure is not None:
            self.finished[self.ready.popleft()] = True
        rank = self.ready.popleft()
        if rank != me:
            self.workers[rank].wake.release()
            self.workers[me].wake.acquire()
        self.waits[me] = None

    def resume(self, rank: int) -> None:
        if self.waits[rank] is not None and rank not in self.ready:
            self.ready.append(rank)

    # ---- messages ---------------------------------------------------------------------------------------------

    def post(self, sender: SimTransport, to: int, data: Tensor, tag: int) -> None:
        me, dst = sender.me, sender.members[to]
        link, size = self.links[me], nbytes(data)
        arrival = self.time[me] + link.latency + size / link.bandwidth
        self.time[me] += size / link.bandwidth
        self.check_alive(sender, dst)
        message = _Message(tag, sender.call, data, arrival)
        wait = self.waits[dst]
        if wait and wait.arrival < 0 and wait.peer == me and wait.transport.group == sender.group:
            self.deliver(message, wait, me)
            self.resume(dst)
        else:
            message.data = data.detach().clone()
            self.mail.setdefault((*sender.group, me, dst), deque()).append(message)

    def take(self, receiver: SimTransport, source: int, recv: Tensor, capacity: bool, tag: int) -> None:
        me, src = receiver.me, receiver.members[source]
        wait = _Wait(receiver, src, recv, capacity, tag)
        key = (*receiver.group, src, me)
        box = self.mail.get(key)
        if box:
            self.deliver(box.popleft(), wait, src)
            if not box:
                del self.mail[key]
        else:
            self.check_alive(receiver, src, wait)
            self.block(me, wait)
        if wait.arrival < 0 or self.failure is not None:
            raise self.peer_error(f"{receiver.where()}: waiting for rank {source} (tag {tag})", src)
        self.time[me] = max(self.time[me], wait.arrival)

    def deliver(self, m: _Message, wait: _Wait, src: int) -> None:
        """Copies a message to its receiver, whoever of the two came last."""
        call, recv = wait.transport.call, wait.recv
        same = m.call == call if call.name != "exchange" else m.call[:2] == call[:2]
        agreed = same and m.tag == wait.tag and m.data.dtype == recv.dtype
        n, room = m.data.numel(), recv.numel()
        if not agreed or n > room or (n < room and not wait.capacity):
            what = f"rank {src} sent {shape_of(m.data)} in {m.call}, its transfer {m.tag}, to rank {wait.transport.me}"
            error = self.disagreement(f"{what}, which expects {shape_of(recv)} in {call}, its transfer {wait.tag}")
            self.fail(error)
            raise error
        flat = recv.view(-1) if n == room else recv.view(-1)[:n]
        flat.copy_(m.data.detach().view(-1))
        wait.arrival = m.arrival

    # ---- failing ----------------------------------------------------------------------------------------------

    def check_alive(self, transport: SimTransport, peer: int, wait: _Wait | None = None) -> None:
        """Raises unless ``peer`` can still answer."""
        if self.shared[peer].dead:
            raise self.peer_error(f"{transport.where()}: rank {peer}", peer)
        if self.finished[peer] and self.failure is None:
            self.waits[transport.me] = wait
            error = self.disagreement(f"rank {peer} has finished, but rank {transport.me} is not done with it")
            self.waits[transport.me] = None
            self.fail(error)
            raise error

    def release_waiters(self, rank: int) -> None:
        """Wakes those who wait for a rank that will never answer: in vain, which is an error of its own."""
        dead = bool(self.shared[rank].dead)
        for other, wait in enumerate(self.waits):
            if wait and wait.arrival < 0 and wait.peer == rank:
                if not dead and self.failure is None:
                    self.fail(self.disagreement(f"rank {rank} has finished, but rank {other} waits for it"))
                self.resume(other)

    def abort(self, rank: int) -> None:
        self.release_waiters(rank)

    def fail(self, error: BaseException, rank: int = -1) -> None:
        """Ends the run with ``error``; only the first counts."""
        if self.failure is None:
            self.failure, self.failed_rank = error, rank
            if rank >= 0:
                # add_note needs Python 3.11; the attribute is what it writes.
                notes = [*getattr(error, "__notes__", []), f"raised on rank {rank} of {self.size} simulated ranks"]
                cast(Any, error).__notes__ = notes
        for other in range(self.size):
            self.resume(other)

    def peer_error(self, where: str, peer: int = -1) -> PeerError:
        if peer >= 0 and self.shared[peer].dead:
            return PeerError(f"{where}: rank {peer} has ended: {self.shared[peer].dead}")
        name = f"rank {self.failed_rank}" if self.failed_rank >= 0 else "the run"
        return PeerError(f"{where}: {name} failed first with {type(self.failure).__name__}: {self.failure}")

    def disagreement(self, what: str) -> DisagreementError:
        return DisagreementError(what + self.describe())

    def describe(self) -> str:
        """One line per rank: what it is doing."""
        lines: list[str] = []
        for rank, t in enumerate(self.current):
            wait = self.waits[rank]
            if not self.started[rank]:
                text = "not started"
            elif self.finished[rank]:
                text = "finished"
            elif wait and wait.arrival < 0:
                text = f"in {wait.transport.call}, waiting for rank {wait.peer} (tag {wait.tag})"
            else:
                text = f"running, last call {t.call}" if t and t.call.name else "running"
            lines.append(f"\n  rank {rank}: {text}")
        return "".join(lines)


class _Worker(threading.Thread):
    """A thread that lends itself to one rank after another: starting threads would cost more than most runs."""

    def __init__(self) -> None:
        super().__init__(name="sparcomm-sim", daemon=True)
        self.wake = threading.Lock()
        self.wake.acquire()
        self.job: tuple[_World, int] | None = None
        self.start()

    def run(self) -> None:
        while True:
            self.wake.acquire()
            assert self.job is not None
            (world, rank), self.job = self.job, None
            with serial():  # one rank runs at a time, as on a core of its own
                world.main(rank)
            del world  # an idle thread keeps no tensors alive


_idle: list[_Worker] = []
_hiring = threading.Lock()
os.register_at_fork(after_in_child=_idle.clear)


def _hire(count: int) -> list[_Worker]:
    """``count`` workers that nobody else has."""
    with _hiring:
        return [_idle.pop() if _idle else _Worker() for _ in range(count)]
