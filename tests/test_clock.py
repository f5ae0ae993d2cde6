"""Spans add up, and are seen by a profiler."""

from __future__ import annotations

import pytest
from torch.profiler import ProfilerActivity, profile

from sparcomm.clock import Clock


def test_spans_add_up_even_if_the_body_fails() -> None:
    clock = Clock()
    with clock.span("wire"):
        pass
    once = clock.seconds["wire"]
    assert once > 0
    with pytest.raises(KeyError), clock.span("wire"):
        raise KeyError
    assert clock.seconds["wire"] > once
    assert set(clock.seconds) == {"wire"}


def test_a_profiler_sees_every_span_by_name() -> None:
    clock = Clock()
    with clock.span("select"):
        pass
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for phase in ("select", "wire", "wire"):
            with clock.span(phase):
                pass
        with pytest.raises(KeyError), clock.span("code"):
            raise KeyError
    counts = {e.key: e.count for e in seen.key_averages() if e.key.startswith("sparcomm.")}
    assert counts == {"sparcomm.select": 1, "sparcomm.wire": 2, "sparcomm.code": 1}
