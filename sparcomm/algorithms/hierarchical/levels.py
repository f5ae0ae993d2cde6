"""What two levels are made of: the algorithm of each, the ranks of a node, and their state."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from sparcomm.algorithms.base import Algorithm, State, derived, nested, registry
from sparcomm.collectives.nodes import Nodes
from sparcomm.collectives.slices import Slices
from sparcomm.errors import ConfigError


@dataclass
class HierarchicalState(State):
    """State of one unit: the cut into slices, and what the two algorithms remember of the unit and of the slice.

    Attributes:
        slices: one for each rank of a node.
    """

    inner: State = nested(default_factory=State)
    outer: State = nested(default_factory=State)
    slices: Slices | None = derived(default=None)


def _named(name: str) -> Algorithm:
    """An algorithm by its name: files of algorithms do not import one another."""
    return registry()[name]()


@dataclass(frozen=True)
class Levels(Algorithm):
    """The two algorithms, their nodes, and what follows from what they are; see ``Hierarchical``."""

    inner: Algorithm = field(default_factory=partial(_named, "dense"))
    outer: Algorithm = field(default_factory=partial(_named, "spardl"))
    local_size: int | None = None
    groups: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("inner", "outer"):
            given: Any = getattr(self, name)
            if not isinstance(given, Algorithm):
                raise ConfigError(f"{name}={given!r}: must be an algorithm, such as sparcomm.Dense()")
        self.nodes.check_settings()

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def density(self) -> float:
        """That of ``outer``, if it has one."""
        found: float = getattr(self.outer, "density")  # noqa: B009  no algorithm need have one
        return found

    def with_density(self, density: float) -> Algorithm:
        """With ``outer`` at another density."""
        return replace(self, outer=self.outer.with_density(density))

    @property
    def conserves(self) -> bool:
        """If both algorithms do."""
        return self.inner.conserves and self.outer.conserves

    @property
    def exact(self) -> bool:
        """If both algorithms are."""
        return self.inner.exact and self.outer.exact

    @property
    def coarse(self) -> bool:
        """If one of the algorithms is."""
        return self.inner.coarse or self.outer.coarse

    @property
    def static(self) -> bool:
        """If both algorithms are."""
        return self.inner.static and self.outer.static

    @property
    def agreed(self) -> bool:
        """If both algorithms' are."""
        return self.inner.agreed and self.outer.agreed

    @property
    def checked(self) -> bool:
        """If both algorithms are."""
        return self.inner.checked and self.outer.checked

    @property
    def sparse(self) -> bool:
        """If one of the algorithms is."""
        return self.inner.sparse or self.outer.sparse

    # ---- nodes -----------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> Nodes:
        """How ranks are cut into nodes."""
        return Nodes(self.local_size, self.groups)

    def check_size(self, size: int) -> None:
        """Wants nodes of one size, known to this rank, and algorithms that can run over the ranks that they get."""
        self.nodes.check_size(size)
        self.inner.check_size(self.nodes.per_node)
        self.outer.check_size(size // self.nodes.per_node)
        self.init(1, torch.float32, torch.device("cpu"), size)

    def surroundings(self) -> dict[str, str]:
        """The environment's number of ranks per node, where that counts; and what both algorithms say."""
        return {**self.nodes.surroundings(), **self.inner.surroundings(), **self.outer.surroundings()}
