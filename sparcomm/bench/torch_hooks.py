"""PyTorch's own communication hooks, called as DDP calls them, without a forward or backward pass around them.

The bucket is a real ``GradBucket``, kept from one backward pass of a DDP module, so what is timed is the hook and
its future, and nothing of autograd or the reducer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from sparcomm.bench.entries import Entry
from sparcomm.bench.options import Options
from sparcomm.bench.sample import Counted, Progress, Sample, Stopwatch
from sparcomm.errors import ConfigError
from sparcomm.transport.base import Traffic

Hook = Callable[[Any, Any], "Future[Tensor]"]
PLAIN_STEPS = 2  # PowerSGD's own minimum: these steps are all-reduced without compression


def named(entry: Entry) -> tuple[Hook, Any]:
    """The hook and its state."""
    if entry.hook == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, entry.rank, start_powerSGD_iter=PLAIN_STEPS)
        return powerSGD_hook.powerSGD_hook, state
    hooks: dict[str, Any] = {
        "dense": default_hooks.allreduce_hook,
        "fp16": default_hooks.fp16_compress_hook,
        "bf16": default_hooks.bf16_compress_hook,
    }
    return hooks[entry.hook], None


def register(ddp: DistributedDataParallel, entry: Entry) -> None:
    """Gives a DDP module one of PyTorch's hooks."""
    hook, state = named(entry)

    # DDP refuses the bfloat16 hook on CPUs by its name; it runs there all the same.
    def call(state: Any, bucket: Any) -> Future[Tensor]:
        return hook(state, bucket)

    call.__annotations__ = {}  # they are text here, and DDP compares types
    ddp.register_comm_hook(state, call)


def synchronise(entry: Entry, grad: Tensor, options: Options, progress: Progress) -> tuple[Sample, Tensor]:
    """Calls a hook on a bucket of ``grad`` step after step; as ``reduce.synchronise``.

    The hook overwrites the bucket with the mean, which then is the next step's gradient: what these hooks do takes
    as long for one as for the other. PowerSGD gets the gradient again for its first compressed step.
    """
    hook, state = named(entry)
    traffic, bucket = Traffic(), bucket_of(grad.numel())
    buffer, first = bucket.buffer(), torch.empty(0)
    buffer.copy_(grad)
    watch, counted = Stopwatch(progress), Counted(traffic)
    plain = PLAIN_STEPS if entry.hook == "powersgd" else 0
    with counting(traffic):
        for step in range(-plain, options.warmup + options.steps):
            if step == options.warmup:
                counted = Counted(traffic)
                watch.start()
            mean = hook(state, bucket).wait()
            if mean.data_ptr() != buffer.data_ptr():  # DDP, too, copies what is not the bucket's own
                buffer.copy_(mean)
            if step == 0:
                first = buffer.clone()
            elif step == -1:
                buffer.copy_(grad)
            watch.tick()
    return Sample(watch.seconds, watch.cpu_seconds, **counted.per_step(options.steps)), first


def bucket_of(numel: int) -> Any:
    """A GradBucket of a near-square matrix and a vector of what is left of ``numel``. Collective."""
    ddp = DistributedDataParallel(_Parameters(numel))
    kept: list[Any] = []

    def keep(_: Any, bucket: Any) -> Future[Tensor]:
        kept.append(bucket)
        future: Future[Tensor] = Future()
        future.set_result(bucket.buffer())
        return future

    keep.__annotations__ = {}
    ddp.register_comm_hook(None, keep)
    ddp().backward()
    if len(kept) != 1 or kept[0].buffer().numel() != numel:
        raise ConfigError(f"DDP made {len(kept)} buckets of {numel} elements, 1 was expected")
    return kept[0]


class _Parameters(nn.Module):
    def __init__(self, numel: int) -> None:
        super().__init__()
        side = math.isqrt(numel)
        self.matrix = nn.Parameter(torch.zeros(side, numel // side))
        rest = numel - self.matrix.numel()
        self.rest = nn.Parameter(torch.zeros(rest)) if rest else None

    def forward(self) -> Tensor:
        """Any scalar that depends on every parameter."""
        return sum((p.sum() for p in self.parameters()), torch.zeros(()))


@contextlib.contextmanager
def counting(traffic: Traffic) -> Iterator[None]:
    """Books every ``dist.all_reduce`` of this process as ``Traffic`` books the backend's own.

    PyTorch's hooks send in no other way.
    """
    original, size = dist.all_reduce, dist.get_world_size()

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent = 2 * (size - 1) * tensor.numel() * tensor.element_size() // size
        traffic.book(2 * (size - 1), 2 * (size - 1), sent, sent)
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        yield
    finally:
        dist.all_reduce = original
