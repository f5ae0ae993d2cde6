"""What a selector is: a frozen dataclass whose fields are its configuration, and one pass that makes a ``Choice``.

Letters: n elements of the vector, m positions of a block, k asked for. Positions are int64, strictly increasing, local
to a block of a layout; whatever is picked is in range and distinct, NaN and infinities or not. Magnitudes are compared
as the kernels do (NaN > inf > finite), and ties go to the lowest position.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparcomm.clock import Range
from sparcomm.dtypes import check_gradient, working_dtype
from sparcomm.errors import ConfigError, SparcommError
from sparcomm.kernels import Kernels, kernels_for
from sparcomm.kernels.interface import Working
from sparcomm.layout import Layout, whole
from sparcomm.sparse import Sparse


@dataclass
class Memo:
    """What a selector remembers of one unit from step to step. Plain numbers, so that a checkpoint can hold them.

    A selector that re-estimates in every step never reads it. For others what ``pick`` returns depends on
    it, so that a run resumed without it picks other sets, as good as any; ``take`` of a guarded selector never does.
    One memo belongs to one place where vectors of one kind are selected from: an algorithm that selects twice in a step
    keeps two.

    Attributes:
        numel, blocks, k: what the others were found for; with other sizes they count for nothing.
        age: steps that have used them; 0 = none are known.
        threshold: what a picked magnitude exceeds; None = unknown.
        floor: a magnitude that somewhat more than 4k/3 positions of a block reach: speed only, no result depends on it.
    """

    numel: int = 0
    blocks: int = 0
    k: int = 0
    age: int = 0
    threshold: float | None = None
    floor: float | None = None

    def state(self) -> dict[str, float | int | None]:
        """All fields by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Memo:
        """The memo that gave ``state``. Raises ConfigError if none did."""
        names = {f.name for f in dataclasses.fields(cls)}
        numbers = all(value is None or isinstance(value, (int, float)) for value in state.values())
        if set(state) != names or not numbers:
            raise ConfigError(f"state of a memo must hold numbers named {', '.join(sorted(names))}, got {dict(state)}")
        return cls(**state)

    def fits(self, layout: Layout, k: int, every: int) -> bool:
        """Whether it may be used once more for ``k`` of each block, if it is to be used for ``every`` steps."""
        return 0 < self.age < every and (self.numel, self.blocks, self.k) == (layout.numel, layout.blocks, k)

    def renew(self, layout: Layout, k: int, threshold: float | None, floor: float | None) -> None:
        """Starts over with what has just been found."""
        self.numel, self.blocks, self.k = layout.numel, layout.blocks, k
        self.age, self.threshold, self.floor = 1, threshold, floor

    def expire(self) -> None:
        """The next step finds everything anew."""
        self.age = 0


class Choice(ABC):
    """A selection under way: the sums of a step, and how to choose of each block.

    Of a block it is asked once, ``take`` or ``pick``, as the kernels' ``select``, whose place it takes between
    ``merge`` and ``deduct``.

    Attributes:
        work: the sums, for ``merge``, ``deduct`` and ``settle``.
    """

    def __init__(self, kernels: Kernels, work: Working) -> None:
        self.kernels, self.work = kernels, work

    @abstractmethod
    def take(self, block: int, k: int) -> tuple[Tensor, Tensor]:
        """Exactly k: what algorithms of fixed size send.

        Args:
            k: 0 to m.

        Returns:
            (k,) positions and (k,) sums, zero for padding.
        """

    @abstractmethod
    def pick(self, block: int, k: int) -> tuple[Tensor, Tensor]:
        """As many as the selector thinks right when asked for k, up to ``Selector.most``. The host waits for them.

        Args:
            k: 0 to m.

        Returns:
            positions and sums, as many of each.
        """


class Exact(Choice):
    """Chooses the k largest of a block, always."""

    def take(self, block: int, k: int) -> tuple[Tensor, Tensor]:
        """The k largest."""
        return self.kernels.select(self.work, block, k)

    def pick(self, block: int, k: int) -> tuple[Tensor, Tensor]:
        """The k largest."""
        return self.kernels.select(self.work, block, k)


