"""What DDP does to buckets without telling its hook: joined ranks, unused parameters, a first step without numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparcomm.errors import ConfigError, HookError

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

    Args:
        params: all that are reduced, as far as known.

    Attributes:
        lost: whether the last bucket cannot be told, since parameters are not known.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._all = {id(p) for p in params}
        self._came: set[int] = set()
        self._pass: int | None = None  # the backward pass whose only bucket so far, or buckets, had number 0
        self.lost = False

    def of(self, bucket: GradBucket) -> tuple[bool, bool]:
        """(first, last); to be asked once of every bucket."""
        index, last = bucket.index(), bucket.is_last()
        if last or index:
            self._pass, self.lost = None, False
            return index == 0, last
        now: int = torch._C._current_graph_task_id()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        first = now < 0 or now != self._pass
        if first:
            self._pass = now
            self._came.clear()
        self._came.update(id(p) for p in bucket.parameters())
        self.lost = not first and not self._all
        return first, not first and not self.lost and self._came >= self._all


class Use:
    """Which parameters this rank has used since the last synchronised step, where DDP throws away what is not used.

    With ``find_unused_parameters``, ``.grad`` of a parameter that no rank has used stays as it was: what were delivered
    there would be lost. DDP's own record of it cannot be read from within a hook, which holds its lock.

    Attributes:
        place: of buckets in their step.
    """

    def __init__(self, ddp: nn.Module | None, params: Sequence[Tensor]) -> None:
        self.place = Place(params)
        needed = getattr(ddp, "find_unused_parameters", False) and not getattr(ddp, "static_graph", False)
        self._seen: set[int] | None = set() if needed else None
        # Runs before DDP counts the parameter as ready, so before the hook gets its bucket.
        self._handles = [p.register_post_accumulate_grad_hook(self._mark) for p in params] if needed else []

    def _mark(self, p: Tensor) -> None:
        if self._seen is not None:
            self._seen.add(id(p))

    def of(self, params: Sequence[Tensor], last: bool) -> dict[int, bool] | None:
        """By id of a bucket's parameters; None where it does not matter. ``last``: the step's last bucket.

        Raises HookError if that cannot be told.
        """
        if self.place.lost:
            raise HookError(
                "in the first iteration of a static graph DDP does not say which of several buckets is the last, and "
                "this HookState has no module to tell it by: HookState(algorithm, ddp), or state.bind(ddp)"
            )
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
