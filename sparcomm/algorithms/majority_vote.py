"""signSGD with majority vote: every rank votes on the sign of every element, and the majority's comes back.

Source: Bernstein et al., "signSGD with Majority Vote is Communication Efficient and Fault Tolerant", ICLR 2019
(arXiv 1810.05291), with its momentum (Signum); error feedback after Karimireddy et al., "Error Feedback Fixes SignSGD",
ICML 2019. Votes go to the owner of each chunk, and the owners' verdicts to all: 1 + ceil(log2 p) rounds and 2(p-1) bags
of n/p bits, where the published code sends all votes to one rank.

Deviations:

- Any number of ranks, of any length. Ties (every other element at p = 2, under noise) and zeros go up in the published
  code; here they do as often as down by default, so that what is undecided stands still.
- ``scale``: the mean of |x| of each chunk in front of its votes, of 8 significant bits, and the sum of these times the
  vote comes back: gradients' own units, which plain SGD and its learning rates want.
- ``error_feedback``: ranks keep what a sign times their scale leaves out, and so do owners. An owner therefore decides
  by the sign of V, the sum of the other ranks' signs, each times its scale, and its *own exact* values, which owe
  nothing to a sign. A plain count of votes would not do. What is delivered is T times the verdict, so the owner has
  to keep V - T·verdict for nothing to be lost. Take a coordinate at which 5 of 8 ranks say up, step after step: a
  count says up every time, and delivers 8 scales where 2 came; 6 a step are owed the other way, and no vote ever pays
  them back. Deciding by V, which has them in it, pays them back as soon as they outweigh the votes: verdicts up and
  down alternate so that their mean is that of the votes. V's signs are the votes' wherever nothing is owed and scales
  are alike. V is the owner's gradient + residual with the others' added, so V - T·verdict *is* its next residual there.
- T is the sum of the other ranks' scales times p / (p-1), or the mean of |V| where that is more. The first keeps what
  is owed bounded: one step's votes add up to less. The owner's own scale is left out, because its residual holds what
  is owed, so that T would feed on itself. An owner whose own gradient exceeds the others' by far is not covered by
  this. There what is owed grows until the mean of |V| exceeds it, and then shrinks, as in all error feedback with
  mean-scaled signs: V - mean|V|·sgn V is shorter than V. With one rank the mean is all there is.

Fault tolerance (a rank that sends a wrong gradient, however large, has one vote) is that of plain votes. With ``scale``
such a rank still cannot turn a sign, but it can make steps longer; with ``error_feedback`` votes weigh as much as their
scales, and the owner's values count in full, so it can do what it could to a mean. launch/adversaries.py shows the
first.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparcomm.algorithms.base import Algorithm, Cost, Reduced, State, derived, per_element
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.signs import Cut, Signs, check_flag, check_rule
from sparcomm.dtypes import working_dtype
from sparcomm.errors import ConfigError
from sparcomm.kernels import kernels_for
from sparcomm.kernels.interface_bits import RULES
from sparcomm.memory import compensated, owing
from sparcomm.transport.base import Transport


@dataclass
class SignumState(State):
    """State of one unit with momentum.

    Attributes:
        momentum: (n,) working dtype, of this rank's own gradients.
        superseded: the one before, free as soon as a step starts from this state.
    """

    momentum: Tensor = per_element(default_factory=lambda: torch.zeros(0, device="cpu"))
    superseded: Tensor | None = derived(default=None)


@dataclass(frozen=True)
class MajorityVote(Algorithm):
    """The sign that most ranks' gradients have, as a mean of +1 or -1, or with a scale; optionally error feedback.

    By default what training sees is signSGD: ``torch.optim.SGD`` without momentum, with a learning rate as for Adam or
    less, moves every weight by the learning rate in each step, and weight decay added by the optimizer has little to
    say against a gradient of 1: use a decoupled one (``sparcomm.optim``). All entries have one magnitude, so clipping
    by a global norm has no meaning behind it.

    Args:
        zero: the vote of zeros: "positive" and "negative", as the published code and others have it, or "alternate": a
            hash of position and step, the same on all ranks, so that zeros vote for each as often. Without ``mask``.
        tie: the verdict where votes are equal, in the same way.
        mask: send a second bit that tells zeros apart. A rank abstains where it has a zero, else the zeros of p - 1
            ranks would outvote the only one with a gradient; a position that is zero on every rank comes back as
            zero. Doubles the bytes.
        scale: the sum is the vote times the sum of the ranks' mean magnitudes of the chunk, instead of times p.
        error_feedback: ranks and owners keep what signs leave out, and votes weigh as much as their scales; needs
            ``scale``.
        momentum: beta of Signum, in [0, 1): votes are on m = beta·m + (1 - beta)·gradient, kept by every rank for
            itself. Error feedback is then about m. Dense steps, such as warm-up's, leave m as it is.
    """

    name: ClassVar[str] = "majority-vote"
    zero: str = field(default="alternate", metadata={"choices": RULES})
    tie: str = field(default="alternate", metadata={"choices": RULES})
    mask: bool = False
    scale: bool = False
    error_feedback: bool = False
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_rule("zero", self.zero)
        check_rule("tie", self.tie)
        for name in ("mask", "scale", "error_feedback"):
            check_flag(name, getattr(self, name))
        if self.error_feedback and not self.scale:
            raise ConfigError(
                "error_feedback=True needs scale=True: what a sign leaves out depends on what it is worth"
            )
        m: Any = self.momentum
        if isinstance(m, bool) or not isinstance(m, (int, float)) or not 0 <= m < 1:
            raise ConfigError(f"momentum={m!r}: must be a number in [0, 1)")

    @property
    def conserves(self) -> bool:
        """With error feedback, and of the gradients themselves only if there is no momentum."""
        return self.error_feedback and not self.momentum

    @property
    def coarse(self) -> bool:
        """One bit says little of a value: most of it may still be owed."""
        return True

    @classmethod
    def cases(cls, size: int) -> list[Algorithm]:
        """Every rule, plain and masked, scaled, with error feedback and momentum."""
        return [
            cls(),
            cls("positive", "positive"),
            cls("negative", "alternate", scale=True),
            cls(mask=True, tie="negative", momentum=0.5),
            cls("positive", scale=True, error_feedback=True),
            cls(mask=True, scale=True, error_feedback=True),
            cls(scale=True, error_feedback=True, momentum=0.9),
        ]

    def init(self, n: int, dtype: torch.dtype, device: torch.device, size: int) -> State:
        """A fresh state: momentum starts from zero."""
        return (
            SignumState(momentum=torch.zeros(n, dtype=working_dtype(dtype), device=device))
            if self.momentum
            else State()
        )

    def _cut(self, n: int, size: int) -> Cut:
        return Cut(n, size, self.scale, self.mask)

    def _fed(self, grad: Tensor, state: State) -> tuple[Tensor, State]:
        """(what is voted on, the next state)."""
        if not self.momentum:
            return grad, state
        assert isinstance(state, SignumState)
        m = torch.empty_like(state.momentum) if state.superseded is None else state.superseded
        state.superseded = None  # the next call from this state, if this one's is dropped, needs another
        fed = grad if grad.dtype == m.dtype else m.copy_(grad)
        torch.lerp(state.momentum, fed, 1 - self.momentum, out=m)
        return m, replace(state, momentum=m, superseded=state.momentum)

    def _reduce(self, grad: Tensor, residual: Tensor | None, state: State, step: int, transport: Transport) -> Reduced:
        n, space, p = grad.numel(), state.workspace, transport.size
        bags = Bags(kernels_for(grad), state.unit, step, grad.device, state.damage)
        with state.clock.span("code"):
            fed, after = self._fed(grad, state)
            total = space.take(n, working_dtype(grad.dtype), grad.device)
        signs = Signs(self._cut(n, p), self.zero, bags, transport, state.clock, space)
        if self.error_feedback:
            with state.clock.span("code"):
                x = owing(fed, residual, space)
            others = p / max(p - 1, 1)
            signs.compensate(x, lambda mean, scales: torch.maximum(mean, scales * others), total)
        else:
            signs.vote(fed if residual is None else compensated(fed, residual), self.tie, total)
            x = None
        state.damage = after.damage = bags.damage()
        return Reduced(total, x, None, after, bags.ok())

    def cost(self, n: int, dtype: torch.dtype, size: int, state: State | None = None) -> Cost:
        """Exact, and the same for every rank and dtype."""
        return Cost(*self._cut(n, size).traffic) if n else Cost(0, 0, 0)

    def kept(self, n: int, size: int) -> int:
        """All n."""
        return n
