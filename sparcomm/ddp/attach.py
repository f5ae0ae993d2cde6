"""``attach``: the one line. Finds the DDP module, takes its hook slot, starts."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sparcomm.algorithms.base import Algorithm
from sparcomm.ddp.hook import hook
from sparcomm.ddp.monitor import Check
from sparcomm.ddp.schedule import Schedule
from sparcomm.ddp.skip import Rule
from sparcomm.ddp.state import HookState
from sparcomm.errors import ConfigError
from sparcomm.feedback import Memory

# Where trainers and wrappers that are no nn.Module keep the model: Lightning, Hugging Face, torch.compile, ...
_ATTRIBUTES = ("module", "model", "model_wrapped", "_forward_module", "_orig_mod", "strategy", "trainer")
_DEPTH = 4


def attach(
    module: Any, algorithm: Algorithm, *, scaler: Any = None, optimizer: Optimizer | None = None,
    memory: Memory | None = None, warmup: int | Schedule | Callable[[int], float | None] = 0,
    skip: Rule | Sequence[Rule] = (), storage: str = "float32", local_clip: float | None = None,
    lr_aware: bool | float = False, auto_off: bool = False, check: Check | None = None,
    transport: str = "auto", timeout: dt.timedelta | float = 300.0,
) -> HookState:  # fmt: skip
    """Makes a DDP module reduce its gradients with ``algorithm``. Collective.

    Args:
        module: a DistributedDataParallel module, or anything that holds exactly one: a compiled module, a trainer, ...
        algorithm: for example ``sparcomm.SparDL(density=0.01)``.
        scaler: the ``torch.amp.GradScaler`` in use; what is owed is then kept without the loss scale.
        optimizer: the one in use; for ``lr_aware``, and for a warning where it does not go well with the rest.
        memory: ``sparcomm.ErrorFeedback()`` (default), ``sparcomm.MomentumCorrection(momentum=0.9)`` in place of SGD's
            momentum, or ``sparcomm.AdamCorrection(beta2=0.999)`` in place of Adam; both want SGD without momentum.
        warmup: so many dense steps first; or a schedule such as ``sparcomm.DensityWarmup(steps=1000)``; or a callable
            that gives the density of a step by its number, None for a dense one, the same on all ranks.
        skip: parameters that always travel dense: "biases", "norms", patterns of names, a number of elements below
            which one is skipped, a callable(name, parameter), or several of these. Other units, too, travel dense
            wherever that takes fewer bytes.
        storage: of what is owed, between steps: "float32" (the working dtype), "bfloat16" (stochastic rounding), or
            "pinned" host memory.
        local_clip: every rank's own gradient is limited to this Euclidean norm before error feedback (each unit to the
            root of its share of the elements); what is cut is dropped.
        lr_aware: what is owed follows the learning rate, for SGD: multiplied by old over new rate, within 1/10 to 10,
            or within the bound given.
        auto_off: time the first steps both ways, and stay dense if compression does not pay on this link.
        check: a ``sparcomm.Check``: look now and then at what compression does.
        transport: "torch" (torch.distributed, on the backends of the module's process group), "mpi" (mpirun has
            started the ranks, in the same order), or "auto": MPI if that group's backend for the gradients is "mpi4py".
        timeout: seconds (or a timedelta) after which waiting for another rank is an error.

    Returns:
        The hook's state, for statistics, clipping, checkpoints and ``close``.

    Raises:
        ConfigError: no DDP module, several, or one with a communication hook; a setting outside what is allowed.
        ConfigMismatch: ranks have different algorithms, settings or releases; raised on all ranks.
        NotInitializedError: no process group.
        PeerError, RemoteError: a rank did not come in time, or failed.

    Warns:
        RuntimeWarning: after the first synchronised backward pass, if it called no hook.
        UserWarning: once, for an algorithm whose optimizer is known to train badly with it.
    """
    ddp = find_ddp(module)
    state = HookState(
        algorithm, ddp, scaler=scaler, optimizer=optimizer, memory=memory, warmup=warmup, skip=skip, storage=storage,
        local_clip=local_clip, lr_aware=lr_aware, auto_off=auto_off, check=check, transport=transport,
        timeout=timeout,
    )  # fmt: skip
    register(ddp, state, hook)
    state.start()
    state.watch(ddp.parameters(), "register it on the module that is trained: sparcomm.attach(ddp, algorithm)")
    return state


def register(ddp: DistributedDataParallel, state: Any, function: Callable[..., Any]) -> None:
    """Takes the module's one hook slot for ``function(state, bucket)``. Raises ConfigError if it is taken."""
    hooks: list[tuple[Any, Any]] = ddp._comm_hooks  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    for entry in list(hooks):
        if isinstance(entry[1], HookState) and entry[1].is_copy:  # left by copy.deepcopy, and never called
            entry[1].close()
            hooks.remove(entry)
    before = list(hooks)
    try:
        ddp.register_comm_hook(state, function)
    except RuntimeError as error:
        hooks[:] = before
        names = ", ".join(getattr(h, "__qualname__", repr(h)) for h, _ in before)
        raise ConfigError(
            f"this DDP module has a communication hook already ({names or 'mixed_precision= or a built-in one'}), and "
            "can have only one: make a new DDP module, without mixed_precision= and without another hook"
        ) from error


def find_ddp(module: Any) -> DistributedDataParallel:
    """The one DistributedDataParallel module that ``module`` is or holds. Raises ConfigError for none or several."""
    found: dict[int, DistributedDataParallel] = {}
    _search(module, _DEPTH, found)
    if len(found) != 1:
        what = "none" if not found else f"{len(found)} of them: attach to each by itself"
        hint = "" if found else "; wrap the model first: DistributedDataParallel(model)"
        raise ConfigError(f"{type(module).__name__} must hold one DistributedDataParallel module, holds {what}{hint}")
    return next(iter(found.values()))


def _search(thing: Any, depth: int, found: dict[int, DistributedDataParallel]) -> None:
    if isinstance(thing, nn.Module):
        inner = (m for m in thing.modules() if isinstance(m, DistributedDataParallel))
        found.update((id(m), m) for m in inner)
    if depth and not found:
        for name in _ATTRIBUTES:
            try:
                held = getattr(thing, name, None)
            except Exception:  # noqa: BLE001  a property that is not ready, as LightningModule.trainer
                continue
            if held is not None and not isinstance(held, (str, int, float, bool)):
                _search(held, depth - 1, found)
