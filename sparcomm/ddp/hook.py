"""The function PyTorch calls with every bucket.

No ``from __future__ import annotations`` here: DDP compares the annotations of a hook with the types themselves and
refuses strings. The parameter has to be called ``bucket``.
"""

import torch
import torch.distributed as dist

from sparcomm.ddp.state import HookState
from sparcomm.errors import ConfigError


def hook(
    state: HookState,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> torch.futures.Future[torch.Tensor]:
    """Reduces one DDP bucket with ``state.algorithm``; for ``ddp.register_comm_hook(state, sparcomm.hook)``.

    Returns at once on Gloo (a worker thread does the work) and on NCCL (a side stream does).

    Args:
        state: the HookState of this DDP module.
        bucket: (n,) this rank's gradients. Its buffer is overwritten with the mean over ranks.

    Returns:
        A future of the bucket's buffer. An error ends in the future, never here: ``backward()`` raises a RuntimeError
        whose text holds ``sparcomm.HookError`` and the original type; ``state.raise_if_failed()`` raises the original.

    Raises:
        ConfigError: called without a bucket, as by torch.compile's Python reducer, or with another state.
    """
    if not isinstance(state, HookState):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"state is a {type(state).__name__}, must be a HookState: ddp.register_comm_hook(state, hook)"
        )
    if not isinstance(bucket, dist.GradBucket):  # pyright: ignore[reportUnnecessaryIsInstance, reportPrivateImportUsage]
        raise ConfigError(
            f"the hook was called with a {type(bucket).__name__} instead of a GradBucket, as torch.compile does with "
            'torch._dynamo.config.optimize_ddp = "python_reducer": use the default, optimize_ddp = True'
        )
    return state.reduce_bucket(bucket)
