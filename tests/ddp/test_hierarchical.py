"""Two levels behind the hook over real ranks: exact at density 1, refused alike. See test_checkpoint.py for saving."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

import sparcomm
from sparcomm import ConfigError, ConfigMismatch, Hierarchical, SparDL
from sparcomm.algorithms import Algorithm
from support.pool import pool
from support.training import SIZES, Fed, gradient_step, integers, net_step, small_net, wrap

TIMEOUT = 30.0
TWO_NODES = Hierarchical(outer=SparDL(density=0.05), local_size=2)


def against_plain(rank: int, size: int, algorithm: Algorithm) -> float:
    """The largest difference of the weights to plain DDP after ten steps; means of integers must be exact."""
    plain, hooked = wrap(small_net()), wrap(small_net())
    state = sparcomm.attach(hooked, algorithm, timeout=TIMEOUT)
    for ddp in (plain, hooked):
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        for step in range(10):
            net_step(ddp, optimizer, rank, step)
    pairs = zip(plain.parameters(), hooked.parameters(), strict=True)
    far = max(float((a - b).detach().abs().max()) for a, b in pairs)
    state.close()
    fed = wrap(Fed())
    state = sparcomm.attach(fed, algorithm, timeout=TIMEOUT)
    for step in range(4):
        means = gradient_step(fed, integers(SIZES, rank, step))
        everyone = [integers(SIZES, r, step) for r in range(size)]
        assert all(torch.equal(m, sum(g[i] for g in everyone) / size) for i, m in enumerate(means))
    state.close()
    return far


@pytest.mark.parametrize("fields", [{"local_size": 2}, {"groups": ((0, 2), (1, 3))}, {"local_size": 4}], ids=str)
def test_density_1_trains_as_plain_ddp(fields: dict[str, object]) -> None:
    algorithm = Hierarchical(outer=SparDL(density=1.0), **fields)  # type: ignore[arg-type]
    assert all(far < 1e-5 for far in pool(4).run(against_plain, algorithm))


def scheduled(rank: int, size: int) -> list[int]:
    """Bytes by step under a schedule of densities."""
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, TWO_NODES, warmup=lambda step: (1.0, 0.5, None, 0.1, 0.05)[min(step, 4)])
    sent = [0]
    for step in range(6):
        gradient_step(ddp, integers(SIZES, rank, step))
        sent.append(state.traffic.bytes_sent)
    state.close()
    return [after - before for before, after in itertools.pairwise(sent)]


def test_a_schedule_of_densities_reaches_the_outer_algorithm() -> None:
    for first, second, _, tenth, last, again in pool(4).run(scheduled):
        assert first > second > tenth > last == again


def refused(rank: int, size: int, algorithm: Algorithm, told: list[str]) -> str:
    was = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = told[rank]
    try:
        with pytest.raises(ConfigError) as caught:
            sparcomm.attach(wrap(Fed()), algorithm, timeout=TIMEOUT)
    finally:
        os.environ.pop("LOCAL_WORLD_SIZE") if was is None else os.environ.update(LOCAL_WORLD_SIZE=was)
    assert isinstance(caught.value, ConfigMismatch) == (len(set(told)) > 1)
    return str(caught.value)


@pytest.mark.parametrize(("algorithm", "told", "says"), [
    (Hierarchical(), ["3", "3", "3", "1"], "LOCAL_WORLD_SIZE (ranks 0, 1, 2: 3; rank 3: 1)"),
    (Hierarchical(), ["3"] * 4, "4 ranks make nodes of 3, 1, where 3 were asked for"),
    (Hierarchical(), ["none"] * 4, "LOCAL_WORLD_SIZE='none'"),
    (Hierarchical(groups=((0, 1),)), ["4"] * 4, "every rank from 0 to 3 once"),
])  # fmt: skip
def test_nodes_that_do_not_fit_are_an_error_of_attach_on_every_rank(
    algorithm: Algorithm, told: list[str], says: str
) -> None:
    for text in pool(4).run(refused, algorithm, told, timeout=20):
        assert says in text
