"""Sign descent by majority vote: every rank votes with the sign of its own momentum, one bit an entry.

Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", ICML 2018 (arXiv 1802.04434), and
"signSGD with Majority Vote is Communication Efficient and Fault Tolerant", ICLR 2019 (arXiv 1810.05291), whose Signum
keeps the momentum on each rank; weight decay is decoupled, as there.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sparcomm.algorithms.base import Algorithm
from sparcomm.algorithms.majority_vote import MajorityVote
from sparcomm.optim.buckets import Bucket
from sparcomm.optim.collective import CollectiveOptimizer, Sent
from sparcomm.transport.base import Transport

Params = Iterable[Tensor] | Iterable[dict[str, Any]]


class SignSGD(CollectiveOptimizer):
    """x -= lr (v + weight_decay x), where v is the ranks' verdict on the sign of the gradient.

    Args:
        params: parameters, or groups of them.
        lr: by how much every entry moves in every step.
        weight_decay: decoupled.
        algorithm: what carries the votes; default ``sparcomm.MajorityVote()``, whose options rule zeros and ties. With
            ``sparcomm.Dense()`` v is the sign of the exact mean, 0 where it is 0.
        process_group, transport, timeout: see ``CollectiveOptimizer``.

    Raises:
        ConfigError: a value outside what is allowed.
    """

    def __init__(
        self, params: Params, lr: float = 1e-4, weight_decay: float = 0.0, *, algorithm: Algorithm | None = None,
        process_group: Any = None, transport: Transport | None = None, timeout: dt.timedelta | float = 300.0,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(
            params, defaults, MajorityVote() if algorithm is None else algorithm, process_group=process_group,
            transport=transport, timeout=timeout,
        )  # fmt: skip

    def _outgoing(self, bucket: Bucket, grad: Tensor) -> Tensor:
        return grad

    def _advance(self, bucket: Bucket, done: Sent, total: Tensor) -> Tensor:
        return total.sign_()


class Signum(CollectiveOptimizer):
    """m = momentum m + (1 - momentum) gradient on each rank; x -= lr (v + weight_decay x), v the verdict on sign(m).

    With ``algorithm=sparcomm.Dense()`` v is the sign of the mean of all m, which is Signum on the mean gradient: the
    dense counterpart that a vote is to be compared with.

    Args:
        params: parameters, or groups of them.
        lr: by how much every entry moves in every step.
        momentum: decay of m, which stays on its rank.
        weight_decay: decoupled.
        algorithm: what carries the votes; default ``sparcomm.MajorityVote()``, whose options rule zeros and ties.
        process_group, transport, timeout: see ``CollectiveOptimizer``.

    Raises:
        ConfigError: a value outside what is allowed.
    """

    def __init__(
        self, params: Params, lr: float = 1e-4, momentum: float = 0.9, weight_decay: float = 0.0, *,
        algorithm: Algorithm | None = None, process_group: Any = None, transport: Transport | None = None,
        timeout: dt.timedelta | float = 300.0,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(
            params, defaults, MajorityVote() if algorithm is None else algorithm, process_group=process_group,
            transport=transport, timeout=timeout,
        )  # fmt: skip

    def _outgoing(self, bucket: Bucket, grad: Tensor) -> Tensor:
        m = bucket.named("momentum")
        for span in bucket.spans:
            part = grad[span.where]
            torch.lerp(part, m[span.where], self.param_groups[span.group]["momentum"], out=part)
        return grad

    def _advance(self, bucket: Bucket, done: Sent, total: Tensor) -> Tensor:
        bucket.named("momentum").copy_(done.sent)
        return total.sign_()
