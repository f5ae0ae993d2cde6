"""The hook's state: what a user holds, asks and saves."""

from __future__ import annotations

import datetime as dt
import functools
import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.optim import Optimizer

from sparcomm.algorithms.base import Algorithm
from sparcomm.ddp import checkpoint
from sparcomm.ddp.advice import warn_if_unsuited
from sparcomm.ddp.binding import Binding
from sparcomm.ddp.checkpoint import StateDict
from sparcomm.ddp.clip import PutBack, check_limit, clip_
from sparcomm.ddp.delivery import Delivery
from sparcomm.ddp.engine import Engine
from sparcomm.ddp.flush import add_to_gradients, deliver, settle
from sparcomm.ddp.join import Use
from sparcomm.ddp.monitor import Check
from sparcomm.ddp.options import Options
from sparcomm.ddp.schedule import Schedule
from sparcomm.ddp.skip import Rule
from sparcomm.ddp.stats import hook_stats
from sparcomm.ddp.units import Carried
from sparcomm.ddp.watch import Watch
from sparcomm.errors import ConfigError, NotInitializedError
from sparcomm.feedback import Memory
from sparcomm.transport.base import Traffic
from sparcomm.transport.limits import as_timedelta

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

_log = logging.getLogger("sparcomm")


class HookState:
    """Everything one DDP module's hook remembers: ``ddp.register_comm_hook(HookState(algorithm, ddp), sparcomm.hook)``.

    Starting is collective: it makes a process group and compares configurations. ``attach`` does it; otherwise the
    first bucket does. One state serves one DDP module.

    Args:
        algorithm: how gradients are reduced.
        module: the DDP module, or the module inside it; gives parameters their names. ``bind`` can do it later.
        process_group: of the DDP module; default: the bound DDP module's, else the default group.
        timeout: seconds (or a timedelta) after which waiting for another rank is an error.
        scaler, optimizer, and so on to transport: see ``attach``.

    Raises:
        ConfigError: not an Algorithm, a timeout that is no time, or an option outside what is allowed.

    Warns:
        UserWarning: an algorithm, and an optimizer that it does not go well with.
    """

    def __init__(
        self, algorithm: Algorithm, module: nn.Module | None = None, *,
        process_group: dist.ProcessGroup | None = None, scaler: Any = None, optimizer: Optimizer | None = None,
        memory: Memory | None = None, warmup: int | Schedule | Callable[[int], float | None] = 0,
        skip: Rule | Sequence[Rule] = (), storage: str = "float32", local_clip: float | None = None,
        lr_aware: bool | float = False, auto_off: bool = False, check: Check | None = None, transport: str = "auto",
        timeout: dt.timedelta | float = 300.0,
    ) -> None:  # fmt: skip
        if not isinstance(algorithm, Algorithm):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"algorithm={algorithm!r}: must be an instance, such as sparcomm.SparDL(density=0.01)")
        self.algorithm = algorithm
        self.options = Options.make(
            scaler=scaler, optimizer=optimizer, memory=memory, warmup=warmup, skip=skip, storage=storage,
            local_clip=local_clip, lr_aware=lr_aware, auto_off=auto_off, check=check, transport=transport,
        )  # fmt: skip
        self.options.check_fits(algorithm)
        warn_if_unsuited(algorithm, self.options)
        self.timeout = as_timedelta(timeout).total_seconds()
        self._module = Binding(self.options.skip, process_group)
        self._engine: Engine | None = None
        self._start_error: BaseException | None = None
        self._loaded: StateDict | Sequence[StateDict] | None = None
        self._called = False
        self._watch: Watch | None = None
        self._use = Use(None, ())
        self._calls = 0  # of clip_grad_norm_ and flush, which must meet on all ranks
        self.is_copy = False
        if module is not None:
            self.bind(module)

    # ---- before the first step -----------------------------------------------------------------------------------

    def bind(self, module: nn.Module) -> None:
        """Takes the names of the parameters from ``module``, a DDP module or the one inside it. Raises ConfigError."""
        self._module.bind(module)
        params, skipped = self._module.params.values(), self._module.skipped
        self.options.check_parameters(p for p in params if id(p) not in skipped)

    @property
    def bound(self) -> bool:
        """Whether parameters have names."""
        return bool(self._module.params)

    def start(self) -> None:
        """Makes the process group of the hook and compares configurations. Collective; later calls do nothing.

        Raises:
            NotInitializedError: ``torch.distributed`` has not been initialised.
            ConfigMismatch: ranks have different algorithms, settings, releases or parameters.
            PeerError, RemoteError: a rank did not come in time, or failed.
        """
        if self._start_error is not None:
            raise self._start_error
        if self._engine is not None:
            return
        group = self._module.group()
        if self.options.skip:
            self._module.need("skip")
        if self.options.local_clip is not None:
            self._module.need("local_clip")
        try:
            own, params = self._module, list(self._module.params.values())
            self._engine = Engine(self.algorithm, group, params, self.timeout, self.options, own.skipped, own.sparse)
            self._use = Use(self._module.ddp, params)
            weakref.finalize(self, self._engine.close).atexit = False  # the engine itself sees to that
            if self._loaded is not None:
                self._install(self._loaded)
        except Exception as error:
            self._start_error = error
            if self._engine is not None:
                self._engine.fail(error)  # the other ranks must not wait for this one
            raise

    # ---- at work -------------------------------------------------------------------------------------------------

    def reduce_bucket(self, bucket: GradBucket) -> Future[Tensor]:
        """What ``sparcomm.hook`` calls; see there."""
        self._called = True
        if self._engine is None and self._start_error is None:
            try:
                self.start()
            except Exception as error:  # noqa: BLE001  DDP cannot go on after a hook that raised
                self._start_error = error
        if self._engine is not None and self._start_error is None:
            return self._engine.reduce_bucket(bucket, self._module.ddp, self._use)
        delivery = Delivery(bucket.buffer(), Future())
        delivery.fail(f"sparcomm.HookError: at start: {type(self._start_error).__name__}: {self._start_error}")
        return delivery.future

    def raise_if_failed(self) -> None:
        """Raises what has ended this hook, if anything has: the original exception on the rank that failed first.

        Where gradients stay on a device (NCCL), it waits for that device.

        Raises:
            RemoteError: on all other ranks.
            DamagedBag: bytes that arrived on a device were not what was sent.
        """
        if self._start_error is not None:
            raise self._start_error
        if self._engine is not None:
            self._engine.raise_if_failed()

    def blame(self) -> str:
        """Which ranks do not answer, left or are late, for errors of DDP's own operations; "" if unknown. Takes 1 s."""
        return "" if self._engine is None else self._engine.blame()

    def clip_grad_norm_(self, max_norm: float, *, defer: bool = False, error_if_nonfinite: bool = False) -> Tensor:
        """Clips the gradients by the norm that a dense mean would have had, not by that of the compressed mean.

        To be called on all ranks between ``backward()`` (with a GradScaler: ``scaler.unscale_(optimizer)``) and
        ``optimizer.step()``, instead of ``torch.nn.utils.clip_grad_norm_``. The norm is not known exactly; taken is
        a bound, the mean over ranks of their local gradients' Euclidean norms. The first call is collective.

        Args:
            max_norm: the limit.
            defer: what is cut off goes back to the residuals and is sent later, so that the sum is kept; else it is
                dropped, as by a dense run's clipping.
            error_if_nonfinite: raise if the norm is not finite; else gradients are then left as they are.

        Returns:
            () the bound.

        Raises:
            ConfigError: a limit that is no positive number.
            NotInitializedError: no module bound, or no step has run yet.
            RuntimeError: the norm is not finite, and ``error_if_nonfinite``.
            PeerError: (first call) a rank does not call it, too.
        """
        limit = check_limit(max_norm)
        self._module.need("clip_grad_norm_()")
        engine = self._started()
        engine.drain()
        engine.raise_if_failed(waits=False)
        bound = engine.norms.ask(self._meet(f"clip_grad_norm_ after step {engine.completed}"))
        if error_if_nonfinite and bound is not None and not bool(torch.isfinite(bound)):
            raise RuntimeError(f"the total norm of the gradients is not finite: {float(bound)}")
        back = PutBack(engine.partition, engine.reducer, engine.completed) if defer else None
        norm = clip_(self._module.params.values(), bound, limit, back)
        if back is not None:
            back.close()
        return norm

    def flush(self) -> None:
        """Adds the mean of what all ranks owe to ``.grad``, densely; after that nothing is owed. Collective.

        Call it before ``optimizer.step()``: of the last steps before an evaluation, and at the end. Gradients are
        made where there are none. With a GradScaler, call it before ``unscale_`` or ``step``: what is added carries
        the scale. Velocities of momentum correction stay.

        Raises:
            NotInitializedError: the hook has not started.
            PeerError: a rank does not call it, too; the hook has then ended.
        """
        engine = self._started()
        engine.drain()
        self.raise_if_failed()
        self._meet(f"flush after step {engine.completed}")(None)
        number, reducer = engine.completed, engine.reducer
        units = [unit for unit in engine.partition.units if not unit.skipped]
        means = engine.call(lambda: [deliver(unit, reducer, number) for unit in units])
        settle(units, means)
        scaler = self.options.scaler
        scale = None if scaler is None or not scaler.is_enabled() else scaler._scale  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        for unit, mean in zip(units, means, strict=True):
            if mean is not None:
                add_to_gradients(unit, mean, scale)

    def was_dense(self, parameter: Tensor) -> bool:
        """Whether the last step's mean of this parameter was exactly that of the gradients: whole, and no residuals.

        For optimizers that estimate moments: only such means say how large gradients are. False before the first step,
        and after one that was skipped.
        """
        unit = None if self._engine is None else self._engine.partition.unit_of(parameter)
        return unit is not None and unit.plain

    def _meet(self, what: str) -> Callable[[Any], list[Any]]:
        """An exchange of values through the store, under a name that no other call has."""
        self._calls += 1
        return functools.partial(self._started().agree, f"{what}, call {self._calls}")

    def close(self) -> None:
        """Ends the worker thread and the hook's process group. Idempotent; a step under way fails on all ranks."""
        if self._watch is not None:
            self._watch.stop()
        self._use.stop()
        if self._engine is not None:
            self._engine.close()

    # ---- what it knows -------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This rank's number in the group; 0 before the start."""
        return 0 if self._engine is None else self._engine.rank

    @property
    def step(self) -> int:
        """Synchronised steps that have ended, skipped ones included."""
        return 0 if self._engine is None else self._engine.completed

    @property
    def traffic(self) -> Traffic:
        """This rank's counters so far; live, and free to read at every step."""
        return Traffic() if self._engine is None else self._engine.transport.traffic

    def stats(self) -> dict[str, Any]:
        """What the hook has cost on this rank and what it owes. Waits for running jobs, and for the device.

        Returns:
            ``rank``, ``size``; ``steps``, ``skipped`` (not finite somewhere); ``bytes_sent``, ``bytes_received``,
            ``rounds``, ``messages`` so far; ``kept``: entries per step; ``seconds`` by phase so far; ``residual_norm``:
            Euclidean; ``memory_bytes``: residuals and the like, both buffers; ``check``: what a ``Check`` has seen;
            ``per_unit``: a list of the same by unit, with ``names`` and ``numel``; ``per_parameter``:
            ``{name: {numel, residual_norm, memory_bytes}}``.
        """
        return hook_stats(self._engine, self._module.label)

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """What this rank must save beside model and optimizer; every rank's is different. Waits for running jobs.

        One key, which names the rank; plain containers, and tensors (copies, in host memory) of what is committed.
        Loads with ``torch.load(..., weights_only=True)``, and goes through ``torch.distributed.checkpoint`` as it is.
        See docs/checkpoints.md.

        Raises:
            NotInitializedError: not bound to a module, or not started (no process group yet).
        """
        self._module.need("state_dict()")
        engine = self._started()
        engine.drain()
        final = engine.partition.final
        name = self._module.check_name
        units = [[name(p) for p in unit.params] for unit in engine.partition.units] if final else None
        return checkpoint.pack(
            self.algorithm, engine.committed(), self._module.names, self._module.params, units,
            engine.completed, engine.rank, engine.size, first=min(dist.get_process_group_ranks(self._module.group())),
            decisions=engine.planner.decisions | checkpoint.velocity_of(self.options.correction),
        )  # fmt: skip

    def load_state_dict(self, state_dict: StateDict | Sequence[StateDict]) -> None:
        """Takes up where a checkpoint left off.

        After the same world size and a checkpoint of step 2 or later, training goes on bit for bit as if it had never
        stopped. An earlier checkpoint was taken before DDP's buckets were final: nothing owed is lost, but the bits
        differ. Ranks compare the step at their next one.

        Args:
            state_dict: this rank's own, or the list of all ranks' at any world size (``load_distributed`` reads it
                from a distributed checkpoint): new rank i of q takes the sum of what old ranks i, i+q, i+2q, ... owed.

        Raises:
            NotInitializedError: not bound to a module.
            CheckpointError: not of this algorithm, these parameters or this rank; the message names what differs.
        """
        self._module.need("load_state_dict()")
        checkpoint.check_fits(state_dict, self.algorithm, self._module.params)
        if self._engine is None and not dist.is_initialized():
            self._loaded = state_dict  # rank and size are not known before there is a group
        else:
            self.start()
            self._install(state_dict)

    def _install(self, state_dict: StateDict | Sequence[StateDict]) -> None:
        engine = self._started()
        first, mine = checkpoint.choose(state_dict, engine.rank, engine.size)
        engine.drain()
        carried = checkpoint.unpack(first, mine, self._module.params, self.options.correction, engine.size)
        partition = engine.cutter.partition(final=first["units"] is not None)
        if first["units"] is not None:
            for names in first["units"]:
                params = [self._module.params[name] for name in names]
                engine.cutter.add_bucket(partition, params, params[0].dtype, params[0].device, carried)
            carried = Carried()
        elif first["step"]:
            _log.warning(
                "hook state of step %d was saved before DDP's buckets were final (step 2): what is owed is kept, but "
                "the run will not be bit-identical to an uninterrupted one", first["step"],
            )  # fmt: skip
        engine.planner.restore(first["decisions"])
        engine.replace(partition, carried, first["step"], checkpoint.origin(first))
        self._loaded = None

    def _started(self) -> Engine:
        if self._engine is None:
            raise NotInitializedError("the hook has not started: use sparcomm.attach(), state.start(), or run a step")
        return self._engine

    # ---- copies --------------------------------------------------------------------------------------------------

    def watch(self, params: Iterable[Tensor], remedy: str) -> None:
        """Warns after the first synchronised backward pass through ``params`` if no bucket has come here by then."""

        def synchronised() -> bool:
            return getattr(self._module.ddp, "require_backward_grad_sync", True)

        self._watch = Watch(params, lambda: self._called, synchronised, remedy)

    def __deepcopy__(self, memo: dict[int, Any]) -> HookState:
        """A state that was never started: DDP copies its hook's state along, but the copy calls no hook."""
        copied = _unstarted(self.algorithm, self.timeout, self.options.without_objects())
        copied.is_copy = True
        memo[id(self)] = copied
        copied._module.follow(memo.get(id(self._module.ddp)))  # noqa: SLF001
        params = [memo[id(p)] for p in self._module.params.values() if id(p) in memo]
        copied.watch(params, "a deep copy of a DDP module has no hook, call sparcomm.attach() on the copy")
        return copied

    def __reduce__(self) -> Any:
        """Pickles the settings only, and says so: what is owed is different on every rank."""
        warnings.warn(
            "a pickled HookState keeps its settings, but not what each rank still owes: save state.state_dict()",
            stacklevel=2,
        )
        return _unstarted, (self.algorithm, self.timeout, self.options.without_objects())


def _unstarted(algorithm: Algorithm, timeout: float, options: Options) -> HookState:
    state = HookState(algorithm, timeout=timeout)
    state.options, state._module = options, Binding(options.skip, None)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    return state
