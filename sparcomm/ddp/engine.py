"""The hook at work: one rank's transport, worker, units and step, from start to failure or close."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from sparcomm.algorithms.base import Algorithm
from sparcomm.clock import PHASES
from sparcomm.ddp import agreement
from sparcomm.ddp.board import Board
from sparcomm.ddp.delivery import Delivery
from sparcomm.ddp.lane import Lane, lane_for
from sparcomm.ddp.step import Step
from sparcomm.ddp.units import Carried, Partition
from sparcomm.ddp.worker import Inline, Worker
from sparcomm.dtypes import check_gradient
from sparcomm.errors import GradientError, HookError
from sparcomm.kernels import warm_up
from sparcomm.transport.torchdist import TorchTransport

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket


class Engine:
    """Reduces buckets in the order in which they come. Made on all ranks together.

    Args:
        group: DDP's process group; the engine talks over a new one of its own.
        parameters: those to be reduced, as far as known; compared between ranks.
        timeout: seconds after which a wait for another rank is an error.

    Attributes:
        completed: synchronised steps that have ended, skipped ones included.
        failure: what ``raise_if_failed`` raises; once set, every further bucket fails.
        partition: the units whose state is committed.
        carried: state that has no unit yet: loaded from a checkpoint taken before the units were final.

    Raises:
        ConfigMismatch: ranks have different configurations.
        PeerError, RemoteError: a rank did not come, or failed.
    """

    def __init__(
        self, algorithm: Algorithm, group: dist.ProcessGroup, parameters: Sequence[Tensor], timeout: float
    ) -> None:
        self.algorithm, self.rank, self.size = algorithm, dist.get_rank(group), dist.get_world_size(group)
        self.completed, self._skipped = 0, 0
        self.failure: BaseException | None = None
        self.partition, self.carried = Partition(), Carried()
        self._retired: dict[str, float] = dict.fromkeys(PHASES, 0.0)  # seconds of units that are gone
        if not parameters or any(p.device.type == "cpu" for p in parameters):
            warm_up()  # before anyone waits for anyone: compiling may take longer than a short timeout
        self._board = Board(group, timeout)
        try:
            mine = agreement.configuration(algorithm, self.size, parameters)
            agreement.compare(self._board.exchange("configuration", mine))
            device = parameters[0].device if parameters else None
            self.transport = TorchTransport.from_group(group, device=device, timeout=timeout)
        except Exception as error:  # noqa: BLE001
            raise error if isinstance(error, agreement.AGREED) else self._board.report(error) from None
        self._on_nccl = "cuda:nccl" in dist.get_backend_config(group)
        self._on_host = True
        self._executor: Worker | Inline = Worker(f"sparcomm-{self.rank}")
        self._lanes: dict[object, Lane] = {}
        self._step: Step | None = None
        self._open: list[Delivery] = []
        self._building: Partition | None = None
        self._source = Carried()
        self._unverified, self._verified, self._origin = True, 0, "none yet"
        # Reentrant: the garbage collector may end this very hook while it is failing.
        self._failing = threading.RLock()
        self._closed = False
        _alive.add(self)

    # ---- buckets (called by DDP, in the same order on all ranks) -------------------------------------------------

    def reduce_bucket(self, bucket: GradBucket) -> Future[Tensor]:
        """Takes a bucket in and returns the future of its mean. Never raises."""
        buffer = bucket.buffer()
        if not self._lanes and self._on_nccl and buffer.is_cuda:
            self._on_host, self._executor = False, Inline()
        if buffer.device not in self._lanes:
            self._lanes[buffer.device] = lane_for(buffer.device)
        lane = self._lanes[buffer.device]
        delivery = Delivery(buffer, lane.future())
        if bucket.index() == 0:
            self._end_step()
        self._open.append(delivery)
        try:
            if self.failure is None:
                if bucket.index() == 0:
                    self._begin_step()
                self._accept(bucket, buffer, delivery, lane)
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

    def _begin_step(self) -> None:
        if self._unverified:
            self._verified += 1
            here = {"step": str(self.completed), "units": self._origin}
            agreement.compare_standing(self._board.exchange(f"step, check {self._verified}", here))
            self._unverified = False
        if not self.partition.final:
            self._building = Partition(final=bool(self.partition.units))
            self._source = self.committed()
        partition = self._building or self.partition
        self._step = Step(self.completed, partition, self.algorithm, self.transport, self._on_host)

    def _accept(self, bucket: GradBucket, buffer: Tensor, delivery: Delivery, lane: Lane) -> None:
        step, params, last = self._step, bucket.parameters(), bucket.is_last()
        if step is None:
            raise HookError(f"bucket {bucket.index()} came before bucket 0")
        _check_bucket(buffer, params)
        with lane.enter(lane.ready(buffer)):
            if self._building is not None:
                self._building.add(params, buffer.dtype, buffer.device, self.algorithm, self.size, self._source)
            complete = step.place(params, buffer, delivery)
        if last:
            step.check_complete()
            delivery.expect(1)  # the last bucket goes back behind the commit, so that backward() ends behind it too
            self._adopt()
            self._step = None
        for unit in complete:
            self._submit(lane, buffer, lambda unit=unit: step.reduce(unit))
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
            self._retired = self.seconds()
            self.partition, self._building = self._building, None
            self.carried = self._source = Carried()

    def _commit(self, step: Step, delivery: Delivery) -> None:
        with ExitStack() as lanes:  # units may lie on several devices
            for lane in self._lanes.values():
                lanes.enter_context(lane.enter(None))
            skipped = (~step.commit()).long()
        self._skipped = self._skipped + (int(skipped) if self._on_host else skipped)
        self.completed += 1
        delivery.arrive()
        self._open.clear()  # they hold DDP's buckets, the first of which DDP replaces after its first step

    def _submit(self, lane: Lane, buffer: Tensor, job: Callable[[], None]) -> None:
        ready = lane.ready(buffer)

        def guarded() -> None:
            if self.failure is not None:
                return
            try:
                with lane.enter(ready):
                    job()
            except BaseException as error:  # noqa: BLE001  whatever it is, all ranks have to hear of it
                self.fail(error)

        self._executor.submit(guarded)

    # ---- state (between steps) -----------------------------------------------------------------------------------

    def drain(self) -> None:
        """Returns when all jobs have run; the caller's streams then wait for the side streams."""
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
        self._retired = self.seconds()
        self.partition, self.carried, self.completed = partition, carried, completed
        self._unverified, self._origin = True, origin

    def seconds(self) -> dict[str, float]:
        """Host seconds by phase, of all units so far."""
        total = dict(self._retired)
        for unit in self.partition.units:
            for phase, seconds in unit.state.clock.seconds.items():
                total[phase] = total.get(phase, 0.0) + seconds
        return total

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

    def damaged(self) -> bool:
        """Whether bytes that arrived on a device were not what was sent. Waits for the device."""
        flags = (unit.state.damage for unit in self.partition.units)
        return any(bool(flag.any()) for flag in flags if flag is not None)

    def _fail_open(self, text: str) -> None:
        for delivery in list(self._open):
            delivery.fail(text)
        self._open.clear()

    def close(self) -> None:
        """Ends the worker and the process group. Idempotent; a step under way fails on all ranks."""
        if self._closed:
            return
        self._closed = True
        if not all(delivery.done for delivery in self._open):
            self.fail(HookError("the hook was closed while a step was under way"))
        elif self.failure is None:
            self.failure = HookError("the hook is closed")
        self._executor.stop()
        self.transport.close()


def _check_bucket(buffer: Tensor, params: Sequence[Tensor]) -> None:
    """Raises GradientError unless the bucket is one flat float vector of its parameters' gradients.

    DDP hands a complex gradient over as a real vector of twice the length.
    """
    for p in params:
        if p.is_complex():
            raise GradientError(
                f"gradient has dtype {p.dtype}, and only real ones can be compressed: keep the parameter as a real "
                "tensor with a last dimension of 2, and use torch.view_as_complex on it in forward()"
            )
    check_gradient(buffer)
    if buffer.numel() != sum(p.numel() for p in params):
        raise GradientError(
            f"a bucket of {buffer.numel()} elements does not match its parameters of {[p.shape for p in params]}"
        )


_alive: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Runs before the transports' own exit handler, since that was registered earlier: it wakes no waiting worker."""
    for engine in list(_alive):
        engine.close()
