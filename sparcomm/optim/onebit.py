"""1-bit Adam: dense Adam for a while, then a frozen second moment and one bit an entry of the first.

Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed", ICML 2021 (arXiv
2102.02888): there is no bias correction, and weight decay is decoupled, as in its published code.

**What is sent.** As published, the momentum; that code gives each tensor a scale of its own, because one bit and one
scale drown the entries of small layers. Here all tensors travel as one vector, and what is compressed is the update,
momentum / (sqrt(v) + eps), whose entries are of one order of magnitude in all layers; v is frozen and the same on all
ranks, so with an exact sum it makes no difference. ``compress="momentum"`` sends the momentum itself.

**Entries that were zero throughout the warm-up**, such as rows of an embedding that did not occur, have v = 0, and one
bit cannot say zero. They stay as they are after the switch: neither moved nor summed, nothing is owed for them. The
published code wants a mask from the user. They do count in the means of magnitudes: where they are many, scales are too
small for the rest, unless ``OneBitAllReduce(mask=True)`` tells them apart.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import torch
from torch import Tensor

from sparcomm.algorithms.base import Algorithm
from sparcomm.algorithms.dense import Dense
from sparcomm.algorithms.onebit import OneBitAllReduce
from sparcomm.errors import ConfigError
from sparcomm.optim.buckets import Bucket
from sparcomm.optim.collective import CollectiveOptimizer, Sent
from sparcomm.optim.signs import Params
from sparcomm.transport.base import Transport

COMPRESS = ("update", "momentum")


class OneBitAdam(CollectiveOptimizer):
    """Adam without bias correction for ``warmup`` steps, then with a frozen second moment and a compressed first one.

    Warm-up: the mean gradient g by the ordered dense all-reduce; m = beta1 m + (1 - beta1) g,
    v = beta2 v + (1 - beta2) g², x -= lr (m / (sqrt(v) + eps) + weight_decay x). Afterwards each rank goes on from the
    common m with its own gradient, and the reduced mean of these replaces m everywhere. Error feedback starts from zero
    at the switch. Steps that were skipped do not count.

    Warm up until v has settled: 15 to 25 % of the steps in the paper, and beyond a warm-up of the learning rate.
    Clipping by the global norm has no meaning here: no rank knows the mean gradient, and what is applied does not scale
    with it. So has no norm of ``p.grad``, which is a rank's own.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        warmup: how many dense steps come first.
        compress: "update" or "momentum", see above.
        algorithm: what carries the momentum afterwards; default ``sparcomm.OneBitAllReduce()``; with ``mask=True``
            where most entries are idle, as in large embeddings.
        process_group, transport, timeout: see ``CollectiveOptimizer``.

    Raises:
        ConfigError: a value outside what is allowed.
    """

    COPIED = (*CollectiveOptimizer.COPIED, "warmup", "compress")

    def __init__(
        self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, *, warmup: int, compress: str = "update", algorithm: Algorithm | None = None,
        process_group: Any = None, transport: Transport | None = None, timeout: dt.timedelta | float = 300.0,
    ) -> None:  # fmt: skip
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"warmup={warmup!r}: must be a number of steps, at least 1")
        if compress not in COMPRESS:
            raise ConfigError(f"compress={compress!r}: must be one of {', '.join(COMPRESS)}")
        self.warmup, self.compress = warmup, compress
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params, defaults, OneBitAllReduce() if algorithm is None else algorithm, process_group=process_group,
            transport=transport, timeout=timeout,
        )  # fmt: skip

    @property
    def frozen(self) -> bool:
        """Whether the warm-up is over."""
        return self.steps >= self.warmup

    def _carrier(self) -> Algorithm:
        return self.algorithm if self.frozen else Dense()

    def _outgoing(self, bucket: Bucket, grad: Tensor) -> Tensor:
        if not self.frozen:
            return grad
        m, v = bucket.named("momentum"), bucket.named("second")
        for span in bucket.spans:
            here, beta = span.where, self.param_groups[span.group]["betas"][0]
            torch.lerp(grad[here], m[here], beta, out=grad[here])
            if self.compress == "update":
                grad[here].div_(self._root(v[here], span.group))
        return grad.masked_fill_(v == 0, 0)

    def _advance(self, bucket: Bucket, done: Sent, total: Tensor) -> Tensor:
        assert self._meeting is not None
        mean, (m, v) = total.div_(self._meeting.transport.size), (bucket.named("momentum"), bucket.named("second"))
        if self.frozen:
            self._follow(mean, m, v, bucket, done)
        for span in bucket.spans:
            here, (beta1, beta2) = span.where, self.param_groups[span.group]["betas"]
            if not self.frozen:
                m[here].lerp_(mean[here], 1 - beta1)
                v[here].mul_(beta2).addcmul_(mean[here], mean[here], value=1 - beta2)
            root = self._root(v[here], span.group)
            torch.div(m[here], root, out=mean[here])
        return mean

    def _follow(self, mean: Tensor, m: Tensor, v: Tensor, bucket: Bucket, done: Sent) -> None:
        """Replaces m by what came back, and clears what one bit cannot say."""
        still = v == 0
        if done.reduced.residual is not None:
            done.reduced.residual.masked_fill_(still, 0)
        m.copy_(mean.masked_fill_(still, 0))
        if self.compress == "update":
            for span in bucket.spans:
                m[span.where].mul_(self._root(v[span.where], span.group))

    def _root(self, v: Tensor, group: int) -> Tensor:
        return v.sqrt().add_(self.param_groups[group]["eps"])
