"""What is fed to an algorithm in place of the gradient: error feedback, plain or with the optimizer's work done first.

With plain error feedback an algorithm gets the gradient, and what it does not send is its residual. An optimizer with
momentum then repeats late deliveries long after their time, and one that divides by a second moment takes a late
delivery for a huge gradient. Both corrections move that work in front of the selection, so that what is delivered late
is what the optimizer would have applied meanwhile. docs/tuning.md says when to use which.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparcomm.dtypes import working_dtype
from sparcomm.errors import ConfigError
from sparcomm.workspace import Workspace


@dataclass(frozen=True)
class ErrorFeedback:
    """Plain error feedback: what was not sent is added to the next gradient.

    Source: Stich et al., "Sparsified SGD with Memory", NeurIPS 2018.
    """


@dataclass(frozen=True)
class MomentumCorrection:
    """Momentum before the selection; to be used with an optimizer that has none of its own.

    Every rank keeps a velocity u = momentum·u + gradient, and the algorithm gets u as its gradient (with ``nesterov``:
    gradient + momentum·u). Where this rank's mass has left, u is zeroed (``masking``), since its momentum belongs to
    deliveries that were late. Where everything leaves at once (dense steps, density 1) nothing was late and nothing
    is zeroed: there the result is SGD with momentum exactly.

    Source: Lin et al., "Deep Gradient Compression", ICLR 2018 (arXiv 1712.01887), sections 3.1 to 3.3.

    Args:
        momentum: in [0, 1).
        nesterov: Nesterov's form.
        masking: zero the velocity where it was sent ("momentum factor masking").

    Raises:
        ConfigError: a momentum outside [0, 1), or a flag that is none.
    """

    momentum: float = 0.9
    nesterov: bool = False
    masking: bool = True

    def __post_init__(self) -> None:
        m: Any = self.momentum
        if isinstance(m, bool) or not isinstance(m, (int, float)) or not 0 <= m < 1:
            raise ConfigError(f"momentum={m!r}: must be a number in [0, 1)")
        for name in ("nesterov", "masking"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be True or False")

    def feed(
        self, grad: Tensor, velocity: Tensor | None, workspace: Workspace, step: int, spans: Iterable[slice]
    ) -> tuple[Tensor, Tensor]:
        """(what the algorithm gets, the next velocity), both (n,) in the working dtype; arguments are not modified.

        Args:
            grad: (n,) this rank's gradient.
            velocity: (n,) working dtype, or None for zeros.
            workspace: lends the buffers; the two may be one.
            step: number of the step, from 0.
            spans: the parameters' places in the vector.
        """
        working = working_dtype(grad.dtype)
        following = workspace.take(grad.numel(), working, grad.device)
        if velocity is None:
            following.copy_(grad)
        else:
            torch.add(grad, velocity, alpha=self.momentum, out=following)
        if not self.nesterov:
            return following, following
        fed = workspace.take(grad.numel(), working, grad.device)
        torch.add(grad, following, alpha=self.momentum, out=fed)
        return fed, following


@dataclass(frozen=True)
class AdamCorrection:
    """Adam's division before the selection; for an optimizer that neither divides nor has momentum: plain ``SGD``.

    Every rank keeps the second moment v of its own gradients, without bias, and the algorithm gets
    gradient / (sqrt(v) + eps) as its gradient. So v sees every gradient in its step, never a late delivery, and nothing
    has to be synchronised for it. ``torch.optim.SGD(..., weight_decay=w)`` behind it, which has no momentum, moves
    weights as AdamW with beta1 = 0 does, with decoupled weight decay; error feedback averages over so many steps that
    a first moment only adds delay. v is of this rank's part of a batch alone, hence noisier than that of the mean, and
    steps are up to sqrt(p) shorter: try learning rates from Adam's to twice that.

    Source: Chen et al., "Quantized Adam with Error Feedback", ACM TIST 2021 (arXiv 2004.14180), with beta1 = 0 and
    Adam's correction of the bias.

    Args:
        beta2: decay of the second moment, in [0, 1).
        eps: added to the root, positive.

    Raises:
        ConfigError: a value outside what is allowed.
    """

    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        beta2: Any = self.beta2
        eps: Any = self.eps
        if isinstance(beta2, bool) or not isinstance(beta2, (int, float)) or not 0 <= beta2 < 1:
            raise ConfigError(f"beta2={beta2!r}: must be a number in [0, 1)")
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
            raise ConfigError(f"eps={eps!r}: must be a positive number")

    masking = False  # v is no momentum: nothing of it has been sent

    def feed(
        self, grad: Tensor, second: Tensor | None, workspace: Workspace, step: int, spans: Iterable[slice]
    ) -> tuple[Tensor, Tensor]:
        """(what the algorithm gets, the next second moment), both (n,) working dtype; arguments are not modified.

        Args:
            grad: (n,) this rank's gradient.
            second: (n,) working dtype, what the last call gave, or None if there was none.
            workspace: lends the buffers.
            step: number of the step, from 0; makes the bias's correction.
            spans: the parameters' places in the vector.
        """
        working = working_dtype(grad.dtype)
        g = grad.to(working)
        n, device = grad.numel(), grad.device
        following, fed = workspace.take(n, working, device), workspace.take(n, working, device)
        # Adam's v / (1 - beta2^t) obeys the same rule with this weight, so that no biased copy has to be kept.
        old = self.beta2 * (1 - self.beta2**step) / (1 - self.beta2 ** (step + 1))
        if second is None and step:
            # A rank that joins late: single squares would stay for 1 / (1 - beta2) steps, however small they are.
            for span in spans:
                following[span] = g[span].square().mean()
            second, old = following, 1.0
        for part in _parts(n, device):
            now = following[part]
            if second is None:
                torch.square(g[part], out=now)
            else:
                torch.mul(second[part], old, out=now).addcmul_(g[part], g[part], value=1 - old)
            now.clamp_(max=torch.finfo(working).max)  # a square that overflows would silence its entry for good
            torch.sqrt(now, out=fed[part]).add_(self.eps)
            torch.div(g[part], fed[part], out=fed[part])
        return fed, following


def _parts(n: int, device: torch.device) -> Iterable[slice]:
    """Slices of n elements that stay in a core's cache over several operations; elsewhere than on CPUs, one."""
    step = 1 << 16 if device.type == "cpu" else max(n, 1)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


Correction = MomentumCorrection | AdamCorrection
Memory = ErrorFeedback | MomentumCorrection | AdamCorrection
