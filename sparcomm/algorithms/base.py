"""What an all-reduce algorithm is: a frozen dataclass whose fields are its configuration, and one verb, ``reduce``."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sparcomm.clock import Clock
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.dense import dense_traffic, ordered_all_reduce
from sparcomm.dtypes import check_gradient, working_dtype
from sparcomm.kernels import kernels_for
from sparcomm.layout import Layout
from sparcomm.memory import compensated, nothing_owed
from sparcomm.transport.base import Transport
from sparcomm.workspace import Workspace


class Cost(NamedTuple):
    """What one ``reduce`` makes the busiest rank send. Exact if the algorithm is static, else an upper bound."""

    rounds: int
    messages: int
    bytes_sent: int


class Part(NamedTuple):
    """Entries of a sum that all lie in one block, as ``kernels.scatter(out, *part)`` takes them.

    Attributes:
        index: (k,) int64, strictly increasing local positions; some may be padding.
        value: (k,) working dtype.
        layout, block: what the positions are local to.
    """

    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    value: Tensor
    layout: Layout
    block: int


def write_out(parts: Sequence[Part], out: Tensor) -> Tensor:
    """Writes a sum given in ``parts`` to ``out`` (n,), whose dtype values are cast to: zeros elsewhere; returns it."""
    kernels = kernels_for(out)
    if [part.block for part in parts] == list(range(parts[0].layout.blocks if parts else -1)):
        kernels.expand(out, [part.index for part in parts], [part.value for part in parts], parts[0].layout)
    else:
        out.zero_()
        for index, value, layout, block in parts:
            kernels.scatter(out, index, value.to(out.dtype), layout, block)
    return out


def sent_at(index: Tensor, where: Tensor, n: int) -> Tensor:
    """``Reduced.sent``: those of ``index`` (k,), distinct positions, at which ``where`` (k,) is true; below ``n``."""
    if index.device.type == "cpu":
        return index[where & (index < n)].sort().values
    mask = torch.zeros(n + 1, dtype=torch.bool, device=index.device)
    mask[index.clamp(max=n)] = where  # all padding falls on the last place
    return mask[:n]


def positions(sent: Tensor | None) -> Tensor | None:
    """``Reduced.sent`` as positions, for which the host may have to wait."""
    return sent.nonzero().flatten() if sent is not None and sent.dtype == torch.bool else sent


class Reduced(NamedTuple):
    """What ``reduce`` returns. Buffers belong to the caller, who may hand them to ``state.workspace`` when done.

    Attributes:
        total: (n,) working dtype: the SUM over ranks, the same bits on every rank. Undefined where ``ok`` is false.
            None if there are ``parts`` instead.
        residual: (n,) working dtype, pending: what this rank still owes. None = nothing.
        sent: sorted int64 positions whose own mass left this rank; None = all. On a device it may be (n,) bool
            instead, True there, since the host would have to wait for how many they are.
        state: the pending state.
        ok: () bool, the same on all ranks: no inf or NaN in any gradient, residual or sum.
        parts: the sum's entries, no position twice, the same bits on every rank; everywhere else the sum is zero.
            Given instead of ``total``, and only if ``state.wants_total`` is false. Values may be changed in place.
    """

    total: Tensor | None
    residual: Tensor | None
    sent: Tensor | None
    state: State
    ok: Tensor
    parts: Sequence[Part] | None = None


def per_element(**kwargs: Any) -> Any:
    """A State field of length n: stored by parameter, remapped like residuals."""
    return field(metadata={"kind": "per_element"}, **kwargs)


def shared(**kwargs: Any) -> Any:
    """A State field that is small and identical on all ranks of the group that the algorithm reduces over.

    Saved, and carried over a change of buckets. Loaded at another number of ranks, rank 0's serves all.
    """
    return field(metadata={"kind": "shared"}, **kwargs)


def private(**kwargs: Any) -> Any:
    """A State field of plain values that is this rank's own, such as an estimate to start from.

    Saved, and carried over a change of buckets. Loaded at another number of ranks, rank 0's serves all.
    """
    return field(metadata={"kind": "private"}, **kwargs)


def derived(**kwargs: Any) -> Any:
    """A State field that is recomputed, never saved."""
    return field(metadata={"kind": "derived"}, **kwargs)


def nested(**kwargs: Any) -> Any:
    """A State field that is itself a State, of an algorithm within this one; its own fields count, by dotted name."""
    return field(metadata={"kind": "nested"}, **kwargs)


@dataclass
class State:
    """What an algorithm remembers between steps of one unit. Each field is of one of the kinds above.

    Attributes:
        unit: number of the compression unit, in every bag's header.
        clock: seconds spent per phase, added to by ``reduce``.
        workspace: free buffers; give back what you are done with.
        wants_sent: whether ``Reduced.sent`` is needed; without it ``sent`` is not worked out and None.
        wants_total: whether ``Reduced.total`` is needed; without it ``reduce`` may give ``Reduced.parts`` instead, so
            that whoever wants the sum elsewhere, or a mean, writes all n elements only once.
        damage: on devices that the host does not wait for, a (1,) uint8 that keeps wire.DAMAGED once it was seen.
    """

    unit: int = derived(default=0)
    clock: Clock = derived(default_factory=Clock)
    workspace: Workspace = derived(default_factory=Workspace)
    wants_sent: bool = derived(default=True)
    wants_total: bool = derived(default=True)
    damage: Tensor | None = derived(default=None)

    def lend(self, other: State, *, wants_sent: bool, wants_total: bool) -> None:
        """Gives the state of an algorithm within this one what belongs to no step: number, clock, buffers, damage."""
        other.unit, other.clock, other.workspace, other.damage = self.unit, self.clock, self.workspace, self.damage
        other.wants_sent, other.wants_total = wants_sent, wants_total


def field_kinds(state: State) -> list[tuple[str, str]]:
    """(name, "per_element" | "shared" | "private" | "derived") of a State's fields; nested ones by dotted names."""
    found: list[tuple[str, str]] = []
    for f in dataclasses.fields(state):
        kind = f.metadata.get("kind", "derived")
        if kind == "nested":
            found += [(f"{f.name}.{name}", of) for name, of in field_kinds(getattr(state, f.name))]
        else:
            found.append((f.name, kind))
    return found


