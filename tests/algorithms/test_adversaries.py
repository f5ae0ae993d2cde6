"""Training against ranks that send the wrong gradients: launch/adversaries.py, in short."""

from __future__ import annotations

from pathlib import Path

import adversaries
import pytest
import torch
from adversaries import Plan, factor, gradient, train

PLAN = Plan(ranks=5, steps=100, batch=32)


@pytest.fixture(scope="module")
def clean() -> dict[str, float]:
    """Accuracies without adversaries."""
    return {rule: train(rule, "scaled", 0, PLAN) for rule in adversaries.rules()}


@pytest.mark.parametrize("f", [1, 2])
def test_the_vote_learns_where_the_mean_diverges(clean: dict[str, float], f: int) -> None:
    assert min(clean.values()) > 0.88
    assert factor("scaled", f, PLAN.ranks) > (PLAN.ranks - f) / f
    assert train("vote", "scaled", f, PLAN) > clean["vote"] - 0.05
    assert train("mean", "scaled", f, PLAN) < 0.3


def test_inverted_gradients_only_slow_a_mean_down_and_are_votes_like_any_other(clean: dict[str, float]) -> None:
    assert train("mean", "inverted", 2, PLAN) > clean["mean"] - 0.1
    assert train("vote", "inverted", 2, PLAN) == train("vote", "scaled", 2, PLAN)


def test_the_gradient_is_autograds() -> None:
    made = torch.Generator().manual_seed(0)
    weights = torch.randn(65 * adversaries.CLASSES, generator=made, requires_grad=True)
    x, y = torch.randn(8, 65, generator=made), torch.randint(10, (8,), generator=made)
    torch.nn.functional.cross_entropy(adversaries.scores(weights, x), y).backward()
    torch.testing.assert_close(gradient(weights.detach(), x, y), weights.grad)


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert adversaries.main(["--ranks", "3", "--steps", "4", "--png", str(tmp_path / "new" / "a.png")]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("f = 0", "f = 1", "mean, scaled", "vote, inverted"))
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        adversaries.main(["--ranks", "2"])
