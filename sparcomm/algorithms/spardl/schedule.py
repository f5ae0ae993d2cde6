"""Who sends what to whom: the rounds of Spar-Reduce-Scatter, and which ways of working in teams there are."""

from __future__ import annotations

from typing import NamedTuple

from sparcomm.collectives.dense import log2_ceil

RECURSIVE, BRUCK = "r-sag", "b-sag"
SAG = ("auto", RECURSIVE, BRUCK)


class Scheme(NamedTuple):
    """``teams`` d of equal size, which meet by ``sag``: recursive doubling (R-SAG) or Bruck's all-gather (B-SAG).

    Rank r is at position r % N of team r // N, N = p / d being the ranks of a team and the blocks of the vector.
    """

    teams: int
    sag: str = RECURSIVE

    @property
    def adaptive(self) -> bool:
        """Whether the entries that teams exchange are as many as the adaptive width says."""
        return self.teams > 1 and self.sag == BRUCK

    @property
    def rounds(self) -> int:
        """Rounds in which teams meet, one message each: the same for both kinds where both are possible."""
        return log2_ceil(self.teams)


def schemes(size: int) -> list[Scheme]:
    """Every way to cut ``size`` ranks into equal teams, few teams first."""
    found: list[Scheme] = []
    for teams in (d for d in range(1, size + 1) if size % d == 0):
        if teams & (teams - 1) == 0:
            found.append(Scheme(teams, RECURSIVE))
        if teams > 1:
            found.append(Scheme(teams, BRUCK))
    return found


def log_schedule(blocks: int) -> list[tuple[int, int]]:
    """(gap, count) of every Spar-Reduce-Scatter round: a rank r sends blocks r+gap .. r+gap+count-1 to rank r+gap.

    Block numbers are modulo ``blocks``. After a round only blocks closer than its gap are still to be sent, so a block
    leaves once, after everything routed through this rank has been merged into it (paper, section on SRS).
    """
    rounds: list[tuple[int, int]] = []
    live = blocks
    for s in reversed(range(log2_ceil(blocks))):
        rounds.append((1 << s, live - (1 << s)))
        live = 1 << s
    return rounds