def get_field(state: State, name: str) -> Any:
    """The value of a field by its name in ``field_kinds``."""
    return attrgetter(name)(state)


def set_field(state: State, name: str, value: Any) -> None:
    """Sets a field by its name in ``field_kinds``."""
    owner, _, own = name.rpartition(".")
    setattr(attrgetter(owner)(state) if owner else state, own, value)


@dataclass(frozen=True)
class Algorithm(ABC):
    """An all-reduce of flat gradients. Subclass in a file of ``sparcomm/algorithms``: see docs/adding-an-algorithm.md.

    Class attributes:
        name: what configurations and the CLI call it.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def conserves(self) -> bool:
        """Whether sum(grad + residual before) == total + sum(residual after) over ranks."""

    @property
    def exact(self) -> bool:
        """Whether what is conserved is so bit for bit wherever the arithmetic is exact; else to rounding only."""
        return True

    @property
    def coarse(self) -> bool:
        """Whether a rank may still owe much at a position that it has sent: one bit says little, so may a sketch."""
        return False

    @property
    def static(self) -> bool:
        """Whether message sizes are independent of the step's data."""
        return True

    @property
    def agreed(self) -> bool:
        """Whether all ranks know every message's length beforehand, be it from data that the host waits for."""
        return self.static

    @property
    def remedy(self) -> str:
        """What to configure instead where lengths have to be ``agreed``."""
        return "indices='elias-fano' and a selector of a fixed number, such as 'topk'"

    @property
    def checked(self) -> bool:
        """Whether every byte received is covered by a bag's checksum."""
        return True

    @property
    def sparse(self) -> bool:
        """Whether it may send a part of the entries and owe the others."""
        return False

    @property
    def ordered(self) -> bool:
        """Whether it is nothing but the sum in rank order, so that its reduce-scatter gives every rank its part."""
        return False

    def check_size(self, size: int) -> None:  # noqa: B027  most run over any number of ranks
        """Raises ConfigError where this cannot run over ``size`` ranks, on all of them alike."""

    def with_density(self, density: float) -> Algorithm:
        """The same at another density, for schedules; of algorithms that have one."""
        changed: dict[str, Any] = {"density": density}
        return dataclasses.replace(self, **changed)

    @classmethod
    @abstractmethod
    def cases(cls, size: int) -> list[Algorithm]:
        """Every legal kind of configuration at this number of ranks, for the property suite."""

    def init(self, n: int, dtype: torch.dtype, device: torch.device, size: int) -> State:
        """A fresh state for gradients of n elements of ``dtype`` reduced over ``size`` ranks."""
        return State()

    def reduce(self, grad: Tensor, residual: Tensor | None, state: State, step: int, transport: Transport) -> Reduced:
        """Sums ``grad + residual`` over the ranks of ``transport``. Collective.

        ``grad`` and ``residual`` are never modified. Of ``state`` only the derived fields are: they belong to no step.

        Args:
            grad: (n,) float32, float16, bfloat16 or float64, contiguous.
            residual: (n,) in the working dtype, or None for zeros.
            state: from ``init`` or the last committed step.
            step: number of this step, the same on all ranks.

        Raises:
            GradientError: integer, complex or sparse-layout gradient.
            CommunicationError: a peer failed, disagreed, or sent damaged bytes. The residual is then unchanged.
        """
        check_gradient(grad)
        if grad.numel() == 0:
            total = torch.empty(0, dtype=working_dtype(grad.dtype), device=grad.device)
            return Reduced(total, None, None, state, torch.ones((), dtype=torch.bool, device=grad.device))
        return self._reduce(grad, residual, state, step, transport)

    @abstractmethod
    def _reduce(self, grad: Tensor, residual: Tensor | None, state: State, step: int, transport: Transport) -> Reduced:
        """``reduce`` for a valid gradient of at least one element."""

    @abstractmethod
    def cost(self, n: int, dtype: torch.dtype, size: int, state: State | None = None) -> Cost:
        """What the busiest rank sends in one ``reduce`` of n elements of ``dtype`` over ``size`` ranks."""

    @abstractmethod
    def kept(self, n: int, size: int) -> int:
        """How many entries of ``total`` can be non-zero, whatever the gradient's dtype."""

    def delivers_all(self, n: int, dtype: torch.dtype, size: int) -> bool:
        """Whether a ``reduce`` of n elements always gives the whole sum and leaves nothing behind."""
        return n == 0

    def fields(self) -> dict[str, Any]:
        """The configuration, by field name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def surroundings(self) -> dict[str, str]:
        """What else decides how it works and must be the same on all ranks, such as environment variables."""
        return {}


def registry() -> dict[str, type[Algorithm]]:
    """Every algorithm by its name, sorted."""
    package, found = importlib.import_module(__name__.rpartition(".")[0]), dict[str, type[Algorithm]]()
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, Algorithm) and not inspect.isabstract(cls):
                found[cls.name] = cls
    return dict(sorted(found.items()))


class Summed(NamedTuple):
    """What a sparse reduce comes to: the sum, (n,) or in disjoint parts; residual; ``Reduced.sent``; new state."""

    total: Tensor | Sequence[Part]
    residual: Tensor | None
    sent: Tensor | None
    state: State


@dataclass(frozen=True)
class SparseAlgorithm(Algorithm):
    """Sends a part of the entries, or all of them by the dense all-reduce where that takes fewer bytes.

    Which of the two is decided by n, dtype and size alone, so that all ranks decide alike.
    """

    @property
    def sparse(self) -> bool:
        """Always: even where all is sent densely, what a cast rounds off is owed."""
        return True

    @abstractmethod
    def _sparse_cost(self, n: int, size: int, state: State | None = None) -> Cost:
        """Cost of the sparse way, for n >= 1, before a step that starts from ``state`` (None: a fresh one)."""

    @abstractmethod
    def _sparse_kept(self, n: int, size: int) -> int:
        """How many entries the sparse way can leave non-zero, for n >= 1."""

    @abstractmethod
    def _sparse_reduce(
        self, grad: Tensor, residual: Tensor | None, state: State, bags: Bags, transport: Transport
    ) -> Summed:
        """The sum, the new residual, ``sent``, and the new state."""

    def _usual_bytes(self, n: int, size: int) -> int:
        """Bytes that the sparse way sends as a rule, where its cost is only a bound."""
        return self._sparse_cost(n, size).bytes_sent

    def _is_dense(self, n: int, dtype: torch.dtype, size: int) -> bool:
        return dense_traffic(n, working_dtype(dtype).itemsize, size)[2] < self._usual_bytes(n, size)

    def delivers_all(self, n: int, dtype: torch.dtype, size: int) -> bool:
        """Where the dense all-reduce takes over."""
        return n == 0 or self._is_dense(n, dtype, size)

    def cost(self, n: int, dtype: torch.dtype, size: int, state: State | None = None) -> Cost:
        """The same for every rank, and exact if ``static``."""
        if n == 0:
            return Cost(0, 0, 0)
        if self._is_dense(n, dtype, size):
            return Cost(*dense_traffic(n, working_dtype(dtype).itemsize, size))
        return self._sparse_cost(n, size, state)

    def kept(self, n: int, size: int) -> int:
        """What the sparse way keeps, or all n where the dense all-reduce takes over."""
        if n == 0 or self._is_dense(n, torch.float32, size):
            return n
        return min(n, self._sparse_kept(n, size))

    def _reduce(self, grad: Tensor, residual: Tensor | None, state: State, step: int, transport: Transport) -> Reduced:
        n, dtype, space = grad.numel(), working_dtype(grad.dtype), state.workspace
        bags = Bags(kernels_for(grad), state.unit, step, grad.device, state.damage)
        if self._is_dense(n, grad.dtype, transport.size):
            total = space.take(n, dtype, grad.device)
            ordered_all_reduce(compensated(grad, residual), total, bags, transport, state.clock, space)
            summed = Summed(total, nothing_owed(grad, space), None, state)
        else:
            summed = self._sparse_reduce(grad, residual, state, bags, transport)
        total, owed, sent, after = summed
        state.damage = after.damage = bags.damage()  # in both: whichever is gone on with
        if isinstance(total, Tensor):
            return Reduced(total, owed, sent, after, bags.ok())
        if not state.wants_total:
            return Reduced(None, owed, sent, after, bags.ok(), total)
        with state.clock.span("code"):
            written = write_out(total, space.take(n, dtype, grad.device))
        return Reduced(written, owed, sent, after, bags.ok())
