"""The flat vectors of an optimizer that communicates: which parameter lies where, the same on all ranks."""

# The foreach functions are what torch.optim itself is made of, and have no public names.
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparcomm.algorithms.base import Algorithm, State, field_kinds, get_field, set_field
from sparcomm.clock import Clock
from sparcomm.dtypes import GRADIENT_DTYPES, working_dtype
from sparcomm.errors import CheckpointError, GradientError
from sparcomm.workspace import Workspace


class Span(NamedTuple):
    """Parameters of one group, side by side in a bucket.

    Attributes:
        group: its number in ``param_groups``.
        params: in their order.
        where: their positions in the bucket.
    """

    group: int
    params: list[Tensor]
    where: slice


class Bucket:
    """All parameters of one working dtype on one device, as one vector of n elements; group by group.

    Attributes:
        flat: (n,) vectors that outlive a step, by name, such as "momentum".
        residual: (n,) what this rank owes, or None.
        owner, state: the algorithm that has reduced this bucket last, and what it remembers; None before.
        space: free buffers.
        clock: seconds spent reducing, per phase.
    """

    def __init__(self, number: int, dtype: torch.dtype, device: torch.device, spans: Sequence[Span]) -> None:
        self.number, self.dtype, self.device, self.spans = number, dtype, device, spans
        self.numel = spans[-1].where.stop
        self.params = [p for span in spans for p in span.params]
        self.flat: dict[str, Tensor] = {}
        self.residual: Tensor | None = None
        self.owner: Algorithm | None = None
        self.state: State | None = None
        self.space, self.clock = Workspace(), Clock()

    def take(self) -> Tensor:
        """(n,), contents undefined; ``space.give`` it back."""
        return self.space.take(self.numel, self.dtype, self.device)

    def named(self, name: str) -> Tensor:
        """The vector of that name, zeros at first."""
        if name not in self.flat:
            self.flat[name] = torch.zeros(self.numel, dtype=self.dtype, device=self.device)
        return self.flat[name]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter's part of ``flat`` (n,), in its shape, sharing memory."""
        parts = flat.split([p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]

    def gradient(self, scale: Tensor | None) -> Tensor:
        """(n,) this rank's own gradient, divided by ``scale``; zeros for parameters that have none.

        Raises GradientError for a sparse layout.
        """
        flat = self.take()
        with_grad: list[Tensor] = []
        grads: list[Tensor] = []
        for p, view in zip(self.params, self.views(flat), strict=True):
            if p.grad is None:
                view.zero_()
                continue
            if p.grad.layout != torch.strided:
                raise GradientError(
                    f"gradient has layout {p.grad.layout}, and only dense gradients can be sent: "
                    "use nn.Embedding(..., sparse=False)"
                )
            with_grad.append(view)
            grads.append(p.grad)
        if grads:
            torch._foreach_copy_(with_grad, grads)
        return flat if scale is None else flat.div_(scale)

    def use(self, algorithm: Algorithm, size: int) -> State:
        """The state of ``algorithm``; another than the last one starts afresh, owing nothing."""
        if self.state is None or self.owner != algorithm:
            self.space.give(self.residual)
            self.owner, self.residual = algorithm, None
            self.state = algorithm.init(self.numel, self.dtype, self.device, size)
        self.state.unit, self.state.workspace, self.state.clock = self.number, self.space, self.clock
        self.state.wants_sent, self.state.wants_total = False, True
        return self.state

    # ---- checkpoints ------------------------------------------------------------------------------------------

    @property
    def shape(self) -> str:
        """What must fit when it is loaded, as text."""
        return f"{self.numel} {str(self.dtype).removeprefix('torch.')} of {len(self.params)} parameters"

    def state_dict(self) -> dict[str, Any]:
        """Copies of all that outlives a step, as plain values and tensors."""
        state = self.state
        kinds = [] if state is None else field_kinds(state)
        fields = {
            name: _copy(get_field(state, name)) for name, kind in kinds if state is not None and kind != "derived"
        }
        return {
            "shape": self.shape,
            "flat": {name: t.clone() for name, t in self.flat.items()},
            "residual": _copy(self.residual),
            "algorithm": repr(self.owner),
            "state": fields,
        }

    def check_fits(self, saved: dict[str, Any]) -> None:
        """Raises CheckpointError if ``saved``, what ``state_dict`` gave, is of other parameters."""
        if saved["shape"] != self.shape:
            raise CheckpointError(f"the optimizer's state is for {saved['shape']}, the parameters are {self.shape}")

    def load(self, saved: dict[str, Any], algorithm: Algorithm, size: int, *, own: bool) -> None:
        """Takes up what ``state_dict`` gave, and which fits.

        Args:
            algorithm: the one that the next step will use.
            own: whether this rank of as many ranks had saved it; otherwise nothing is owed, and ``algorithm`` starts
                afresh.
        """
        self.flat = {name: _copy(t.to(self.device)) for name, t in saved["flat"].items()}
        self.owner, self.state, self.residual = None, None, None
        if own and saved["algorithm"] == repr(algorithm):
            state = self.use(algorithm, size)
            for name, value in saved["state"].items():
                set_field(state, name, _copy(value.to(self.device) if isinstance(value, Tensor) else value))
            residual = saved["residual"]
            self.residual = None if residual is None else _copy(residual.to(self.device))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def make_buckets(groups: Sequence[dict[str, Any]]) -> list[Bucket]:
    """Buckets of all parameters that require a gradient, in the order in which dtypes and devices first come.

    Raises GradientError for a dtype that gradients cannot have.
    """
    found: dict[tuple[torch.dtype, torch.device], list[Span]] = {}
    for number, group in enumerate(groups):
        for (dtype, device), params in _alike(group["params"]):
            spans = found.setdefault((dtype, device), [])
            start = spans[-1].where.stop if spans else 0
            spans.append(Span(number, params, slice(start, start + sum(p.numel() for p in params))))
    return [Bucket(i, *key, spans) for i, (key, spans) in enumerate(found.items())]


def _alike(params: Sequence[Tensor]) -> Iterator[tuple[tuple[torch.dtype, torch.device], list[Tensor]]]:
    """Those that require a gradient, by working dtype and device."""
    found: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for p in params:
        if not p.requires_grad:
            continue
        if p.dtype not in GRADIENT_DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in GRADIENT_DTYPES)
            raise GradientError(f"a parameter has dtype {p.dtype}, must be one of {allowed}")
        found.setdefault((working_dtype(p.dtype), p.device), []).append(p)
    yield from found.items()
