"""1-bit Adam against Adam without bias correction, written here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparcomm import ConfigError, Dense, OneBitAllReduce
from sparcomm.optim import OneBitAdam
from sparcomm.optim.onebit import COMPRESS
from sparcomm.transport import sim
from sparcomm.transport.base import Transport
from support.optim import assert_same_bits, mean_gradients, parameters, train

BETAS, EPS, LR, DECAY = (0.9, 0.95), 1e-3, 0.01, 0.1


def adam(size: int, steps: int, freeze: int) -> Tensor:
    """Adam without bias correction on mean gradients, in float64; its second moment stays from step ``freeze`` on."""
    weights = [p.detach().double() for p in parameters()]
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(steps):
        for i, g in enumerate(mean_gradients(size, step)):
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            if step < freeze:
                v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g * g
            weights[i] = weights[i] - LR * (m[i] / (v[i].sqrt() + EPS) + DECAY * weights[i])
    return torch.cat([w.reshape(-1) for w in weights])


def settings(**changed: Any) -> dict[str, Any]:
    return {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "warmup": 5, **changed}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_warm_up_is_adam_without_bias_correction(size: int) -> None:
    found = train(OneBitAdam, size, 5, **settings())
    assert_same_bits(found)
    torch.testing.assert_close(found[0], adam(size, 5, 5), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compress", ["update", "momentum"])
@pytest.mark.parametrize("size", [1, 3])
def test_with_an_exact_sum_it_is_adam_with_a_frozen_second_moment(size: int, compress: str) -> None:
    found = train(OneBitAdam, size, 12, **settings(algorithm=Dense(), compress=compress))
    assert_same_bits(found)
    torch.testing.assert_close(found[0], adam(size, 12, 5), rtol=1e-4, atol=1e-5)
    assert (found[0] - adam(size, 12, 12)).abs().max() > 1e-3  # which going on with v is not


def quadratic(transport: Transport, decades: int, **changed: Any) -> tuple[float, Tensor, int]:
    """Distance to the minimum of a quadratic with noisy gradients, whose sizes span so many decades; weights; bytes
    after the warm-up.
    """
    made = torch.Generator().manual_seed(5)
    goal, scale = torch.randn(100, generator=made), 10 ** torch.linspace(-decades, 0, 100)
    x = nn.Parameter(torch.zeros(100))
    optimizer = OneBitAdam([x], lr=0.03, betas=(0.9, 0.99), warmup=60, transport=transport, **changed)
    before = 0
    for step in range(240):
        noise = torch.randn(100, generator=torch.Generator().manual_seed(1000 * step + transport.rank))
        x.grad = scale * (x.detach() - goal + 0.3 * noise)
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 240)
        optimizer.step()
        before = before if optimizer.frozen else optimizer.traffic.bytes_sent
    distance = float((x.detach() - goal).square().mean())
    return distance, x.detach(), optimizer.traffic.bytes_sent - before


def test_one_bit_learns_nearly_what_the_exact_mean_does() -> None:
    def distances(decades: int, *ways: tuple[str, Any]) -> list[tuple[float, int]]:
        found: list[tuple[float, int]] = []
        for compress, algorithm in ways:
            ranks = sim.run(
                3, lambda t, c=compress, a=algorithm: quadratic(t, decades, compress=c, algorithm=a)
            ).results
            assert_same_bits([weights for _, weights, _ in ranks])
            found.append((ranks[0][0], ranks[0][2]))
        return found

    exact, update, momentum = distances(6, ("update", Dense()), *((c, OneBitAllReduce()) for c in COMPRESS))
    assert exact[0] < 2e-3  # from 1
    assert update[0] < 1.5 * exact[0]
    assert update[1] < 0.25 * exact[1]  # 100 entries: headers and roll calls count
    assert momentum[0] > 10 * exact[0]  # one scale for all drowns the small ones, where they are very small
    ((near, _),) = distances(2, ("momentum", OneBitAllReduce()))
    assert near < 1.5 * exact[0]


def with_idle_entries(transport: Transport, seed: int, mask: bool) -> float:
    """Distance to the minimum over those 100 of 1000 entries, at random places, that ever have a gradient."""
    made = torch.Generator().manual_seed(seed)
    goal, live = torch.randn(1000, generator=made), torch.randperm(1000, generator=made)[:100]
    x, algorithm = nn.Parameter(torch.zeros(1000)), OneBitAllReduce(mask=mask)
    optimizer = OneBitAdam([x], lr=0.03, betas=(0.9, 0.99), warmup=60, transport=transport, algorithm=algorithm)
    for step in range(240):
        noise = torch.randn(1000, generator=torch.Generator().manual_seed(1000 * step + transport.rank))
        x.grad = torch.zeros(1000)
        x.grad[live] = (x.detach() - goal + 0.3 * noise)[live]
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 240)
        optimizer.step()
    return float((x.detach() - goal)[live].square().mean())


def test_where_most_entries_are_idle_a_mask_tells_them_apart() -> None:
    """Without it their zeros count in the scales, which are then too small for the rest. By seed it varies much."""
    plain, masked = (
        sum(sim.run(3, lambda t, s=seed, m=mask: with_idle_entries(t, s, m)).results[0] for seed in (1, 2, 3))
        for mask in (False, True)
    )
    assert plain > 2 * masked


@pytest.mark.parametrize("compress", ["update", "momentum"])
def test_entries_that_were_zero_in_the_warm_up_do_not_move(compress: str) -> None:
    def rank(transport: Transport) -> tuple[Tensor, Tensor, Tensor]:
        p = nn.Parameter(torch.ones(40))
        optimizer = OneBitAdam([p], lr=0.1, warmup=3, compress=compress, transport=transport)
        for step in range(9):
            grad = torch.randn(40, generator=torch.Generator().manual_seed(10 * step + transport.rank))
            grad[:20] = 1e3 if step > 5 else 0.0  # it comes too late
            p.grad = grad
            optimizer.step()
        (saved,) = optimizer.state_dict()["collective"]["buckets"]
        return p.detach(), saved["flat"]["momentum"], saved["residual"]

    found = sim.run(2, rank).results
    assert_same_bits([weights for weights, _, _ in found])
    for weights, momentum, residual in found:
        assert torch.equal(weights[:20], torch.ones(20))
        assert (weights[20:] != 1).all()
        assert not momentum[:20].any()
        assert not residual[:20].any()
        assert momentum[20:].abs().max() < 10


def test_error_feedback_starts_at_zero_at_the_switch() -> None:
    def rank(transport: Transport) -> list[bool]:
        p = nn.Parameter(torch.ones(40))
        optimizer = OneBitAdam([p], lr=0.1, warmup=3, transport=transport)
        owing: list[bool] = []
        for step in range(5):
            p.grad = torch.randn(40, generator=torch.Generator().manual_seed(10 * step + transport.rank))
            assert optimizer.frozen == (step >= 3)
            optimizer.step()
            (saved,) = optimizer.state_dict()["collective"]["buckets"]
            owing.append(saved["residual"] is not None and bool(saved["residual"].any()))
        return owing

    assert sim.run(2, rank).results == [[False, False, False, True, True]] * 2


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"warmup": 0}, "warmup=0"), ({"warmup": True}, "warmup=True"), ({"warmup": 2.0}, "warmup=2.0"),
        ({"compress": "gradient"}, "compress='gradient'.*update, momentum"), ({"eps": 0.0}, "eps=0.0"),
        ({"eps": 1e-50}, "eps=1e-50"),  # 0 in float32, and 0/0 where there never was a gradient
    ],
)  # fmt: skip
def test_values_outside_are_refused(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        OneBitAdam(parameters(), **{"warmup": 3, **changed})
