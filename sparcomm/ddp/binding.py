"""What a hook knows of the module that it serves: its parameters, their names, its process group."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparcomm.ddp.join import check_supported
from sparcomm.ddp.skip import Rule, skipped
from sparcomm.errors import CheckpointError, ConfigError, NotInitializedError


class Binding:
    """Empty until ``bind``.

    Args:
        rules: for parameters that always travel dense.
        group: the process group, where the module is not to say it.

    Attributes:
        params: those that are reduced, by name.
        names: the other way round, by id.
        skipped: ids of those that always travel dense.
        sparse: names of those whose gradients DDP expects to be of sparse layout.
    """

    def __init__(self, rules: Sequence[Rule], group: dist.ProcessGroup | None) -> None:
        self._rules, self._group = rules, group
        self.params: dict[str, Tensor] = {}
        self.names: dict[int, str] = {}
        self.skipped: set[int] = set()
        self.sparse: list[str] = []
        self._ddp: weakref.ref[nn.Module] | None = None

    def bind(self, module: nn.Module) -> None:
        """Takes the names from ``module``, a DDP module or the one inside it. Raises ConfigError."""
        ignored: set[str] = set()
        if isinstance(module, DistributedDataParallel):
            check_supported(module)
            self._ddp = weakref.ref(module)
            ignored = set(module.parameters_to_ignore)
            self._group = self._group or module.process_group
            module = module.module
        # torch.compile puts a level of its own into names; a checkpoint must not depend on it.
        self.params = {
            name.replace("_orig_mod.", ""): p
            for name, p in module.named_parameters()
            if p.requires_grad and name not in ignored
        }
        self.names = {id(p): name for name, p in self.params.items()}
        self.skipped = {id(self.params[name]) for name in skipped(self._rules, self.params, module)}
        self.sparse = [self.names[key] for key in _of_sparse_layout(module) if key in self.names]

    @property
    def ddp(self) -> nn.Module | None:
        """The DDP module, if it is known and still there."""
        return None if self._ddp is None else self._ddp()

    def follow(self, ddp: nn.Module | None) -> None:
        """Takes ``ddp`` for the DDP module, and nothing else of it."""
        self._ddp = None if ddp is None else weakref.ref(ddp)

    def group(self) -> dist.ProcessGroup:
        """The process group. Raises NotInitializedError, or ConfigError where this rank is outside of it."""
        if not dist.is_available() or not dist.is_initialized():
            raise NotInitializedError(
                "torch.distributed has no process group yet: call torch.distributed.init_process_group() first, "
                "in a job started by torchrun, mpirun or Slurm"
            )
        group = self._group or dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise ConfigError("process_group: this rank is not a member of it")
        return group

    def need(self, what: str) -> None:
        """Raises NotInitializedError unless parameters have names, which ``what`` needs."""
        if not self.params:
            raise NotInitializedError(
                f"{what} speaks in parameter names, and this HookState has no module: give it one by "
                "HookState(algorithm, ddp) or state.bind(ddp)"
            )

    def check_name(self, p: Tensor) -> str:
        """The name of a parameter. Raises CheckpointError if it has none."""
        if id(p) not in self.names:
            raise CheckpointError(
                f"a parameter of shape {tuple(p.shape)} that is reduced has no name in the bound module: "
                "bind the module that DDP wraps"
            )
        return self.names[id(p)]

    def label(self, p: Tensor) -> str:
        """The name of a parameter, or something else that tells it apart."""
        return self.names.get(id(p), f"unnamed parameter {id(p):#x} {tuple(p.shape)}")


def _of_sparse_layout(module: nn.Module) -> list[int]:
    """Ids of the parameters whose gradients DDP expects to be sparse: it asks the first module that holds one."""
    first: dict[int, nn.Module] = {}
    for holder in module.modules():
        for p in holder.parameters(recurse=False):
            first.setdefault(id(p), holder)
    return [key for key, m in first.items() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse]
