"""Compression units: which parameters are reduced together, and what is remembered about them.

Units are the hook's own, not DDP's: a bucket's number and content change (DDP's first iteration has one bucket, the
second one rebuilds), so everything remembered is kept by parameter. A *partition* is a list of units. The first step's
buckets make a provisional one; the next step's buckets make the final one, which takes over what the first left, and
stays. Buckets that differ from the units later (after a resume, DDP starts with one bucket again) are cut or joined.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparcomm.algorithms.base import Algorithm, State, field_kinds, get_field, set_field
from sparcomm.ddp.storage import Storage
from sparcomm.dtypes import working_dtype
from sparcomm.errors import HookError
from sparcomm.transport.base import Traffic
from sparcomm.workspace import Workspace

SMALL = ("shared", "private")  # kinds of fields that a unit hands over whole


@dataclass(eq=False)
class Unit:
    """Parameters that are reduced as one flat vector, and their committed state.

    Attributes:
        number: its position in the partition, the same on all ranks.
        params: in the order in which they lie in the vector.
        dtype, device: of the gradient.
        algorithm: what reduces it, by default.
        skipped: whether its parameters are among those that always travel dense.
        residual: (numel,) as ``Storage`` keeps it, or None for zeros.
        velocity: (numel,) working dtype, of momentum correction, or None for zeros.
        rates: learning rates by id of parameter at the last committed step, where residuals follow them.
        plain: whether the last step's mean was exactly that of the gradients.
        traffic: what reducing this unit has moved so far.
    """

    number: int
    params: tuple[Tensor, ...]
    dtype: torch.dtype
    device: torch.device
    algorithm: Algorithm
    state: State
    skipped: bool = False
    residual: Tensor | None = None
    velocity: Tensor | None = None
    rates: dict[int, float] = field(default_factory=dict[int, float])
    plain: bool = False
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def numel(self) -> int:
        """Elements of the flat vector."""
        return sum(p.numel() for p in self.params)

    def tensors(self) -> Iterator[Tensor]:
        """Those of the algorithm's state that are kept from step to step."""
        fields = (get_field(self.state, name) for name, kind in field_kinds(self.state) if kind != "derived")
        return (value for value in fields if isinstance(value, Tensor))

    def spans(self) -> Iterator[tuple[Tensor, slice]]:
        """Every parameter with its place in the flat vector."""
        start = 0
        for p in self.params:
            yield p, slice(start, start + p.numel())
            start += p.numel()


class Piece(NamedTuple):
    """Elements ``source`` of a bucket are elements ``target`` of ``unit``."""

    unit: Unit
    source: slice
    target: slice


@dataclass
class Carried:
    """Committed state by parameter (keys are ids of live parameters): what a new partition starts from.

    Attributes:
        residual: flat tensors as ``Storage`` keeps them; a parameter that owes nothing is absent.
        velocity: flat working-dtype tensors of momentum correction.
        rates: learning rates at the last committed step.
        per_element: the algorithm's own fields of that kind, by field name.
        shared: the shared and private fields of the unit that the parameter belonged to.
    """

    residual: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    velocity: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    rates: dict[int, float] = field(default_factory=dict[int, float])
    per_element: dict[str, dict[int, Tensor]] = field(default_factory=dict[str, "dict[int, Tensor]"])
    shared: dict[int, dict[str, Any]] = field(default_factory=dict[int, "dict[str, Any]"])


