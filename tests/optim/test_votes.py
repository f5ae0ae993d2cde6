"""SignSGD, Signum and Distributed Lion against their definitions, written out rank by rank in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparcomm import ConfigError, Dense, MajorityVote
from sparcomm.optim import DistributedLion, SignSGD, Signum
from sparcomm.transport import sim
from sparcomm.transport.base import Transport
from support.optim import assert_same_bits, flat, gradients, parameters, train

STEPS, LR, DECAY = 6, 0.01, 0.1
SIZES = [1, 2, 3, 5]


def flat_gradient(rank: int, step: int) -> Tensor:
    return torch.cat([g.double().reshape(-1) for g in gradients(rank, step)])


def by_definition(kind: str, size: int, dense: bool) -> Tensor:
    """What ``STEPS`` steps come to; ties go down."""
    x = flat(parameters())
    own = [torch.zeros_like(x) for _ in range(size)]
    for step in range(STEPS):
        voted: list[Tensor] = []
        for rank in range(size):
            g = flat_gradient(rank, step)
            if kind == "sign":
                voted.append(g)
            elif kind == "signum":
                own[rank] = 0.9 * own[rank] + 0.1 * g
                voted.append(own[rank])
            else:
                voted.append(0.9 * own[rank] + 0.1 * g)
                own[rank] = 0.99 * own[rank] + 0.01 * g
        total = torch.stack(voted if dense else [v.sign() for v in voted]).sum(0)
        verdict = total.sign() if dense else torch.where(total > 0, 1.0, -1.0).double()
        x = x - LR * (verdict + DECAY * x)
    return x


@pytest.mark.parametrize("dense", [False, True], ids=["vote", "dense"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "make"), [("sign", SignSGD), ("signum", Signum), ("lion", DistributedLion)])
def test_it_is_what_its_definition_says(kind: str, make: Any, size: int, dense: bool) -> None:
    algorithm = Dense() if dense else MajorityVote(tie="negative")
    found = train(make, size, STEPS, lr=LR, weight_decay=DECAY, algorithm=algorithm)
    assert_same_bits(found)
    torch.testing.assert_close(found[0], by_definition(kind, size, dense), rtol=0, atol=1e-6)


def test_lions_zeros_and_ties_go_down_as_published() -> None:
    def rank(transport: Transport) -> list[float]:
        p = nn.Parameter(torch.zeros(4))
        optimizer = DistributedLion([p], lr=1.0, transport=transport)
        p.grad = torch.tensor([0.0, 1.0, -1.0, 1.0 if transport.rank else -1.0])
        optimizer.step()
        return p.tolist()

    assert sim.run(2, rank).results == [[1.0, -1.0, 1.0, 1.0]] * 2


def test_zeros_stay_where_they_are_with_a_mask() -> None:
    def rank(transport: Transport) -> list[float]:
        p = nn.Parameter(torch.zeros(3))
        optimizer = SignSGD([p], lr=1.0, transport=transport, algorithm=MajorityVote(mask=True))
        p.grad = torch.tensor([0.0, 1.0, 1.0 if transport.rank else 0.0])
        optimizer.step()
        return p.tolist()

    assert sim.run(3, rank).results == [[0.0, -1.0, -1.0]] * 3


@pytest.mark.parametrize("size", [1, 3])
def test_groups_have_settings_of_their_own(size: int) -> None:
    def rank(transport: Transport) -> tuple[list[Tensor], list[Tensor]]:
        before, params = parameters(), parameters()
        groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "weight_decay": 0.25, "momentum": 0.0}]
        optimizer = Signum(groups, lr=0.125, transport=transport)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return [p.detach() for p in before], [p.detach() for p in params]

    for before, after in sim.run(size, rank).results:
        for old, new in zip(before[:2], after[:2], strict=True):
            torch.testing.assert_close(new, old - 0.5)
        for old, new in zip(before[2:], after[2:], strict=True):
            torch.testing.assert_close(new, old * (1 - 0.125 * 0.25) - 0.125)


def test_rates_that_a_scheduler_sets_are_taken() -> None:
    p = nn.Parameter(torch.zeros(1))
    optimizer = SignSGD([p], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(3):
        p.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
    assert p.item() == -1.75


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (SignSGD, {"lr": -1.0}, "lr=-1.0"),
        (SignSGD, {"lr": "fast"}, "lr='fast'"),
        (Signum, {"momentum": 1.0}, "momentum=1.0"),
        (Signum, {"weight_decay": float("nan")}, "weight_decay=nan"),
        (DistributedLion, {"betas": (0.9, 1.0)}, "betas"),
        (DistributedLion, {"betas": (0.9,)}, "betas=.*two numbers"),
        (Signum, {"algorithm": MajorityVote}, "algorithm"),
        (Signum, {"algorithm": MajorityVote(momentum=0.5)}, "on top of Signum's own"),
        (DistributedLion, {"algorithm": MajorityVote(momentum=0.5)}, "on top of DistributedLion's own"),
        (Signum, {"process_group": object(), "transport": object()}, "not both"),
    ],
)
def test_values_outside_are_refused(make: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make(parameters(), **settings)


def test_a_groups_own_values_are_looked_at_too() -> None:
    with pytest.raises(ConfigError, match="momentum=2"):
        Signum([{"params": parameters(), "momentum": 2}])
    optimizer = Signum(parameters())
    for settings in ({"lr": -1.0}, {"momentum": 1.0}):
        with pytest.raises(ConfigError):
            optimizer.add_param_group({"params": parameters(), **settings})
        assert len(optimizer.param_groups) == 1
    with pytest.raises(ConfigError, match=r"betas=0\.9: must be two"):
        DistributedLion([{"params": parameters(), "betas": 0.9}])