@dataclass(frozen=True)
class Selector(ABC):
    """Which entries of a vector are sent. Subclass in a file of ``sparcomm/selectors``: it is found and named there.

    ``str`` gives the text that ``make_selector`` takes, such as ``"gaussiank(guard=False)"``.

    Class attributes:
        name: what configurations and the CLI call it.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def fixed(self) -> bool:
        """Whether ``pick`` always returns exactly k."""

    @abstractmethod
    def most(self, k: int, m: int) -> int:
        """How many ``pick`` returns at most when asked for k of m."""

    def taking(self) -> Selector:
        """The cheapest selector of which ``take`` gives the same: for algorithms that never ``pick``."""
        return self

    @abstractmethod
    def start(
        self, kernels: Kernels, grad: Tensor, residual: Tensor | None, out: Tensor | None, layout: Layout, k: int,
        flags: Tensor, memo: Memo,
    ) -> Choice:  # fmt: skip
        """Sums up ``grad + residual`` and looks for what to choose, in one pass over n where that is possible.

        Args:
            grad: (n,) any gradient dtype.
            residual: (n,) working dtype, or None for zeros.
            out: (n,) working dtype, overwritten with the sum, as by ``kernels.compensate``. None: ``grad``, of the
                working dtype and with no residual, is only read, as by ``kernels.survey``; ``settle`` is then an error.
            layout: the blocks.
            k: how many of each block will be asked for, of most blocks at least; what is chosen with another k is as
                right, but may take longer.
            flags: (1,) uint8; NONFINITE is set if an element of the sum is inf or NaN.
            memo: what it remembers; changed.

        Raises:
            SparcommError: no ``out``, but a residual or a ``grad`` of 16 bits; or k is negative.
        """

    def __call__(self, x: Tensor, k: int, memo: Memo | None = None) -> Sparse:
        """Picks of a vector that is only read: positions, and values in the working dtype.

        Args:
            x: (n,) float32, float16, bfloat16 or float64, contiguous.
            k: 0 to n.
            memo: what it remembers from call to call; changed. None: it starts over.

        Raises:
            GradientError: another dtype, or not flat and contiguous.
            SparcommError: k is out of range.
        """
        check_gradient(x)
        if not 0 <= k <= x.numel():
            raise SparcommError(f"k={k} must be in [0, {x.numel()}], as many as there are")
        vector = x.detach().to(working_dtype(x.dtype))
        flags = torch.zeros(1, dtype=torch.uint8, device=x.device)
        one, kernels = whole(x.numel(), x.device), kernels_for(vector)
        choice = self.start(kernels, vector, None, None, one, k, flags, Memo() if memo is None else memo)
        return Sparse(*choice.pick(0, k), x.numel())

    def __str__(self) -> str:
        """``name`` or ``name(field=value, ...)`` with those fields that differ from their defaults."""
        values = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        given = ", ".join(f"{name}={value!r}" for name, value, default in values if value != default)
        return f"{self.name}({given})" if given else self.name


def summed(
    kernels: Kernels, grad: Tensor, residual: Tensor | None, out: Tensor | None, layout: Layout, k: int, flags: Tensor,
    floor: float | None = None,
) -> Working:  # fmt: skip
    """``compensate``, or ``survey`` where there is no ``out``; ``floor`` is one for all blocks, None = unknown."""
    working = working_dtype(grad.dtype)
    if k < 0:
        raise SparcommError(f"k={k}: must be 0 or more")
    floors = None if floor is None else torch.full((layout.blocks,), floor, dtype=working, device=grad.device)
    k = min(k, layout.length)
    if out is not None:
        with Range("compensate"):
            return kernels.compensate(grad, residual, out, layout, k, flags, floors)
    if residual is not None or grad.dtype != working:
        raise SparcommError(f"{grad.dtype} {'and a residual' if residual is not None else ''}: need an out to sum in")
    return kernels.survey(grad, layout, k, flags, floors)