class Partition:
    """Units in the order of their numbers. ``final``: later buckets are cut or joined to fit."""

    def __init__(self, final: bool = False, storage: Storage | None = None) -> None:
        self.units: list[Unit] = []
        self.final = final
        self._storage = storage or Storage("float32")
        self.workspace = Workspace()  # shared: units of equal length share buffers
        self._home: dict[int, tuple[Unit, slice]] = {}

    def add(
        self, params: Sequence[Tensor], dtype: torch.dtype, device: torch.device,
        algorithm: Algorithm, size: int, carried: Carried, *, skipped: bool = False, wants_sent: bool = False,
    ) -> Unit:  # fmt: skip
        """Appends a unit of ``params`` that starts from ``carried``, which is copied."""
        numel = sum(p.numel() for p in params)
        state = algorithm.init(numel, dtype, device, size)
        unit = Unit(len(self.units), tuple(params), dtype, device, algorithm, state, skipped)
        state.unit, state.workspace, state.wants_sent = unit.number, self.workspace, wants_sent
        state.wants_total = dtype != working_dtype(dtype)
        residual = _join(unit, carried.residual, working_dtype(dtype))
        unit.residual = None if residual is None else self._storage.adopt(residual)
        unit.velocity = _join(unit, carried.velocity, working_dtype(dtype))
        unit.rates = {id(p): carried.rates[id(p)] for p in params if id(p) in carried.rates}
        for name, kind in field_kinds(state):
            if kind == "per_element" and name in carried.per_element:
                fresh: Tensor = get_field(state, name)
                joined = _join(unit, carried.per_element[name], fresh.dtype)
                set_field(state, name, fresh if joined is None else joined)
            elif kind in SMALL and params:
                old = carried.shared.get(id(params[0]), {})
                set_field(state, name, _copied(old.get(name, get_field(state, name)), device))
        self.units.append(unit)
        for p, span in unit.spans():
            self._home[id(p)] = (unit, span)
        return unit

    def unit_of(self, param: Tensor) -> Unit | None:
        """The unit that a parameter belongs to, if there is one."""
        return self._home[id(param)][0] if id(param) in self._home else None

    @property
    def known(self) -> set[int]:
        """Ids of the parameters that have a unit."""
        return set(self._home)

    def whole(self, params: Sequence[Tensor]) -> Unit | None:
        """The unit that consists of exactly these parameters in this order, if there is one."""
        unit = self._home[id(params[0])][0] if params and id(params[0]) in self._home else None
        if unit is None or len(unit.params) != len(params):
            return None
        return unit if all(a is b for a, b in zip(unit.params, params, strict=True)) else None

    def pieces(self, params: Sequence[Tensor]) -> list[Piece]:
        """How a bucket of these parameters is cut. Raises HookError for a parameter that no unit has."""
        found: list[Piece] = []
        start = 0
        for p in params:
            if id(p) not in self._home:
                raise HookError(
                    f"a parameter of shape {tuple(p.shape)} belongs to no compression unit: the module's parameters "
                    "changed after training began, or after the checkpoint was taken, or the HookState serves another "
                    "DDP module too; make a new DDP module and attach"
                )
            unit, target = self._home[id(p)]
            found.append(Piece(unit, slice(start, start + p.numel()), target))
            start += p.numel()
        return found

    def carry(self) -> Carried:
        """The committed state by parameter; views, not copies."""
        carried = Carried()
        for unit in self.units:
            kinds = field_kinds(unit.state)
            shared = {name: get_field(unit.state, name) for name, kind in kinds if kind in SMALL}
            carried.rates.update(unit.rates)
            for p, span in unit.spans():
                if unit.residual is not None:
                    carried.residual[id(p)] = unit.residual[span]
                if unit.velocity is not None:
                    carried.velocity[id(p)] = unit.velocity[span]
                for name, kind in kinds:
                    if kind == "per_element":
                        carried.per_element.setdefault(name, {})[id(p)] = get_field(unit.state, name)[span]
                if shared:
                    carried.shared[id(p)] = shared
        return carried


def _join(unit: Unit, by_param: dict[int, Tensor], dtype: torch.dtype) -> Tensor | None:
    """One flat vector from parameters' own, zeros where there is none; None if there is none at all."""
    if not any(id(p) in by_param for p in unit.params):
        return None
    joined = torch.zeros(unit.numel, dtype=dtype, device=unit.device)
    for p, span in unit.spans():
        if id(p) in by_param:
            joined[span] = by_param[id(p)]
    return joined


def _copied(value: Any, device: torch.device) -> Any:
    """A shared field's value for a new unit: tensors are copied, since units must not share what a step replaces."""
    return value.detach().clone().to(device) if isinstance(value, Tensor) else value
