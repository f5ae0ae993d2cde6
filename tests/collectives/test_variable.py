"""Bags whose length only the sender knows: everyone gets everyone's, and no length that arrives is believed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparcomm import wire
from sparcomm.collectives.bags import Bags
from sparcomm.collectives.variable import gather_bags, gather_traffic, route_bags, route_traffic, split_bags
from sparcomm.errors import ConfigError, DamagedBag
from sparcomm.kernels import kernels_for
from sparcomm.transport import sim
from sparcomm.transport.base import Transport
from support.codes import disturbed, words_of

CPU = torch.device("cpu")
CAPACITY = 12


def fresh(step: int = 7) -> Bags:
    return Bags(kernels_for(torch.empty(0)), 3, step, CPU)


def bag_of(words: list[int], room: int = 0, step: int = 7) -> Tensor:
    """A sealed bag, in a buffer that has ``room`` words more than it."""
    bags = fresh(step)
    bag = bags.empty(len(words) + room)
    bag.fill_(-5)
    bag[wire.HEADER_WORDS : wire.HEADER_WORDS + len(words)] = torch.tensor(words, dtype=torch.int32)
    bags.seal(bag[: wire.HEADER_WORDS + len(words)])
    return bag


def payload(rank: int, to: int = 0) -> list[int]:
    """Another length for every pair; sometimes nothing at all."""
    return [100 * rank + to] * ((5 * rank + 3 * to) % (CAPACITY + 1))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 13])
def test_gather_gives_everyone_every_bag(size: int) -> None:
    def rank(transport: Transport) -> list[list[int]]:
        bags = fresh()
        found = gather_bags(bags, transport, bag_of(payload(transport.rank)), CAPACITY)
        assert [b.numel() for b in found] == [wire.HEADER_WORDS + len(payload(r)) for r in range(size)]
        return [bags.open(bag, r).tolist() for r, bag in enumerate(found)]

    run = sim.run(size, rank)
    assert all(result == [payload(r) for r in range(size)] for result in run.results)
    rounds, messages, most = gather_traffic(CAPACITY, size)
    for traffic in run.traffic:
        assert (traffic.rounds, traffic.messages) == (rounds, messages)
        assert traffic.bytes_sent <= most
    sent = sum(t.bytes_sent for t in run.traffic)
    assert sent == (size - 1) * sum(4 * (wire.HEADER_WORDS + len(payload(r))) for r in range(size))


def test_full_bags_meet_the_bounds() -> None:
    def rank(transport: Transport) -> None:
        full = bag_of([1] * CAPACITY)
        gather_bags(fresh(), transport, full, CAPACITY)
        route_bags(transport, [full] * transport.size, CAPACITY)

    for size in (2, 5, 8):
        expected = tuple(
            a + b for a, b in zip(gather_traffic(CAPACITY, size), route_traffic(CAPACITY, size), strict=True)
        )
        for t in sim.run(size, rank).traffic:
            assert (t.rounds, t.messages, t.bytes_sent) == expected
            assert t.bytes_received == t.bytes_sent


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_route_brings_every_bag_to_its_rank(size: int) -> None:
    def rank(transport: Transport) -> None:
        me, bags = transport.rank, fresh()
        outgoing: list[Tensor | None] = [bag_of(payload(me, to)) for to in range(size)]
        outgoing[me] = None
        for source, bag in enumerate(route_bags(transport, outgoing, CAPACITY)):
            if bag is None:
                assert source == me
            else:
                assert bags.open(bag, source, variable=True).tolist() == payload(source, me)

    run = sim.run(size, rank)
    for me, traffic in enumerate(run.traffic):
        sent = sum(4 * (wire.HEADER_WORDS + len(payload(me, to))) for to in range(size) if to != me)
        assert (traffic.rounds, traffic.messages, traffic.bytes_sent) == (size - 1, size - 1, sent)
        assert sent <= route_traffic(CAPACITY, size)[2]


@pytest.mark.parametrize("word", [-1, 1 << 30, -(1 << 31), CAPACITY + 1])
def test_a_length_beyond_what_a_bag_may_have_is_damage_where_it_is_seen(word: int) -> None:
    def rank(transport: Transport) -> None:
        bags, bag = fresh(), bag_of(payload(transport.rank), room=1)[: wire.HEADER_WORDS + len(payload(transport.rank))]
        if transport.rank != 2:
            gather_bags(bags, transport, bag, CAPACITY)
            return
        bag[2] = word
        transport.exchange(bag, 1, torch.empty(wire.HEADER_WORDS + CAPACITY, dtype=torch.int32), 3, capacity=True)
        transport.exchange(torch.cat([bag, bag]), 0, torch.empty(32, dtype=torch.int32), 0, capacity=True)

    with pytest.raises(DamagedBag, match="bag from rank 2 has length") as caught:
        sim.run(4, rank)
    assert caught.value.__notes__ == ["raised on rank 1 of 4 simulated ranks"]


@st.composite
def heaps(draw: st.DrawFn) -> tuple[Tensor, list[list[int]]]:
    """Bags back to back, perhaps disturbed or cut off, and what was in them."""
    payloads = draw(st.lists(st.lists(st.integers(-9, 9), max_size=CAPACITY), min_size=1, max_size=4))
    words = torch.cat([bag_of(p) for p in payloads])
    if draw(st.booleans()):
        at = draw(st.integers(0, words.numel()))
        words = torch.cat([words[:at], draw(words_of(3)), words[at:]])
    return draw(disturbed(words, resized=True)), payloads


@given(heaps())
@settings(max_examples=300)
def test_any_heap_of_bags_is_cut_in_bounds_or_refused(case: tuple[Tensor, list[list[int]]]) -> None:
    words, payloads = case
    bags = fresh()
    try:
        found = split_bags(bags, words, list(range(len(payloads))), CAPACITY)
    except DamagedBag:
        return
    assert len(found) == len(payloads)
    assert torch.equal(torch.cat(found), words[: sum(b.numel() for b in found)])
    for source, bag in enumerate(found):
        assert wire.HEADER_WORDS <= bag.numel() <= wire.HEADER_WORDS + CAPACITY
        try:
            assert bags.open(bag, source).tolist() == payloads[source]
        except DamagedBag:
            return


@given(st.data())
@settings(max_examples=300)
def test_a_variable_bag_is_read_as_sealed_or_refused(data: st.DataObject) -> None:
    content = data.draw(st.lists(st.integers(-9, 9), max_size=CAPACITY))
    words = bag_of(content, room=data.draw(st.integers(0, CAPACITY)))
    words = data.draw(
        st.one_of(st.just(words), disturbed(words, resized=True), words_of(data.draw(st.integers(0, 20))))
    )
    bags = fresh()
    try:
        got = bags.open(words, 0, variable=True).tolist()
    except DamagedBag:
        assert not torch.equal(words, bag_of(content))
        return
    assert got == content


def test_no_bag_of_a_heap_takes_the_room_of_two() -> None:
    heap = torch.cat([bag_of([0] * (CAPACITY + 1)), bag_of([1])])
    with pytest.raises(DamagedBag, match="bag from rank 4 has length 13 instead of at most 12"):
        split_bags(fresh(), heap, [4, 5], CAPACITY)


def test_a_bag_of_variable_length_ends_where_its_header_says() -> None:
    bags = fresh()
    assert bags.open(bag_of([1, 2, 3], room=4), 0, variable=True).tolist() == [1, 2, 3]
    with pytest.raises(DamagedBag, match="length 3 instead of 7"):
        bags.open(bag_of([1, 2, 3], room=4), 0)
    with pytest.raises(DamagedBag, match="length 3 instead of at most 2"):
        bags.open(bag_of([1, 2, 3])[:-1], 0, variable=True)
    with pytest.raises(DamagedBag, match="has 3 words, less than a header"):
        bags.open(bag_of([])[:3], 5, variable=True)
    with pytest.raises(DamagedBag, match="bag from rank 4 has step 6 instead of 7"):
        bags.open(bag_of([1], room=1, step=6), 4, variable=True)


def test_devices_take_no_bags_of_variable_length() -> None:
    meta: Any = torch.device("meta")
    bags = Bags(kernels_for(torch.empty(0, device=meta)), 0, 0, meta)
    for call in (
        lambda: bags.open(bags.empty(3), 0, variable=True),
        lambda: sim.run(2, lambda t: gather_bags(bags, t, bags.empty(3), 3)),
    ):
        with pytest.raises(
            ConfigError, match=r'bag of variable length on meta.*only CPUs take them; use indices="elias-fano"'
        ):
            call()


def test_bags_that_are_missing_or_too_long_are_refused() -> None:
    long = bag_of([0] * (CAPACITY + 1))
    with pytest.raises(ConfigError, match="a bag of 17 words: must have 4 to 16"):
        sim.run(1, lambda t: gather_bags(fresh(), t, long, CAPACITY))
    with pytest.raises(ConfigError, match="a bag of 17 words"):
        sim.run(2, lambda t: route_bags(t, [long, long], CAPACITY))
    with pytest.raises(ConfigError, match="no bag for rank"):
        sim.run(2, lambda t: route_bags(t, [None, None], CAPACITY))
    with pytest.raises(ConfigError, match="1 bags for 2 ranks"):
        sim.run(2, lambda t: route_bags(t, [None], CAPACITY))
