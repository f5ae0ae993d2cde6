"""What DDP does to buckets without telling its hook: joined ranks, unused parameters, a first step without numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparcomm.errors import ConfigError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket


def has_joined(ddp: nn.Module | None) -> bool:
    """Whether the hook is being called for a rank that has joined: by ``Join``, outside of any backward pass.

    Raises:
        ConfigError: ``join(divide_by_initial_world_size=False)``.
    """
    config: Any = getattr(ddp, "_join_config", None)
    if config is None or not config.enable:
        return False
    if not getattr(ddp, "_divide_by_initial_world_size", True):
        raise ConfigError(
            "join(divide_by_initial_world_size=False): DDP does not tell a communication hook how many ranks remain; "
            "use divide_by_initial_world_size=True"
        )
    return torch._C._current_graph_task_id() == -1  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


class Place:
    """Which buckets are a step's first and last.

    They say so themselves, but not in the first iteration of a static graph: there DDP hands all of them over at the
    end, each as number 0, and where there are several (mixed dtypes, sparse layouts) none as the last.
    """

    def __init__(self, ddp: nn.Module | None, params: Iterable[Tensor]) -> None:
        self._all = {id(p) for p in params} if getattr(ddp, "static_graph", False) else set[int]()
        self._came: set[int] = set()

    def of(self, bucket: GradBucket) -> tuple[bool, bool]:
        """(first, last); to be asked once of every bucket."""
        index, last = bucket.index(), bucket.is_last()
        if last or index:
            self._all = set()
        if not self._all:
            return index == 0, last
        first = not self._came
        self._came.update(id(p) for p in bucket.parameters())
        last = self._came >= self._all
        if last:
            self._all = set()
        return first, last


class Use:
    """Which parameters this rank has used since the last synchronised step, where DDP throws away what is not used.

    With ``find_unused_parameters``, ``.grad`` of a parameter that no rank has used stays as it was: what were delivered
    there would be lost. DDP's own record of it cannot be read from within a hook, which holds its lock.

    Attributes:
        place: of buckets in their step.
    """

    def __init__(self, ddp: nn.Module | None, params: Sequence[Tensor]) -> None:
        self.place = Place(ddp, params)
        needed = getattr(ddp, "find_unused_parameters", False) and not getattr(ddp, "static_graph", False)
        self._seen: set[int] | None = set() if needed else None
        # Runs before DDP counts the parameter as ready, so before the hook gets its bucket.
        self._handles = [p.register_post_accumulate_grad_hook(self._mark) for p in params] if needed else []

    def _mark(self, p: Tensor) -> None:
        if self._seen is not None:
            self._seen.add(id(p))

    def of(self, params: Sequence[Tensor], last: bool) -> dict[int, bool] | None:
        """By id of a bucket's parameters; None where it does not matter. ``last``: the step's last bucket."""
        if self._seen is None:
            return None
        used = {id(p): id(p) in self._seen for p in params}
        if last:
            self._seen.clear()
        return used

    def stop(self) -> None:
        """Removes what was installed. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def check_supported(ddp: nn.Module) -> None:
    """Raises ConfigError for ways of DDP that no hook can serve; the same on all ranks."""
    if getattr(ddp, "skip_all_reduce_unused_params", False):
        raise ConfigError(
            "DistributedDataParallel(skip_all_reduce_unused_params=True) leaves buckets out, and a step would never be "
            "complete: use the default, False"
        )
    if getattr(ddp, "_use_python_reducer", False):
        raise ConfigError(
            'torch._dynamo.config.optimize_ddp = "python_reducer" hands gradients to a hook one by one instead of in '
            "buckets: use the default, optimize_ddp = True"
        )
