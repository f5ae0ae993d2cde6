"""Spans add up, and are seen by a profiler."""

from __future__ import annotations

import threading

import pytest
from torch.profiler import ProfilerActivity, profile, record_function

from sparcomm.clock import Clock, Range


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


def ranges(seen: profile) -> dict[str, int]:
    return {e.key: e.count for e in seen.key_averages() if e.key.startswith("sparcomm")}


def test_a_profiler_sees_every_span_and_range_by_name() -> None:
    clock = Clock()
    with clock.span("select"):
        pass
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        with Range("step 12"):
            for phase in ("select", "wire", "wire"):
                with clock.span(phase):
                    pass
        with pytest.raises(KeyError), clock.span("code"):
            raise KeyError
    assert ranges(seen) == {
        "sparcomm::step 12": 1, "sparcomm::select": 1, "sparcomm::wire": 2, "sparcomm::code": 1,
    }  # fmt: skip


def test_a_range_that_spans_the_start_or_the_end_of_a_profile_is_harmless() -> None:
    seen = profile(activities=[ProfilerActivity.CPU])
    with Range("begun before"):
        seen.start()
    with Range("ended after"):
        seen.stop()
    assert "sparcomm::begun before" not in ranges(seen)


def test_which_threads_a_profile_records() -> None:
    """What docs/watching.md says of it: only its own thread, unless asked for all."""
    experimental = pytest.importorskip("torch._C._profiler")._ExperimentalConfig
    if "profile_all_threads" not in (experimental.__init__.__doc__ or ""):
        pytest.skip("this torch has no profile_all_threads")
    found = []
    for config in (None, experimental(profile_all_threads=True)):
        with profile(activities=[ProfilerActivity.CPU], experimental_config=config) as seen:
            other = threading.Thread(target=lambda: Range("worker").__enter__())
            other.start()
            other.join()
        found.append(set(ranges(seen)))
    assert found == [set(), {"sparcomm::worker"}]


def test_without_a_profiler_a_range_makes_no_record_function() -> None:
    with Range("x") as _:
        pass
    assert Range("x").__enter__() is None
    inner = Range("x")
    inner.__enter__()
    assert inner._range is None
    with profile(activities=[ProfilerActivity.CPU]):
        inner.__enter__()
        assert isinstance(inner._range, record_function)
        inner.__exit__(None, None, None)
