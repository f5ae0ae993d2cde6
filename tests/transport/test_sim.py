"""The simulator: the conformance suite, its virtual clock, and how every kind of failure ends a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparcomm.errors import ConfigError, DisagreementError, PeerError
from sparcomm.transport import sim
from sparcomm.transport.sim import Link, SimTransport, run
from support.conformance import CHECKS

SIZES = (1, 2, 3, 4, 5, 8)
LINK = Link(latency=0.5, bandwidth=8.0)  # powers of two: times are exact
Fn = Callable[[SimTransport], object]


def right(t: SimTransport) -> int:
    return (t.rank + 1) % t.size


def left(t: SimTransport) -> int:
    return (t.rank - 1) % t.size


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_conformance(check: Fn, size: int) -> None:
    run(size, check)


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 13), n=st.integers(0, 40), root=st.integers(0, 12))
def test_all_reduce_equals_the_sum_in_rank_order(size: int, n: int, root: int) -> None:
    parts = [torch.randn(n, generator=torch.Generator().manual_seed(r + root)) for r in range(size)]
    want = parts[0].clone()
    for part in parts[1:]:
        want += part

    def fn(t: SimTransport) -> torch.Tensor:
        x = parts[t.rank].clone()
        t.all_reduce(x)
        return x

    for result in run(size, fn).results:
        assert torch.equal(result, want)


# ---- the clock ----------------------------------------------------------------------------------------------------


def test_an_exchange_takes_latency_plus_transfer() -> None:
    result = run(3, lambda t: t.exchange(torch.ones(4), right(t), torch.empty(4), left(t)), LINK)
    assert result.seconds == 0.5 + 16 / 8


def test_a_sender_is_busy_only_as_long_as_its_link() -> None:
    def fn(t: SimTransport) -> None:
        if t.rank == 0:
            t.exchange(torch.ones(4), 1, None, 0)
            t.exchange(torch.ones(4), 1, None, 0)
        else:
            t.exchange(None, 0, torch.empty(4), 0)
            t.exchange(None, 0, torch.empty(4), 0)

    # The second message starts at 2, when the first has left, and arrives at 2 + 0.5 + 2.
    assert run(2, fn, LINK).seconds == 4.5


def test_waiting_for_a_slow_rank_takes_its_time() -> None:
    def fn(t: SimTransport) -> None:
        if t.rank == 0:
            t.exchange(torch.ones(20), 2, None, 0)
            t.exchange(torch.ones(2), 1, None, 0)
        elif t.rank == 1:
            t.exchange(None, 0, None, 0)
            t.exchange(None, 0, torch.empty(2), 0)
        else:
            t.exchange(None, 0, torch.empty(20), 0)

    assert run(3, fn, LINK).seconds == max(10 + 0.5, 10 + 0.5 + 1)


@pytest.mark.parametrize("size", SIZES)
def test_collectives_take_what_their_rounds_add_up_to(size: int) -> None:
    rounds, n = (size - 1).bit_length(), 16
    route = (size - 1) * (4 * n) / 8 + 0.5 * (size > 1)
    gather = rounds * 0.5 + (size - 1) * (4 * n) / 8
    assert run(size, lambda t: t.all_to_all(torch.empty(size, n), torch.ones(size, n)), LINK).seconds == route
    assert run(size, lambda t: t.all_gather(torch.empty(size, n), torch.ones(n)), LINK).seconds == gather
    assert run(size, lambda t: t.all_reduce(torch.ones(size * n)), LINK).seconds == pytest.approx(route + gather)
    native = run(size, lambda t: t.all_reduce(torch.ones(size * n), native=True), LINK).seconds
    assert native == pytest.approx(2 * (size - 1) * (0.5 + 4 * n / 8))


def test_making_groups_takes_no_time() -> None:
    assert run(5, lambda t: t.split(t.rank % 2, 0).size, LINK).seconds == 0


def test_runs_are_deterministic() -> None:
    def fn(t: SimTransport) -> int:
        for i in range(5):
            t.exchange(torch.ones(t.rank + i), right(t), torch.empty(left(t) + i), left(t))
        order.append(t.rank)
        return t.rank

    order: list[int] = []
    seconds = {run(7, fn, LINK).seconds for _ in range(5)}
    assert len(seconds) == 1
    assert all(order[i : i + 7] == order[:7] for i in range(0, 35, 7))


def test_time_and_traffic_are_zero_without_calls() -> None:
    result = run(3, lambda t: t.rank)
    assert (result.results, result.seconds) == ([0, 1, 2], 0.0)
    assert [t.messages for t in result.traffic] == [0, 0, 0]


# ---- failures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("late", [False, True])
def test_the_error_of_the_rank_that_failed_is_raised(size: int, late: bool) -> None:
    seen: list[str] = []

    def fn(t: SimTransport) -> None:
        try:
            if late:
                t.all_reduce(torch.ones(3))
            if t.rank == size - 1:
                raise ZeroDivisionError("the tea is cold")
            t.all_reduce(torch.ones(3))
        except PeerError as error:
            seen.append(str(error))
            raise

    start = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="the tea is cold") as caught:
        run(size, fn)
    assert time.monotonic() - start < 2
    assert caught.value.__notes__ == [f"raised on rank {size - 1} of {size} simulated ranks"]
    assert len(seen) == size - 1
    assert all(f"rank {size - 1} failed first with ZeroDivisionError: the tea is cold" in text for text in seen)


def test_a_failure_stays_a_failure_when_the_others_swallow_it() -> None:
    def fn(t: SimTransport) -> str:
        try:
            t.all_reduce(torch.ones(3 + t.rank))
        except DisagreementError:
            return "never mind"
        return "fine"

    with pytest.raises(DisagreementError):
        run(2, fn)


def outcomes(t: SimTransport) -> None:
    if t.rank == 0:
        pytest.fail("not an Exception")
    t.all_reduce(torch.ones(1))


def test_errors_that_are_no_exceptions_are_raised_too() -> None:
    with pytest.raises(pytest.fail.Exception, match="not an Exception"):
        run(2, outcomes)


ONE = torch.ones(1)
DISAGREEMENTS: dict[str, tuple[Fn, str]] = {
    "operation": (
        lambda t: t.all_reduce(torch.ones(2)) if t.rank else t.all_gather(torch.ones(2, 1), torch.ones(1)),
        r"all_reduce\(x float32\[2\], sum\).*all_gather\(x float32\[1\]\)",
    ),
    "reduction": (lambda t: t.all_reduce(torch.ones(4), "max" if t.rank else "sum"), "max.*sum"),
    "native or not": (lambda t: t.all_reduce(torch.ones(4), native=t.rank == 0), "sum, native"),
    # Both are cut into chunks of two, so that only the calls' sizes can tell.
    "length": (lambda t: t.all_reduce(torch.ones(3 + t.rank)), r"float32\[3\].*float32\[4\]"),
    "dtype": (lambda t: t.all_reduce(torch.ones(4, dtype=torch.float32 if t.rank else torch.int32)), "int32.*float32"),
    "message too long": (
        lambda t: t.exchange(torch.ones(4 + t.rank), right(t), torch.empty(4), left(t)),
        r"sent float32\[5\].*expects float32\[4\]",
    ),
    "message too short": (
        lambda t: t.exchange(torch.ones(3), right(t), torch.empty(4), left(t)),
        r"sent float32\[3\].*expects float32\[4\]",
    ),
    "longer than the capacity": (
        lambda t: t.exchange(torch.ones(5), right(t), torch.empty(4), left(t), capacity=True),
        r"sent float32\[5\].*expects float32\[4\]",
    ),
    "capacity on one side": (
        lambda t: t.exchange(torch.ones(4), right(t), torch.empty(4), left(t), capacity=t.rank == 0),
        "capacity",
    ),
    "both receive": (
        lambda t: t.exchange(None, 0, torch.empty(4), 1 - t.rank),
        r"all ranks wait\n  rank 0: in exchange\(recv from float32\[4\] 1\), waiting for rank 1 \(tag 1\)\n  rank 1",
    ),
    "never received": (
        lambda t: t.exchange(torch.ones(4), 1, None, 0) if t.rank == 0 else t.exchange(None, 0, None, 0),
        r"rank 1 never received float32\[4\] of rank 0's exchange",
    ),
    "received one call later": (
        lambda t: (
            (t.exchange(torch.ones(4), 1, None, 0), t.exchange(torch.ones(4), 1, None, 0))
            if t.rank == 0
            else (t.exchange(None, 0, None, 0), t.exchange(None, 0, torch.empty(4), 0))
        ),
        "its transfer 1, to rank 1, which expects .* its transfer 2",
    ),
    "one call too many": (
        lambda t: [t.exchange(torch.ones(1), right(t), torch.empty(1), left(t)) for _ in range(1 + t.rank)],
        "rank 0 has finished",
    ),
    "sending to a rank that has finished": (
        lambda t: t.exchange(torch.ones(1), 0, None, 0) if t.rank else None,
        "rank 0 has finished",
    ),
}


@pytest.mark.parametrize(("fn", "message"), DISAGREEMENTS.values(), ids=DISAGREEMENTS.keys())
def test_disagreements_end_the_run_at_once(fn: Fn, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(DisagreementError, match=f"(?s){message}") as caught:
        run(2, fn)
    assert time.monotonic() - start < 2
    assert "rank 0" in str(caught.value)
    assert "rank 1" in str(caught.value)


def test_a_disagreement_names_every_ranks_call() -> None:
    def fn(t: SimTransport) -> None:
        if t.rank < 3:
            t.exchange(None, 0, torch.empty(t.rank), (t.rank + 1) % 3)

    with pytest.raises(DisagreementError) as caught:
        run(4, fn)
    lines = str(caught.value).splitlines()
    assert lines[1:4] == [
        f"  rank {r}: in exchange(recv from float32[{r}] {(r + 1) % 3}), waiting for rank {(r + 1) % 3} (tag 1)"
        for r in range(3)
    ]
    assert lines[4] == "  rank 3: finished"


def test_peers_that_disagree_about_each_other() -> None:
    def fn(t: SimTransport) -> None:
        # Rank 2 sends to 0, who expects rank 1.
        to = {0: 1, 1: 2, 2: 0}[t.rank]
        source = {0: 1, 1: 0, 2: 1}[t.rank]
        t.exchange(torch.ones(1), to, torch.empty(1), source)

    with pytest.raises(DisagreementError, match="rank 1 has finished, but rank 0 waits for it"):
        run(3, fn)


def test_an_endless_run_is_given_up_and_shows_where_it_was() -> None:
    release = threading.Event()

    def busy(t: SimTransport) -> None:
        if t.rank == 1:
            release.wait(30)
        t.all_reduce(torch.ones(1))

    with pytest.raises(TimeoutError, match=r"(?s)has not ended after 0.2 s.*rank 0: in all_reduce.*release.wait"):
        run(2, busy, timeout=0.2)
    release.set()
    assert run(2, lambda t: t.rank).results == [0, 1]


def test_runs_may_nest_and_threads_are_reused() -> None:
    def outer(t: SimTransport) -> float:
        inner = run(3, lambda u: u.rank + 10 * t.rank).results
        x = torch.tensor(float(sum(inner)))
        t.all_reduce(x)
        return x.item()

    assert run(2, outer).results == [36.0, 36.0]
    before = threading.active_count()
    for _ in range(50):
        run(5, lambda t: t.all_reduce(torch.ones(2)))
    assert threading.active_count() == before


def test_a_run_keeps_nothing_alive() -> None:
    import gc
    import weakref

    def fn(t: SimTransport) -> torch.Tensor:
        t.exchange(torch.ones(3), right(t), x := torch.empty(3), left(t))
        return x

    result = run(4, fn)
    refs = [weakref.ref(x) for x in result.results]
    del result
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4


@pytest.mark.parametrize("size", [0, -1])
def test_a_run_needs_a_rank(size: int) -> None:
    with pytest.raises(ConfigError, match=f"size={size}, must be at least 1"):
        run(size, lambda t: None)


@pytest.mark.parametrize(("latency", "bandwidth"), [(-1, 1), (0, 0), (float("nan"), 1), (0, float("nan"))])
def test_impossible_links_are_refused(latency: float, bandwidth: float) -> None:
    with pytest.raises(ConfigError, match="latency must be at least 0 seconds"):
        Link(latency, bandwidth)


def test_ranks_share_no_traffic_with_each_other() -> None:
    def fn(t: SimTransport) -> None:
        if t.rank < 2:
            t.exchange(torch.ones(1), 1 - t.rank, torch.empty(1), 1 - t.rank)

    assert [t.bytes_sent for t in run(3, fn).traffic] == [4, 4, 0]
    assert sim.Link().bandwidth == 125e6
