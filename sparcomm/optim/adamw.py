"""AdamW that feeds its second moment only with means that are exactly the dense ones.

Late deliveries of error feedback are large and rare, and what Adam divides by sees their squares: a steady gradient
that arrives once in 100 steps moves a weight by 0.06 to 0.1 of what it does when it arrives every step. Here the first
moment is fed by every mean, the second one only in steps that were dense (warm-up, or those of a ``Refresh`` schedule),
as 1-bit Adam holds it after its warm-up and 0/1 Adam renews it at growing intervals. What arrives late then moves a
weight by its full size. ``sparcomm.AdamCorrection`` goes further and needs no dense steps: docs/tuning.md compares.

Sources: Tang et al., "1-bit Adam", ICML 2021 (arXiv 2102.02888); Lu et al., "Maximizing Communication Efficiency for
Large-scale Training via 0/1 Adam", ICLR 2023 (arXiv 2202.06009).
"""

# The foreach functions are what torch.optim itself is made of, and have no public names.
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparcomm.errors import ConfigError


class Hook(Protocol):
    """What of a HookState is asked."""

    def was_dense(self, parameter: Tensor) -> bool:
        """Whether the last mean of this parameter's gradients was exactly the dense one."""
        ...


class AdamW(Optimizer):
    """Adam with decoupled weight decay, whose second moment is fed by dense means only.

    As ``torch.optim.AdamW`` wherever every step is dense, and without a hook.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: decay of the first and the second moment; the second one counts dense steps.
        eps: added to the root of the second moment.
        weight_decay: decoupled: weights shrink by lr·weight_decay in a step.
        hook: the HookState that ``sparcomm.attach`` returned; ``optimizer.hook = state`` can give it later.
        floor: between dense steps no entry is divided by less than the root of this share of its parameter's mean
            second moment: an entry that was idle in the dense steps must not leap at its first delivery.

    Raises:
        ConfigError: a value outside what is allowed.
    """

    feeds_second_moment_densely = True  # no warning from ``attach``
    hook: Hook | None = None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        hook: Hook | None = None,
        floor: float = 0.01,
    ) -> None:
        for name, value, least, end in (
            ("lr", lr, 0, math.inf), ("betas[0]", betas[0], 0, 1), ("betas[1]", betas[1], 0, 1),
            ("eps", eps, 0, math.inf), ("weight_decay", weight_decay, 0, math.inf), ("floor", floor, 0, math.inf),
        ):  # fmt: skip
            if not least <= value < end:
                raise ConfigError(f"{name}={value!r}: must be a number in [{least}, {end})")
        self.hook = hook
        super().__init__(
            params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "floor": floor}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step over all parameters that have a gradient. Returns what ``closure`` returns.

        Raises:
            ConfigError: a sparse-layout gradient, or a parameter that has never had a dense mean.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            with_grad: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            dense: list[bool] = [self.hook is None or self.hook.was_dense(p) for p in with_grad]
            for wanted in (True, False):
                for some in _alike(p for p, d in zip(with_grad, dense, strict=True) if d is wanted):
                    self._update(some, group, dense=wanted)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any], *, dense: bool) -> None:
        """One step of parameters with the same history, on one device and of one dtype."""
        grads = [p.grad for p in params if p.grad is not None]
        states = [self._state_of(p) for p in params]
        beta1, beta2 = group["betas"]
        for state in states:
            state["step"] += 1
            state["dense_steps"] += dense
        first: list[Tensor] = [s["exp_avg"] for s in states]
        second: list[Tensor] = [s["exp_avg_sq"] for s in states]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        if dense:
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        elif not all(s["dense_steps"] for s in states):
            raise ConfigError(
                "sparcomm.optim.AdamW has had no dense step to learn its second moment from: attach with dense steps "
                "first, sparcomm.attach(ddp, algorithm, warmup=sparcomm.Refresh(warmup=100))"
            )
        by = torch._foreach_sqrt(second)  # noqa: SLF001
        # Parameters that have joined later have another count; nearly always there is only one.
        for at, state in enumerate(states):
            by[at].div_(math.sqrt(1 - beta2 ** state["dense_steps"]))
            if not dense and group["floor"]:
                # A tensor, not a number: the host must not wait for a device here.
                torch.maximum(by[at], by[at].square().mean().mul_(group["floor"]).sqrt_(), out=by[at])
        torch._foreach_add_(by, group["eps"])
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        sizes = [-group["lr"] / (1 - beta1 ** s["step"]) for s in states]
        torch._foreach_addcdiv_(params, first, by, sizes)

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            if p.grad is not None and p.grad.is_sparse:
                raise ConfigError("sparcomm.optim.AdamW takes no gradients of sparse layout")
            state["step"] = state["dense_steps"] = 0
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


def _alike(params: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Groups by device and dtype, as the foreach functions want them."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in params:
        found.setdefault((p.device, p.dtype), []).append(p)
    return found.values()
