"""The hook's state: what a user holds, asks and saves."""

from __future__ import annotations

import datetime as dt
import functools
import logging
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from sparcomm.algorithms.base import Algorithm
from sparcomm.ddp import checkpoint
from sparcomm.ddp.checkpoint import StateDict
from sparcomm.ddp.delivery import Delivery
from sparcomm.ddp.engine import Engine
from sparcomm.ddp.stats import parameter_stats, total_norm, unit_stats
from sparcomm.ddp.units import Carried, Partition
from sparcomm.ddp.watch import Watch
from sparcomm.errors import CheckpointError, ConfigError, DamagedBag, NotInitializedError
from sparcomm.transport.base import Traffic
from sparcomm.transport.torchdist.groups import as_timedelta

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

    Raises:
        ConfigError: not an Algorithm, or a timeout that is no time.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        module: nn.Module | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        timeout: dt.timedelta | float = 300.0,
    ) -> None:
        if not isinstance(algorithm, Algorithm):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"algorithm={algorithm!r}: must be an instance, such as sparcomm.SparDL(density=0.01)")
        self.algorithm = algorithm
        self.timeout = as_timedelta(timeout).total_seconds()
        self._group = process_group
        self._params: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        self._engine: Engine | None = None
        self._start_error: BaseException | None = None
        self._loaded: StateDict | Sequence[StateDict] | None = None
        self._called = False
        self._watch: Watch | None = None
        self._ddp: weakref.ref[nn.Module] | None = None
        self.is_copy = False
        if module is not None:
            self.bind(module)

    # ---- before the first step -----------------------------------------------------------------------------------

    def bind(self, module: nn.Module) -> None:
        """Takes the names of the parameters from ``module``, a DDP module or the one inside it."""
        ignored: set[str] = set()
        if isinstance(module, DistributedDataParallel):
            self._ddp = weakref.ref(module)
            ignored = set(module.parameters_to_ignore)
            self._group = self._group or module.process_group
            module = module.module
        # torch.compile puts a level of its own into names; a checkpoint must not depend on it.
        self._params = {
            name.replace("_orig_mod.", ""): p
            for name, p in module.named_parameters()
            if p.requires_grad and name not in ignored
        }
        self._names = {id(p): name for name, p in self._params.items()}

    @property
    def bound(self) -> bool:
        """Whether parameters have names."""
        return bool(self._params)

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
        group = self._process_group()
        try:
            self._engine = Engine(self.algorithm, group, list(self._params.values()), self.timeout)
            weakref.finalize(self, self._engine.close).atexit = False  # the engine itself sees to that
            if self._loaded is not None:
                self._install(self._loaded)
        except Exception as error:
            self._start_error = error
            if self._engine is not None:
                self._engine.fail(error)  # the other ranks must not wait for this one
            raise

    def _process_group(self) -> dist.ProcessGroup:
        if not dist.is_available() or not dist.is_initialized():
            raise NotInitializedError(
                "torch.distributed has no process group yet: call torch.distributed.init_process_group() first, "
                "in a job started by torchrun, mpirun or Slurm"
            )
        group = self._group or dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise ConfigError("process_group: this rank is not a member of it")
        return group

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
            return self._engine.reduce_bucket(bucket)
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
        if self._engine is None:
            return
        if self._engine.failure is not None:
            raise self._engine.failure
        if self._engine.damaged():
            raise DamagedBag("a message that arrived was not what was sent; nothing was committed since")

    def close(self) -> None:
        """Ends the worker thread and the hook's process group. Idempotent; a step under way fails on all ranks."""
        if self._watch is not None:
            self._watch.stop()
        if self._engine is not None:
            self._engine.close()

    # ---- what it knows -------------------------------------------------------------------------------------------

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
            ``steps``, ``skipped`` (not finite somewhere); ``bytes_sent``, ``bytes_received``, ``rounds``, ``messages``
            so far; ``kept``: entries per step; ``seconds`` by phase so far; ``residual_norm``: Euclidean;
            ``memory_bytes``: residuals and the like, both buffers; ``per_unit``: a list of the same by unit, with
            ``names`` and ``numel``; ``per_parameter``: ``{name: {numel, residual_norm, memory_bytes}}``.
        """
        engine = self._engine
        if engine is not None:
            engine.drain()
        algorithm, size = self.algorithm, engine.size if engine else 1
        units = engine.partition.units if engine else []
        per_unit = [unit_stats(unit, algorithm, size, self._name_of) for unit in units]
        traffic = self.traffic
        return {
            "steps": self.step,
            "skipped": engine.skipped if engine else 0,
            "bytes_sent": traffic.bytes_sent,
            "bytes_received": traffic.bytes_received,
            "rounds": traffic.rounds,
            "messages": traffic.messages,
            "kept": sum(u["kept"] for u in per_unit),
            "seconds": engine.seconds() if engine else {},
            "residual_norm": total_norm([u["residual_norm"] for u in per_unit]),
            "memory_bytes": sum(u["memory_bytes"] for u in per_unit),
            "per_unit": per_unit,
            "per_parameter": dict(entry for unit in units for entry in parameter_stats(unit, self._name_of)),
        }

    def _name_of(self, p: Tensor) -> str:
        return self._names.get(id(p), f"unnamed parameter {id(p):#x} {tuple(p.shape)}")

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """What this rank must save beside model and optimiser; every rank's is different. Waits for running jobs.

        Plain containers and tensors (copies) of what is committed: loads with ``torch.load(..., weights_only=True)``.

        Raises:
            NotInitializedError: not bound to a module, or not started (no process group yet).
        """
        self._need_names("state_dict()")
        engine = self._started()
        engine.drain()
        final = engine.partition.final
        units = [[self._name(p) for p in unit.params] for unit in engine.partition.units] if final else None
        return checkpoint.pack(
            self.algorithm, engine.committed(), self._names, self._params, units,
            engine.completed, engine.rank, engine.size,
        )  # fmt: skip

    def load_state_dict(self, state_dict: StateDict | Sequence[StateDict]) -> None:
        """Takes up where a checkpoint left off.

        After the same world size and a checkpoint of step 2 or later, training goes on bit for bit as if it had never
        stopped. An earlier checkpoint was taken before DDP's buckets were final: nothing owed is lost, but the bits
        differ. Ranks compare the step at their next one.

        Args:
            state_dict: this rank's own, or the list of all ranks' at any world size: new rank i of q takes the sum of
                what old ranks i, i+q, i+2q, ... owed.

        Raises:
            NotInitializedError: not bound to a module.
            CheckpointError: not of this algorithm, these parameters or this rank; the message names what differs.
        """
        self._need_names("load_state_dict()")
        for sd in [state_dict] if isinstance(state_dict, Mapping) else state_dict:
            checkpoint.check_complete(sd)
            checkpoint.check_fits(sd, self.algorithm, self._params)
        if self._engine is None and not dist.is_initialized():
            self._loaded = state_dict  # rank and size are not known before there is a group
        else:
            self.start()
            self._install(state_dict)

    def _install(self, state_dict: StateDict | Sequence[StateDict]) -> None:
        engine = self._started()
        first, mine = checkpoint.choose(state_dict, engine.rank, engine.size)
        engine.drain()
        carried = checkpoint.unpack(first, mine, self._params)
        partition = Partition(final=first["units"] is not None)
        if first["units"] is not None:
            for names in first["units"]:
                params = [self._params[name] for name in names]
                partition.add(params, params[0].dtype, params[0].device, self.algorithm, engine.size, carried)
            carried = Carried()
        elif first["step"]:
            _log.warning(
                "hook state of step %d was saved before DDP's buckets were final (step 2): what is owed is kept, but "
                "the run will not be bit-identical to an uninterrupted one", first["step"],
            )  # fmt: skip
        engine.replace(partition, carried, first["step"], checkpoint.origin(first))
        self._loaded = None

    def _started(self) -> Engine:
        if self._engine is None:
            raise NotInitializedError("the hook has not started: use sparcomm.attach(), state.start(), or run a step")
        return self._engine

    def _need_names(self, what: str) -> None:
        if not self.bound:
            raise NotInitializedError(
                f"{what} speaks in parameter names, and this HookState has no module: give it one by "
                "HookState(algorithm, ddp) or state.bind(ddp)"
            )

    def _name(self, p: Tensor) -> str:
        if id(p) not in self._names:
            raise CheckpointError(
                f"a parameter of shape {tuple(p.shape)} that is reduced has no name in the bound module: "
                "bind the module that DDP wraps"
            )
        return self._names[id(p)]

    # ---- copies --------------------------------------------------------------------------------------------------

    def watch(self, params: Iterable[Tensor], remedy: str) -> None:
        """Warns after the first synchronised backward pass through ``params`` if no bucket has come here by then."""

        def synchronised() -> bool:
            return getattr(self._ddp and self._ddp(), "require_backward_grad_sync", True)

        self._watch = Watch(params, lambda: self._called, synchronised, remedy)

    def __deepcopy__(self, memo: dict[int, Any]) -> HookState:
        """A state that was never started: DDP copies its hook's state along, but the copy calls no hook."""
        copied = HookState(self.algorithm, timeout=self.timeout)
        copied.is_copy = True
        memo[id(self)] = copied
        ddp = memo.get(id(self._ddp and self._ddp()))
        copied._ddp = weakref.ref(ddp) if isinstance(ddp, nn.Module) else None
        params = [memo[id(p)] for p in self._params.values() if id(p) in memo]
        copied.watch(params, "a deep copy of a DDP module has no hook, call sparcomm.attach() on the copy")
        return copied

    def __reduce__(self) -> Any:
        """Pickles the settings only, and says so: what is owed is different on every rank."""
        warnings.warn(
            "a pickled HookState keeps its settings, but not what each rank still owes: save state.state_dict()",
            stacklevel=2,
        )
        return functools.partial(HookState, timeout=self.timeout), (self.algorithm,)
