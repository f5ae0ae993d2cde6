"""A DDP module without its all-reduce, for optimizers that communicate themselves.

No ``from __future__ import annotations`` here: DDP compares the annotations of a hook with the types themselves and
refuses strings. The parameter has to be called ``bucket``.
"""

from typing import Any

import torch
import torch.distributed as dist

from sparcomm.ddp.attach import find_ddp, register


def keep_local(module: Any) -> None:
    """Lets every rank keep its own gradients: DDP still broadcasts weights and buffers, but reduces nothing.

    For the optimizers of ``sparcomm.optim`` that communicate themselves (``SignSGD``, ``Signum``, ``DistributedLion``,
    ``OneBitAdam``). ``no_sync``, ``static_graph`` and ``gradient_as_bucket_view`` work as ever.

    Args:
        module: a DistributedDataParallel module, or anything that holds exactly one.

    Raises:
        ConfigError: no DDP module, several, or one with a communication hook.
    """
    register(find_ddp(module), None, pass_back)


def pass_back(
    state: None,  # noqa: ARG001  DDP passes it
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> torch.futures.Future[torch.Tensor]:
    """The communication hook of ``keep_local``: the bucket as it came."""
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future
