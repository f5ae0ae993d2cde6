"""``attach``: the one line. Finds the DDP module, takes its hook slot, starts."""

from __future__ import annotations

import datetime as dt
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparcomm.algorithms.base import Algorithm
from sparcomm.ddp.hook import hook
from sparcomm.ddp.state import HookState
from sparcomm.errors import ConfigError

# Where trainers and wrappers that are no nn.Module keep the model: Lightning, Hugging Face, torch.compile, ...
_ATTRIBUTES = ("module", "model", "model_wrapped", "_forward_module", "_orig_mod", "strategy", "trainer")
_DEPTH = 4


def attach(module: Any, algorithm: Algorithm, *, timeout: dt.timedelta | float = 300.0) -> HookState:
    """Makes a DDP module reduce its gradients with ``algorithm``. Collective.

    Args:
        module: a DistributedDataParallel module, or anything that holds exactly one: a compiled module, another module,
            a trainer.
        algorithm: for example ``sparcomm.SparDL(density=0.01)``.
        timeout: seconds (or a timedelta) after which waiting for another rank is an error.

    Returns:
        The hook's state, for statistics, checkpoints and ``close``.

    Raises:
        ConfigError: no DDP module, several, one that has a communication hook already, or not an algorithm.
        ConfigMismatch: ranks have different algorithms, settings or releases; raised on all ranks.
        NotInitializedError: no process group.
        PeerError, RemoteError: a rank did not come in time, or failed.

    Warns:
        RuntimeWarning: after the first synchronised backward pass, if it called no hook.
    """
    ddp = find_ddp(module)
    state = HookState(algorithm, ddp, timeout=timeout)
    hooks: list[tuple[Any, Any]] = ddp._comm_hooks  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    for entry in list(hooks):
        if isinstance(entry[1], HookState) and entry[1].is_copy:  # left by copy.deepcopy, and never called
            entry[1].close()
            hooks.remove(entry)
    before = list(hooks)
    try:
        ddp.register_comm_hook(state, hook)
    except RuntimeError as error:
        hooks[:] = before
        names = ", ".join(getattr(h, "__qualname__", repr(h)) for h, _ in before)
        raise ConfigError(
            f"this DDP module has a communication hook already ({names or 'mixed_precision= or a built-in one'}), and "
            "can have only one: make a new DDP module, without mixed_precision= and without another hook"
        ) from error
    state.start()
    state.watch(ddp.parameters(), "register it on the module that is trained: sparcomm.attach(ddp, algorithm)")
    return state


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
