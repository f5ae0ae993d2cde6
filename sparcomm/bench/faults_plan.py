"""What is injected: one fault, on one rank, at one moment, drawn from a seed."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass

# kind -> the points at which it can strike. A point is a place in the victim's code; "delay" is any time at all.
KINDS: dict[str, tuple[str, ...]] = {
    "kill": ("delay", "before", "attach", "between", "forward", "bucket", "reduce", "transfer", "commit", "flush"),
    "stall": ("delay", "before", "attach", "between", "forward", "bucket", "reduce", "transfer", "commit", "flush"),
    "raise": ("before", "between", "forward"),
    "hook": ("reduce", "transfer", "commit"),
    "leave": ("before", "between"),
    "close": ("between",),
    "differ": ("attach",),
}
ALGORITHMS = ("spardl", "direct", "topk")
FIRST_STEPS, STEPS = 3, 24  # faults strike before step STEPS; a quarter of them in the first few, where buckets change
HITS = {"attach": 6, "bucket": 3, "reduce": 3, "transfer": 12, "flush": 12}  # a point is passed about so often a step


@dataclass(frozen=True)
class Plan:
    """One injection, the same on all ranks.

    Attributes:
        victim: the rank that it happens to.
        step, count: the fault strikes when ``point`` is passed for the ``count``-th time from that step on.
        delay: seconds after the process group was made; for the point "delay".
        algorithm: one of ALGORITHMS.
        rank_hosts: whether rank 0 hosts the store, instead of a launcher.
        caught: whether survivors catch the error, or end by it.
        timeout: of the hook, in seconds.
        flaw: breaks the hook on purpose: "" | "patient" (forgets its timeout) | "leaky" (commits before the step ends).
    """

    number: int
    kind: str
    victim: int
    point: str
    step: int
    count: int
    delay: float
    algorithm: str
    rank_hosts: bool
    caught: bool
    size: int
    timeout: float
    flaw: str = ""

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        where = f"{self.delay:.2f} s" if self.point == "delay" else f"{self.point} {self.count} of step {self.step}"
        store = ", which hosts the store" if self.rank_hosts and self.victim == 0 else ""
        return f"#{self.number} {self.kind} rank {self.victim}{store} at {where}, {self.algorithm}"


def reference(number: int, algorithm: str, size: int) -> Plan:
    """A run in which nothing happens."""
    return Plan(number, "none", -1, "", STEPS + 2, 0, 0.0, algorithm, False, True, size, 30.0)


def draw(count: int, seed: int, kinds: list[str], size: int, timeout: float, flaw: str = "") -> list[Plan]:
    """``count`` plans; kinds take turns, everything else is random."""
    made = random.Random(seed)
    plans: list[Plan] = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        points = KINDS[kind]
        # Half of what can strike at any time does so.
        point = (
            "delay" if "delay" in points and made.random() < 0.5 else made.choice([p for p in points if p != "delay"])
        )
        early = made.random() < 0.25
        plans.append(
            Plan(
                number, kind, made.randrange(size), point,
                step=0 if point in ("before", "attach") else made.randrange(FIRST_STEPS if early else STEPS),
                count=made.randint(1, HITS.get(point, 1)), delay=made.uniform(0, 0.8),
                algorithm=made.choice(ALGORITHMS), rank_hosts=made.random() < 0.2, caught=made.random() < 0.5,
                size=size, timeout=timeout, flaw=flaw,
            )
        )  # fmt: skip
    return plans
