"""The hook at work: one rank's transport, worker, units and step, from start to failure or close."""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from sparcomm.algorithms.base import Algorithm
from sparcomm.clock import Range, added
from sparcomm.ddp import agreement, log
from sparcomm.ddp.board import Board, ending
from sparcomm.ddp.clip import NormBound
from sparcomm.ddp.cutter import Cutter
from sparcomm.ddp.delivery import Delivery, check_bucket
from sparcomm.ddp.join import Use, has_joined
from sparcomm.ddp.lane import Lane, lane_for
from sparcomm.ddp.monitor import Monitor
from sparcomm.ddp.numbers import gather_numbers
from sparcomm.ddp.options import Options
from sparcomm.ddp.planner import Planner
from sparcomm.ddp.reduction import Reducer
from sparcomm.ddp.rollcall import Standing, standing_of
from sparcomm.ddp.sparse_layout import check_sparse
from sparcomm.ddp.step import Step
from sparcomm.ddp.units import Carried, Partition
from sparcomm.ddp.worker import Inline, Worker
from sparcomm.errors import ConfigError, DamagedBag, HookError
from sparcomm.kernels import prepare
from sparcomm.transport.torchdist.choice import choose

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

T = TypeVar("T")
Seconds = dict[str, float]  # by phase


class Engine:
    """Reduces buckets in the order in which they come. Made on all ranks together.

    Args:
        group: DDP's process group; the engine talks over a new one of its own.
        parameters: those to be reduced, as far as known; compared between ranks.
        timeout: seconds after which a wait for another rank is an error.
        options: how the algorithm is fed.
        skipped: ids of the parameters that always travel dense.
        sparse: names of those whose gradients are of sparse layout.

    Attributes:
        completed: synchronised steps that have ended, skipped ones included.
        failure: what ``raise_if_failed`` raises; once set, every further bucket fails.
        partition: the units whose state is committed.
        carried: state that has no unit yet: loaded from a checkpoint taken before the units were final.

    Raises:
        ConfigError: the algorithm cannot run over so many ranks.
        ConfigMismatch: ranks have different configurations.
        PeerError, RemoteError: a rank did not come, or failed.
    """

    def __init__(
        self, algorithm: Algorithm, group: dist.ProcessGroup, parameters: Sequence[Tensor], timeout: float,
        options: Options, skipped: set[int], sparse: Sequence[str],
    ) -> None:  # fmt: skip
        self.algorithm, self.rank, self.size = algorithm, dist.get_rank(group), dist.get_world_size(group)
        self.completed, self._skipped = 0, 0
        self.failure: BaseException | None = None
        self._parameters = list(parameters)
        self._retired: Seconds = {}  # of units that are gone
        # Before anyone waits for anyone: compiling may take longer than a short timeout.
        prepare({p.device for p in parameters} or {torch.device("cpu")})
        self._open: list[Delivery] = []
        self._rested: float | None = None  # when the last step ended; None = not at work yet, or the device is
        self._closed, self._process = False, os.getpid()
        self._board = Board(group, timeout, standing_of(self))
        try:
            device = parameters[0].device if parameters else None
            choice = choose(options.transport, group, device)
            mine = agreement.configuration(algorithm, self.size, parameters, skipped, sparse) | options.describe()
            mine |= choice.describe()
            agreement.compare(self._board.exchange("configuration", mine))
            algorithm.check_size(self.size)
            agreement.check_backend(algorithm, choice.backends, {p.device for p in parameters})
            self.transport = choice.make(self._board.wait, self._board.token)
        except Exception as error:  # noqa: BLE001
            # What does not fit the agreed number of ranks, too, every rank finds by itself.
            found = isinstance(error, (*agreement.AGREED, ConfigError))
            shown = error if found else self._board.report(error)
            self._board.close()
            raise shown from None
        self.log = log.get_logger(self.rank, self.size)
        self.monitor = None if options.check is None else Monitor(options.check, self.transport, self.log)
        self.reducer = Reducer(options, self.transport, self.monitor, sum(p.numel() for p in parameters))
        self.norms = NormBound(self.reducer)
        self.planner = Planner(algorithm, options, self.log, self._limit_crossed)
        self.cutter = Cutter(algorithm, self.size, options, self.reducer.storage, skipped)
        self.partition, self.carried = self.cutter.partition(), Carried()
        self._on_nccl = "cuda:nccl" in choice.backends
        self._on_host = True
        self._executor: Worker | Inline = Worker(f"sparcomm-{self.rank}")
        self._lanes: dict[object, Lane] = {}
        self._step: Step | None = None
        self._building: Partition | None = None
        self._source = Carried()
        self._unverified, self._verified, self._origin = True, 0, "none yet"
        # Reentrant: the garbage collector may end this very hook while it is failing.
        self._failing = threading.RLock()
        self._rested = time.monotonic()
        _alive.add(self)
        log.started(self.log, algorithm, parameters)

    # ---- buckets (called by DDP, in the same order on all ranks) -------------------------------------------------

    def reduce_bucket(self, bucket: GradBucket, ddp: nn.Module | None, use: Use) -> Future[Tensor]:
        """Takes a bucket of ``ddp`` in and returns the future of its mean. Never raises."""
        buffer = bucket.buffer()
        if not self._lanes and self._on_nccl and buffer.is_cuda:
            self._on_host, self._executor, self._rested = False, Inline(), None
        if buffer.device not in self._lanes:
            self._lanes[buffer.device] = lane_for(buffer.device)
        lane = self._lanes[buffer.device]
        delivery = Delivery(buffer, lane.future())
        first, last = use.place.of(bucket)
        if first:
            self._end_step()
        self._open.append(delivery)
        try:
            with Range(f"bucket {bucket.index()}"):
                if self.failure is None:
                    if first:
                        self._begin_step(has_joined(ddp))
                    self._accept(bucket, last, delivery, lane, use.of(bucket.parameters(), last))
        except Exception as error:  # noqa: BLE001  raising here would leave DDP's reducer unusable for good
            # Behind the jobs for which peers still need this rank. A copy of the name: Python unbinds ``error``.
            self._executor.submit(lambda error=error: self.fail(error, agreed=isinstance(error, agreement.AGREED)))
        if self.failure is not None:
            delivery.fail(self.failure_text(self.failure))
        return delivery.future

    def _end_step(self) -> None:
        """Waits for the jobs of the step before, and drops what a backward pass that was cut short has left of it."""
        self.drain()
        if self._step is not None:
            self._step.drop()
        self._fail_open("sparcomm.HookError: the step was abandoned: the next one began before its last bucket came")
        self._step = self._building = None

    def _begin_step(self, joined: bool) -> None:
        if self._unverified:
            self._verified += 1
            here = {"step": str(self.completed), "units": self._origin}
            agreement.compare_standing(self._board.exchange(f"step, check {self._verified}", here))
            self._unverified = False
        if not self.partition.final:
            self._building = self.cutter.partition(final=bool(self.partition.units))
            self._source = self.committed()
        partition = self._building or self.partition
        plan = self.planner.next(
            self.completed, self._parameters, self._gather, joined=joined, settled=self._building is None
        )
        if self.monitor is not None:
            watched = plan.mode == "sparse" and self._building is None
            self.monitor.begin(self.completed, [u for u in partition.units if not u.skipped] if watched else [])
        self._step = Step(self.completed, partition, self.reducer, plan, self._on_host)

    def _accept(
        self, bucket: GradBucket, last: bool, delivery: Delivery, lane: Lane, used: dict[int, bool] | None
    ) -> None:
        step, params, buffer = self._step, bucket.parameters(), delivery.buffer
        if step is None:
            raise HookError(f"bucket {bucket.index()} came before bucket 0")
        if buffer.layout != torch.strided:
            corrects = self.reducer.options.correction is not None
            check_sparse(buffer, params, corrects=corrects, on_nccl=not self._on_host)
            jobs = [step.place_rows(buffer, delivery)]
        else:
            check_bucket(buffer, params)
            with lane.enter(lane.ready(buffer)):
                if self._building is not None:
                    self.cutter.add_bucket(self._building, params, buffer.dtype, buffer.device, self._source)
                jobs = [partial(step.reduce, unit) for unit in step.place(params, buffer, delivery, used)]
        if last:
            step.check_complete()
            delivery.expect(1)  # the last bucket goes back behind the commit, so that backward() ends behind it too
            self._adopt()
            self._step = None
        for job in jobs:
            self._submit(lane, buffer, job)
        if last:
            self._submit(lane, buffer, lambda: self._commit(step, delivery))

    def _adopt(self) -> None:
        """The partition made in this step has taken over all that was committed: it becomes the partition."""
        if self._building is not None:
            lost = (self.partition.known | self._source.residual.keys()) - self._building.known
            if lost:
                raise HookError(
                    f"{len(lost)} parameters that were reduced before are in no bucket of step {self.completed}: one "
                    "HookState serves one DDP module, whose parameters stay the same"
                )
            self._retired = self._seconds_of_units()
            self.partition, self._building = self._building, None
            self.carried = self._source = Carried()
            if self.partition.final:
                log.units_made(self.log, self.completed, self.partition.units)

    def _commit(self, step: Step, delivery: Delivery) -> None:
        with Range("commit"), ExitStack() as lanes:  # units may lie on several devices
            for lane in self._lanes.values():
                lanes.enter_context(lane.enter(None))
            self.norms.after_step(self.completed)
            good = step.commit()
            if step.plan.mode == "flush":
                self.planner.flushed = bool(good)
            if self.monitor is not None:
                self.monitor.commit(good)
            skipped = (~good).long()
        self._skipped = self._skipped + (int(skipped) if self._on_host else skipped)
        self.completed += 1
        log.committed(self.log, self.completed, self.partition.units)
        self._rested = time.monotonic() if self._on_host else None
        delivery.arrive()
        self._open.clear()  # they hold DDP's buckets, the first of which DDP replaces after its first step

    def _submit(self, lane: Lane, buffer: Tensor, job: Callable[[], None]) -> None:
        ready, number = lane.ready(buffer), self.completed

        def guarded() -> None:
            if self.failure is not None:
                return
            try:
                with Range(f"step {number}"), lane.enter(ready):
                    job()
            except BaseException as error:  # noqa: BLE001  whatever it is, all ranks have to hear of it
                self.fail(error)

        self._executor.submit(guarded)

    def _limit_crossed(self, number: int) -> bool:
        return self.monitor is not None and self.monitor.wants_flush(number)

    # ---- between steps -------------------------------------------------------------------------------------------

    def call(self, job: Callable[[], T]) -> T:
        """Runs a job that talks to the other ranks, behind all others, and waits for it. An error ends the hook.

        Raises:
            HookError: the hook has failed before, or has been closed. Or what the job raised.
        """
        results: list[T] = []

        def guarded() -> None:
            if self.failure is None:
                try:
                    with ExitStack() as lanes:
                        for lane in self._lanes.values():
                            lanes.enter_context(lane.enter(lane.ready_now()))
                        results.append(job())
                except BaseException as error:  # noqa: BLE001  whatever it is, all ranks have to hear of it
                    self.fail(error)

        self._executor.submit(guarded)
        self.drain()
        if not results:
            raise self.failure or HookError("the hook is closed")
        return results[0]

    def agree(self, topic: str, value: Any) -> list[Any]:
        """All ranks' values, through the store: also finds out, without harm, that a rank does not take part.

        Raises:
            PeerError, RemoteError: a rank did not come in time, or failed. The hook has then ended.
        """
        self.drain()
        if self.failure is not None:
            raise self.failure
        try:
            return self._board.exchange(topic, value)
        except Exception as error:
            self.fail(error)
            raise

    def _gather(self, mine: list[float]) -> Tensor:
        device = next((unit.device for unit in self.partition.units), torch.device("cpu"))
        if device.type == "cpu" and self._parameters:
            device = self._parameters[0].device
        return self.call(lambda: gather_numbers(self.transport, mine, device)).cpu()

    def drain(self) -> None:
        """Returns when all jobs have run; the caller's streams then wait for the side streams."""
        with Range("wait"):
            self._executor.drain()
        for lane in self._lanes.values():
            lane.join()

    def committed(self) -> Carried:
        """What is committed, by parameter; views."""
        return self.partition.carry() if self.partition.units else self.carried

    def replace(self, partition: Partition, carried: Carried, completed: int, origin: str) -> None:
        """Starts over from loaded state; before the next step, ranks compare ``completed`` and ``origin``.

        ``origin`` stands for the units: if ranks cut their gradients differently, Gloo aborts the process.
        """
        self._retired = self._seconds_of_units()
        self.partition, self.carried, self.completed = partition, carried, completed
        self._unverified, self._origin = True, origin

    def seconds(self) -> Seconds:
        """Host seconds by phase, of all units and gradients of sparse layout so far."""
        return added([self._seconds_of_units(), self.reducer.clock.seconds])

    def _seconds_of_units(self) -> Seconds:
        return added([self._retired, *(unit.state.clock.seconds for unit in self.partition.units)])

    @property
    def skipped(self) -> int:
        """Steps that were not committed because something was not finite. Waits for the device."""
        return int(self._skipped)

    # ---- the end -------------------------------------------------------------------------------------------------

    def fail(self, error: BaseException, *, agreed: bool = False) -> None:
        """Ends this hook: tells the other ranks, wakes them, and fails every bucket that is under way.

        With ``agreed`` all ranks have found the same error by themselves, and none is the first.
        """
        with self._failing:
            if self.failure is None:
                shown = error if agreed else self._board.report(error)
                # After the report, so that a peer whose wait now fails finds it.
                self.transport.abort(f"{type(error).__name__}: {error}")
                self.failure = shown
        self._fail_open(self.failure_text(self.failure))

    def failure_text(self, error: BaseException) -> str:
        """What ``backward()`` says; it says it as a plain RuntimeError, so the types are in the text."""
        return f"sparcomm.HookError: step {self.completed} on rank {self.rank}: {type(error).__name__}: {error}"

    def raise_if_failed(self, waits: bool = True) -> None:
        """Raises what has ended this hook; if it ``waits`` for the device, DamagedBag for bytes found damaged there."""
        if self.failure is not None:
            raise self.failure
        flags = [unit.state.damage for unit in self.partition.units] if waits else []
        if any(bool(flag.any()) for flag in flags if flag is not None):
            raise DamagedBag("a message that arrived was not what was sent; nothing was committed since")

    def blame(self) -> str:
        """Which ranks are missing or late, and why, as far as they tell; "" if they do not."""
        return self._board.blame()

    def _fail_open(self, text: str) -> None:
        for delivery in list(self._open):
            delivery.fail(text)
        self._open.clear()

    def standing(self) -> Standing:
        """Where this rank stands, for the messages of others. Any thread may ask."""
        if self._rested is None or self._open or self.failure is not None or self._board.meeting or self._executor.busy:
            return Standing(self.completed)
        return Standing(self.completed, busy=False, seconds=time.monotonic() - self._rested)

    def close(self, why: str = "it closed its hook") -> None:
        """Ends the worker and the process group. Idempotent; a step under way fails on all ranks.

        ``why`` is what the other ranks will say of this one if they go on.
        """
        if self._closed or os.getpid() != self._process:
            return  # (a fork, as of a data loader, has none of the threads, and does not speak for the rank)
        self._closed, left = True, None
        if not all(delivery.done for delivery in self._open):
            self.fail(HookError(f"the hook was closed while a step was under way: {why}"))
        elif self.failure is None:
            self.failure = HookError("the hook is closed")
            left = Standing(self.completed, left=f"{why} after {self.completed} steps")
        self._board.close(left)  # before the connections go: who then misses this rank finds the reason
        self._executor.stop()
        self.transport.close()


_alive: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Runs before the transports' own exit handler, since that was registered earlier: it wakes no waiting worker."""
    for engine in list(_alive):
        engine.close(ending())
