"""Sub-groups that are made once and live as long as the group they were cut from."""

from __future__ import annotations

import pytest
import torch

from sparcomm.collectives.groups import split_once
from sparcomm.errors import ConfigError, PeerError
from sparcomm.transport import sim
from sparcomm.transport.base import Transport
from sparcomm.transport.torchdist import TorchTransport
from support.pool import pool


def check(t: Transport) -> None:
    before = vars(t.traffic).copy()
    team = split_once(t, "teams", t.rank % 2, -t.rank)
    cross = split_once(t, "cross", t.rank // 2, t.rank)
    assert vars(t.traffic) == before, "making groups is set-up"
    assert split_once(t, "teams", t.rank % 2, -t.rank) is team, "made once"
    assert team is not cross
    members = [r for r in reversed(range(t.size)) if r % 2 == t.rank % 2]
    assert (team.rank, team.size) == (members.index(t.rank), len(members))
    gathered = torch.empty(team.size, dtype=torch.int64)
    team.all_gather(gathered, torch.tensor(t.rank))
    assert gathered.tolist() == members
    inner = split_once(team, "teams", team.rank, 0)
    assert (inner.rank, inner.size) == (0, 1), "a group of a group, of the same name"
    evens = (t.size + 1) // 2
    assert dict(team.siblings) == {c: n for c, n in ((0, evens), (1, t.size - evens)) if n}, "known to every rank"
    assert dict(t.siblings) == {}
    with pytest.raises(ConfigError, match=r"sub-group 'teams' was made with color \d and key -?\d.*another name"):
        split_once(t, "teams", t.rank % 2, t.rank + 1)
    t.close()
    assert not t.subgroups
    for group in (team, cross, inner):
        with pytest.raises(PeerError, match="closed"):
            group.all_reduce(torch.ones(1))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_sub_groups_are_made_once_in_the_simulator(size: int) -> None:
    sim.run(size, check)


def on_gloo(rank: int, size: int) -> None:
    check(TorchTransport.from_group(timeout=20))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_sub_groups_are_made_once_on_gloo(size: int) -> None:
    pool(size).run(on_gloo)
