"""What ranks know of the steps before, all of them the same: how many keys there were, and how large the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparcomm.algorithms.base import State, private, shared
from sparcomm.selectors import Memo

UNKNOWN = -1
NOTHING = -(1 << 20)  # the exponent of zero: below all others
ENDLESS = 1 << 20  # that of inf and NaN
ABOVE = 12  # the most that ``peak`` is above a step's own: more, and integers would hardly tell its values apart


@dataclass
class S2State(State):
    """State of one unit.

    Attributes:
        memo: what the selector remembers, as ``Memo.state`` gives it.
        union: keys in the last step's union; UNKNOWN before there was one.
        crest: the largest union of late, which falls by an eighth of the difference a step.
        peak: all magnitudes of late were below two to the power of it; falls by one a step, and at
            once to ABOVE of what a step has. None = unknown.
        latency, bandwidth: the link as measured for ``decoder="auto"``: seconds, bytes per second.
        measured: between how many ranks; 0 = not yet.
    """

    memo: dict[str, Any] = private(default_factory=lambda: Memo().state())
    union: int = shared(default=UNKNOWN)
    crest: int = shared(default=0)
    peak: int | None = shared(default=None)
    latency: float = shared(default=0.0)
    bandwidth: float = shared(default=0.0)
    measured: int = shared(default=0)

    def after(self, union: int, peak: int | None) -> dict[str, Any]:
        """What changes with a step of ``union`` keys, whose magnitudes were below 2^``peak`` (None: not looked at)."""
        crest = max(union, self.crest - -(-max(self.crest - union, 0) // 8))
        if peak is None or not NOTHING < peak < ENDLESS:
            peak = self.peak
        elif self.peak is not None:
            peak = max(peak, min(self.peak - 1, peak + ABOVE))
        return {"union": union, "crest": crest, "peak": peak}
