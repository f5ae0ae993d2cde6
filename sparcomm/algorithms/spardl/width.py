"""How many entries teams exchange in B-SAG: the adaptive h, which aims at unions of just the quota.

Every team cuts its block to h entries before all teams gather them; the union of d such lists has h to d·h entries,
of which k_b are kept. With h = k_b / d nothing is cut twice but little is kept; with a larger h more of the union is
thrown away. The best h depends on how much the teams agree, so it follows the unions' sizes.

Source: Zhao et al., "SparDL", ICDE 2024: adjusting the number of gradients in Spar-All-Gather. As published, the step
is (k_b - h)/100, which is 0 for blocks of fewer than some hundred entries and then never moves again; h has no upper
bound; and every worker has an h of its own. Here a step is at least 1, h stays within [max(1, k_b/d), k_b] and forgets
its pace where it meets a bound, and all ranks share one h: the sizes of the unions travel in the bags of the last
all-gather. They are read two steps later; h therefore moves every other step. On devices h stays as it starts: to read
a size would make the host wait, and a rank that alone saw damage in a last bag, whose step then counts on all others
but not on it, would go on with another h than they.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparcomm.algorithms.base import State, derived, private, shared
from sparcomm.layout import Layout
from sparcomm.selectors import Memo


def no_union() -> Tensor:
    """() int64 zero: nothing measured yet."""
    return torch.zeros((), dtype=torch.int64, device="cpu")


@dataclass
class SparDLState(State):
    """State of one unit.

    Attributes:
        layout: the cut of its vector.
        memo: what the selector remembers, as ``Memo.state`` gives it.
        latency, bandwidth: the link as measured for ``teams="auto"``: seconds, bytes per second.
        measured: between how many ranks; 0 = not yet.
        width: h as last used, 0 before the first step.
        stride: what h last moved by. coasting: the next move the same way is twice as far.
        turn: 0 in steps whose unions are measured, and before which h moves, else 1.
        union: () int64, entries in the unions of all blocks in the last step of turn 0; 0 = none yet.
    """

    layout: Layout | None = derived(default=None)
    memo: dict[str, Any] = private(default_factory=lambda: Memo().state())
    latency: float = shared(default=0.0)
    bandwidth: float = shared(default=0.0)
    measured: int = shared(default=0)
    width: int = shared(default=0)
    stride: int = shared(default=0)
    coasting: bool = shared(default=False)
    turn: int = shared(default=0)
    union: Tensor = shared(default_factory=no_union)


def moved(state: SparDLState | None, quota: int, teams: int, blocks: int) -> tuple[int, int, bool]:
    """(h, stride, coasting) of the step to come.

    Args:
        quota: k_b, entries kept of a block.
        blocks: over which the unions were counted.
    """
    low, high = max(1, quota // teams), quota
    if state is None or not state.width:
        return low, max(1, (high - low) // 100), False
    width, stride, coasting = min(max(state.width, low), high), state.stride, state.coasting
    union = 0 if state.turn else int(state.union)
    if not union:
        return width, stride, coasting
    crowded = union > blocks * quota
    if crowded != (stride > 0):  # still on the way to it
        stride, coasting = (2 * stride, False) if coasting else (stride, True)
    else:
        stride, coasting = int(-stride / 2) if abs(stride) > 1 else -stride, False
    wanted = width + stride
    width = min(max(wanted, low), high)
    if width != wanted:
        stride, coasting = (1 if stride > 0 else -1), False
    return width, stride, coasting


def following(state: SparDLState, move: tuple[int, int, bool], union: Tensor) -> SparDLState:
    """The state after a step with ``move``, whose unions had ``union`` entries in all."""
    if union.device.type != "cpu":
        return state
    width, stride, coasting = move
    seen = state.union if state.turn else union
    return dataclasses.replace(state, width=width, stride=stride, coasting=coasting, turn=1 - state.turn, union=seen)
