"""Lion whose ranks vote on the direction.

Chen et al., "Symbolic Discovery of Optimization Algorithms", NeurIPS 2023 (arXiv 2302.06675); Liu et al.,
"Communication Efficient Distributed Training with Distributed Lion", NeurIPS 2024 (arXiv 2404.00438).
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import torch
from torch import Tensor

from sparcomm.algorithms.base import Algorithm
from sparcomm.algorithms.majority_vote import MajorityVote
from sparcomm.optim.buckets import Bucket
from sparcomm.optim.collective import CollectiveOptimizer, Sent
from sparcomm.optim.signs import Params
from sparcomm.transport.base import Transport


class DistributedLion(CollectiveOptimizer):
    """c = beta1 m + (1 - beta1) g; x -= lr (v + weight_decay x), v the verdict on sign(c); m = beta2 m + (1 - beta2) g.

    c, m and g are each rank's own. With ``algorithm=sparcomm.Dense()`` v is the sign of the mean of all c, which is
    Lion on the mean gradient.

    Args:
        params: parameters, or groups of them.
        lr: by how much every entry moves in every step.
        betas: of the direction and of the momentum.
        weight_decay: decoupled.
        algorithm: what carries the votes; default ``sparcomm.MajorityVote("negative", "negative")``: zeros and ties go
            down, as in the published code.
        process_group, transport, timeout: see ``CollectiveOptimizer``.

    Raises:
        ConfigError: a value outside what is allowed.
    """

    def __init__(
        self, params: Params, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0, *,
        algorithm: Algorithm | None = None, process_group: Any = None, transport: Transport | None = None,
        timeout: dt.timedelta | float = 300.0,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}
        super().__init__(
            params, defaults, MajorityVote("negative", "negative") if algorithm is None else algorithm,
            process_group=process_group, transport=transport, timeout=timeout,
        )  # fmt: skip

    def _outgoing(self, bucket: Bucket, grad: Tensor) -> Tensor:
        m, direction = bucket.named("momentum"), bucket.take()
        for span in bucket.spans:
            beta, here = self.param_groups[span.group]["betas"][0], span.where
            torch.lerp(grad[here], m[here], beta, out=direction[here])
        return direction

    def _advance(self, bucket: Bucket, done: Sent, total: Tensor) -> Tensor:
        m = bucket.named("momentum")
        for span in bucket.spans:
            m[span.where].lerp_(done.grad[span.where], 1 - self.param_groups[span.group]["betas"][1])
        return total.sign_()
