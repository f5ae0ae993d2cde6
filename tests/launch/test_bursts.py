"""The table of docs/tuning.md: gradients are delivered whole, and each row says what it claims."""

from __future__ import annotations

import bursts
import pytest
import torch


def test_late_deliveries_are_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bursts, "WEIGHTS", 7)
    monkeypatch.setattr(bursts, "WARM", 20)
    monkeypatch.setattr(bursts, "STEPS", 200)
    feed = bursts.gradients(1.0)
    delayed = bursts.late(feed, 100)
    torch.testing.assert_close(delayed.sum(0), feed.sum(0), rtol=1e-4, atol=1e-4)
    assert torch.equal(delayed[:20], feed[:20])
    assert delayed[20:].any(1).nonzero().flatten().tolist() == [99, 199]


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bursts, "WEIGHTS", 20)
    monkeypatch.setattr(bursts, "WARM", 300)
    monkeypatch.setattr(bursts, "STEPS", 1000)
    rows = dict(bursts.rows(bursts.gradients(0.0)))
    assert rows["AdamW, beta2 0.95"][1] < 0.1
    for name, (_, share) in rows.items():
        recommended = "sparcomm" in name or "Correction" in name
        assert (share > 0.9) == recommended, name
    monkeypatch.setattr(bursts, "rows", lambda feed: iter([("some name", [0.25, 0.75])]))
    assert bursts.main([]) == 0
    shown = capsys.readouterr().out
    assert "steady, once in 100" in shown
    assert "0.25" in shown
