"""The parts of a run that need no second process: models, optimizers, learning rates, fingerprints."""

from __future__ import annotations

import itertools

import pytest
import torch

from jobs import models
from jobs.engine import build_model, build_optimizer, learning_rate
from jobs.group import fingerprint, seed_everything
from jobs.settings import CharLM, Digits, Embedding, Schedule, validate
from jobs.traffic import dense_bytes, trainable


def test_digits_model_has_the_size_that_compression_is_for() -> None:
    model = build_model(Digits(name="digits"))
    assert 300_000 < trainable(model) < 1_000_000
    assert not list(model.buffers())  # DDP would broadcast them beside the hook
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_charlm_model_has_the_size_that_compression_is_for() -> None:
    model = build_model(CharLM(name="charlm"))
    assert 1_000_000 < trainable(model) < 3_000_000
    assert not list(model.buffers())
    assert model(torch.zeros(2, 16, dtype=torch.long)).shape == (2, 16, 98)


def test_the_gram_model_is_mostly_its_table() -> None:
    for layout in ("dense", "sparse"):
        model = build_model(Embedding(name="embedding", layout=layout))
        assert model.table.weight.numel() > 0.95 * trainable(model)
        x = torch.randint(0, 24576, (5, 8))
        logits = model(x)
        assert logits.shape == (5, 255)
        models.loss(logits, torch.zeros(5, dtype=torch.long)).backward()
        grad = model.table.weight.grad
        assert grad.is_sparse == (layout == "sparse")
        assert set(grad.to_dense().abs().sum(1).nonzero().view(-1).tolist()) <= set(x.flatten().tolist())


def test_charlm_sees_no_later_character() -> None:
    seed_everything(1)
    model = build_model(CharLM(name="charlm", layers=2, width=32, heads=2, context=8)).eval()
    x = torch.randint(0, 98, (1, 8))
    changed = x.clone()
    changed[0, 5] = (x[0, 5] + 1) % 98
    before, after = model(x), model(changed)
    torch.testing.assert_close(before[0, :5], after[0, :5])
    assert not torch.allclose(before[0, 5:], after[0, 5:])


@pytest.mark.parametrize("shape", [(4, 10), (4, 7, 10)])
def test_loss_is_the_mean_over_all_targets(shape: tuple[int, ...]) -> None:
    loss = models.loss(torch.zeros(shape), torch.zeros(shape[:-1], dtype=torch.long))
    assert float(loss) == pytest.approx(torch.tensor(10.0).log().item())


@pytest.mark.parametrize("name", ["sgd", "adamw", "held_adamw", "signum", "lion", "onebit_adam"])
def test_weight_decay_spares_vectors_and_no_parameter_is_lost(name: str) -> None:
    optimizer = {"name": name, "lr": 0.1, "weight_decay": 0.5}
    data = {"task": {"name": "digits"}, "optimizer": optimizer, "batch": 8, "steps": 1}
    if name == "held_adamw":
        data |= {"hook": {"warmup": {"name": "dense", "steps": 1}}, "algorithm": {"name": "spardl"}}
    if name in ("signum", "lion", "onebit_adam"):
        data["algorithm"] = {"name": "majority-vote"}
    if name == "onebit_adam":
        optimizer["warmup"] = 2
    settings = validate(data, "test")
    model = build_model(settings.task)
    groups = build_optimizer(settings, model).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(p): 0.5 if p.dim() > 1 else 0.0 for p in model.parameters()}


def test_learning_rate_warms_up_and_falls() -> None:
    schedule = Schedule(warmup=4, floor=0.1)
    rates = [learning_rate(step, 20, schedule) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[20] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    assert learning_rate(0, 1, Schedule()) == 1.0


def test_dense_bytes_are_those_of_a_ring() -> None:
    assert dense_bytes(100, 1) == 0
    assert dense_bytes(100, 4) == 2 * 3 / 4 * 400


def test_a_fingerprint_sees_a_single_bit() -> None:
    model = torch.nn.Linear(3, 2)
    before = fingerprint(model)
    assert before == fingerprint(model)
    with torch.no_grad():
        model.weight.view(torch.int32)[1, 2] ^= 1
    assert fingerprint(model) != before


def test_seeds_of_ranks_are_independent() -> None:
    drawn = set()
    for seed in ((0,), (0, 0), (0, 1), (1, 0)):
        seed_everything(*seed)
        drawn.add(float(torch.rand(())))
    assert len(drawn) == 4
