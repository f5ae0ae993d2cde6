"""How the gradients travel in a run, and how many bytes that takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparcomm
from jobs.group import Group
from jobs.settings import Settings
from sparcomm.optim import AdamW
from sparcomm.optim.collective import CollectiveOptimizer


def dense_bytes(parameters: int, size: int) -> float:
    """Bytes that each rank sends in one bandwidth-optimal float32 all-reduce: 2 (p-1)/p · 4n."""
    return 2 * (size - 1) / size * 4 * parameters


class Gradients:
    """The sparcomm hook of a DDP module, or an optimizer that communicates itself.

    Neither of them where the run leaves DDP alone (``algorithm: null``).
    """

    def __init__(
        self, ddp: DistributedDataParallel, settings: Settings, group: Group, optimizer: torch.optim.Optimizer
    ) -> None:
        algorithm, self._rank = settings.build_algorithm(), group.rank
        self.hook: sparcomm.HookState | None = None
        self.optimizer = optimizer if isinstance(optimizer, CollectiveOptimizer) else None
        if self.optimizer is not None:
            sparcomm.keep_local(ddp)
        elif algorithm is not None:
            options = settings.hook.arguments()
            self.hook = sparcomm.attach(ddp, algorithm, optimizer=optimizer, timeout=settings.timeout, **options)
            if isinstance(optimizer, AdamW):
                optimizer.hook = self.hook
        self._parameters = list(ddp.parameters())
        self._exact = algorithm is None or isinstance(algorithm, sparcomm.Dense)
        self.per_step = dense_bytes(trainable(ddp), group.size)
        self.steps = 0  # counted over resumed parts too
        self.before = 0.0  # bytes of the parts before this one

    def clip(self, limit: float) -> None:
        """Limits the norm of the mean: by its own where it is the dense one, else by what the hook knows of that."""
        if self.hook is None or self._exact:
            nn.utils.clip_grad_norm_(self._parameters, limit)
        else:
            self.hook.clip_grad_norm_(limit)

    def step_done(self) -> None:
        """Counts one synchronised step and raises what its hook could not raise through autograd."""
        self.steps += 1
        self.raise_if_failed()

    def raise_if_failed(self) -> None:
        """Raises the hook's own exception, if it has failed."""
        if self.hook is not None:
            self.hook.raise_if_failed()

    @property
    def bytes_sent(self) -> float:
        """Bytes this rank has sent for gradients since the first step of the run; plain DDP's are computed."""
        carrier = self.hook or self.optimizer
        return self.per_step * self.steps if carrier is None else self.before + carrier.traffic.bytes_sent

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than dense float32."""
        return self.per_step * self.steps / self.bytes_sent if self.bytes_sent else 1.0

    def seconds(self) -> dict[str, float]:
        """Seconds spent selecting, coding and on the wire since this process started."""
        if self.optimizer is not None:
            return self.optimizer.seconds()
        return {} if self.hook is None else dict(self.hook.stats()["seconds"])

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of a checkpoint."""
        hook = None if self.hook is None else self.hook.state_dict()
        own = None if self.optimizer is None else self.optimizer.state_dict()
        return {"hook": hook, "optimizer": own, "steps": self.steps, "bytes_sent": self.bytes_sent}

    def load_state_dict(self, saved: list[dict[str, Any]]) -> None:
        """Takes up what ``state_dict`` gave: one entry for the same number of ranks, else all ranks' entries."""
        if self.hook is not None:
            hooks = [part["hook"] for part in saved]
            self.hook.load_state_dict(hooks[0] if len(hooks) == 1 else hooks)
        if self.optimizer is not None:
            self.optimizer.load_state_dict(saved[self._rank % len(saved)]["optimizer"])
        if self.hook is not None or self.optimizer is not None:
            # These count from their own start; the run's count goes on.
            self.before = max(part["bytes_sent"] for part in saved)
        self.steps = saved[0]["steps"]

    def close(self) -> None:
        """Ends the hook's thread and group, or the optimizer's group."""
        if self.hook is not None:
            self.hook.close()
        if self.optimizer is not None:
            self.optimizer.close()


def trainable(module: nn.Module) -> int:
    """Number of elements that gradients have."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
