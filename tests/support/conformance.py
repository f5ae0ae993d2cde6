"""What every transport must do: functions of one rank's transport, which all ranks of a group run together.

Tensors lie on PyTorch's default device: ``with torch.device("cuda"):`` runs them there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple

import pytest
import torch
from torch import Tensor

from sparcomm.errors import ConfigError, PeerError
from sparcomm.transport.common import BaseTransport

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = (*FLOATS, *INTEGERS, torch.bool, torch.uint16, torch.complex64)


def sample(n: int, dtype: torch.dtype, rank: int) -> Tensor:
    """Random bits of any dtype that are valid values of it, different on every rank, the same on every call."""
    noise = torch.randint(0, 100, (n,), generator=torch.Generator().manual_seed(1000 * n + rank), device="cpu")
    return ((noise > 50) if dtype == torch.bool else noise.to(dtype)).to(torch.get_default_device())


def floats(n: int, dtype: torch.dtype, rank: int) -> Tensor:
    """Values whose sum depends on the order of additions."""
    generator = torch.Generator().manual_seed(rank)
    scale = 10.0 ** torch.randint(-3, 4, (n,), generator=generator, device="cpu")
    drawn = torch.randn(n, generator=generator, dtype=torch.float64, device="cpu") * scale
    return drawn.to(dtype).to(torch.get_default_device())


def bits(t: Tensor) -> bytes:
    """The bytes of a tensor: NaN equals NaN, and -0.0 is not 0.0."""
    return bytes(t.contiguous().view(-1).view(torch.uint8).tolist())


def rows(t: BaseTransport, make: Callable[[int], Tensor]) -> Tensor:
    """What every rank made, by rank."""
    return torch.stack([make(r).cpu() for r in range(t.size)])


def booked(t: BaseTransport, call: Callable[[], None]) -> tuple[int, ...]:
    """What one call adds to the rounds, messages, bytes sent and bytes received."""
    before = astuple(t.traffic)
    call()
    return tuple(b - a for a, b in zip(before, astuple(t.traffic), strict=True))


def check_exchange_by_every_gap(t: BaseTransport) -> None:
    for gap in range(t.size + 1):
        send, recv = sample(33, torch.int64, t.rank), torch.full((33,), -1)
        t.exchange(send, (t.rank + gap) % t.size, recv, (t.rank - gap) % t.size)
        assert torch.equal(recv, sample(33, torch.int64, (t.rank - gap) % t.size))
        assert torch.equal(send, sample(33, torch.int64, t.rank))


def check_exchange_takes_every_dtype(t: BaseTransport) -> None:
    for dtype in DTYPES:
        recv = torch.empty((5, 3), dtype=dtype)
        t.exchange(sample(15, dtype, t.rank).view(5, 3), (t.rank + 1) % t.size, recv, (t.rank - 1) % t.size)
        assert bits(recv) == bits(sample(15, dtype, (t.rank - 1) % t.size)), dtype


def check_exchange_one_way(t: BaseTransport) -> None:
    even, last = t.rank % 2 == 0, t.size - 1
    recv = torch.zeros(4)
    if even and t.rank < last:
        assert booked(t, lambda: t.exchange(torch.full((4,), 7.0), t.rank + 1, None, -1)) == (1, 1, 16, 0)
    elif even:
        assert booked(t, lambda: t.exchange(None, -1, None, -1)) == (1, 0, 0, 0)
    else:
        assert booked(t, lambda: t.exchange(None, -1, recv, t.rank - 1)) == (1, 0, 0, 16)
        assert recv.tolist() == [7.0] * 4


def check_exchange_of_nothing(t: BaseTransport) -> None:
    to, source = (t.rank + 1) % t.size, (t.rank - 1) % t.size
    t.exchange(torch.empty(0), to, torch.empty(0), source)
    recv = torch.zeros(())
    t.exchange(torch.tensor(float(t.rank)), to, recv, source)
    assert recv.item() == source


def check_exchange_with_capacity(t: BaseTransport) -> None:
    to, source = (t.rank + 1) % t.size, (t.rank - 1) % t.size
    recv = torch.full((100,), 9, dtype=torch.uint8)
    message = torch.full((t.rank + 1,), t.rank, dtype=torch.uint8)
    cost = booked(t, lambda: t.exchange(message, to, recv, source, capacity=True))
    assert recv.tolist() == [source] * (source + 1) + [9] * (99 - source)
    assert cost == ((1, 1, t.rank + 1, 100) if t.size > 1 else (1, 0, 0, 0))


def check_messages_keep_their_order(t: BaseTransport) -> None:
    for i in range(20):
        recv = torch.empty(2, dtype=torch.int32)
        send = torch.tensor([t.rank, i], dtype=torch.int32)
        t.exchange(send, (t.rank + 1) % t.size, recv, (t.rank - 1) % t.size)
        assert recv.tolist() == [(t.rank - 1) % t.size, i]


def check_send_may_change_after_the_call(t: BaseTransport) -> None:
    send, recv = torch.full((1000,), float(t.rank)), torch.empty(1000)
    t.exchange(send, (t.rank + 1) % t.size, recv, (t.rank - 1) % t.size)
    send.fill_(-1)
    assert recv.unique().tolist() == [(t.rank - 1) % t.size]


def check_all_to_all(t: BaseTransport) -> None:
    for dtype in DTYPES:
        for width in (0, 1, 7):
            x, out = sample(t.size * width, dtype, t.rank).view(t.size, width), torch.empty(t.size, width, dtype=dtype)
            t.all_to_all(out, x)
            want = [sample(t.size * width, dtype, r).view(t.size, width)[t.rank].cpu() for r in range(t.size)]
            assert bits(out) == bits(torch.stack(want)), (dtype, width)
            assert bits(x) == bits(sample(t.size * width, dtype, t.rank))


def check_all_gather(t: BaseTransport) -> None:
    for dtype in DTYPES:
        for shape in ((), (0,), (1,), (7,), (2, 3)):
            numel = torch.Size(shape).numel()
            out = torch.empty((t.size, *shape), dtype=dtype)
            t.all_gather(out, sample(numel, dtype, t.rank).view(shape))
            assert bits(out) == bits(rows(t, lambda r, n=numel, d=dtype: sample(n, d, r))), (dtype, shape)


def check_all_gather_in_place(t: BaseTransport) -> None:
    out = torch.full((t.size, 5), -1.0)
    out[t.rank] = t.rank
    t.all_gather(out, out[t.rank])
    assert out[:, 0].tolist() == list(range(t.size))


def check_integer_sums_and_maxima_are_exact(t: BaseTransport) -> None:
    for dtype in (*FLOATS, *INTEGERS):
        for n in (0, 1, t.size - 1, t.size, t.size + 1, 100):
            small = [sample(n, dtype, r) // 10 for r in range(t.size)]
            for op, native in (("sum", False), ("max", False), ("sum", True), ("max", True)):
                if native and dtype == torch.int16:
                    continue  # vendors do not know it
                x = small[t.rank].clone()
                t.all_reduce(x, op, native=native)
                stack = torch.stack(small)
                want = stack.sum(0).to(dtype) if op == "sum" else stack.amax(0) if n else stack[0]
                assert bits(x) == bits(want), (dtype, n, op, native)


def check_sums_are_made_in_rank_order(t: BaseTransport) -> None:
    for dtype in FLOATS:
        x = floats(57, dtype, t.rank).view(3, 19)
        t.all_reduce(x)
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        want = floats(57, dtype, 0).to(wide)
        for r in range(1, t.size):
            want = want + floats(57, dtype, r).to(wide)
        assert bits(x) == bits(want.to(dtype)), dtype


def check_all_reduce_is_the_same_on_all_ranks(t: BaseTransport) -> None:
    x = floats(1000, torch.float32, t.rank)
    x[t.rank] = float("nan")
    for op in ("sum", "max"):
        y = x.clone()
        t.all_reduce(y, op)
        assert int(y.isnan().sum()) == t.size
        everyone = torch.empty((t.size, 1000))
        t.all_gather(everyone, y)
        assert len({bits(row) for row in everyone}) == 1


def check_bitwise_reductions(t: BaseTransport) -> None:
    for dtype in (*INTEGERS, torch.bool, torch.uint16):
        x = [sample(37, dtype, r) for r in range(t.size)]
        # Bit patterns as Python integers: what is expected does not come from the same kernels.
        numbers = [[int(v) for v in part] for part in x]
        for op, combine in (("band", int.__and__), ("bor", int.__or__)):
            want = numbers[0]
            for part in numbers[1:]:
                want = [combine(a, b) for a, b in zip(want, part, strict=True)]
            got = x[t.rank].clone()
            t.all_reduce(got, op)
            assert [int(v) for v in got] == want, (dtype, op)
    flags = torch.arange(t.size) == t.rank
    t.all_reduce(flags, "max")
    assert flags.all()


def check_split(t: BaseTransport) -> None:
    t.context = "step 3"
    before = astuple(t.traffic)
    team = t.split(t.rank % 2, -t.rank)
    members = [r for r in reversed(range(t.size)) if r % 2 == t.rank % 2]
    assert (team.rank, team.size) == (members.index(t.rank), len(members))
    assert astuple(t.traffic) == before, "making groups is set-up"
    out = torch.empty(team.size, dtype=torch.int64)
    team.all_gather(out, torch.tensor(t.rank))
    assert out.tolist() == members
    assert team.traffic is t.traffic
    assert team.context == "step 3"
    # Groups of groups, and the parent between them.
    alone = team.split(team.rank, 0)
    total = torch.ones(3)
    alone.all_reduce(total)
    t.all_reduce(total)
    assert total.tolist() == [t.size] * 3
    assert alone.size == 1


def check_traffic_follows_the_formulas(t: BaseTransport) -> None:
    p, to, source = t.size, (t.rank + 1) % t.size, (t.rank - 1) % t.size
    log = (p - 1).bit_length()
    x, wide = torch.ones(11), torch.ones(p, 6, dtype=torch.float16)
    sent = 44 if p > 1 else 0
    assert booked(t, lambda: t.exchange(x, to, torch.empty(11), source)) == (1, p > 1, sent, sent)
    assert booked(t, lambda: t.all_to_all(torch.empty_like(wide), wide)) == (1, p - 1, 12 * (p - 1), 12 * (p - 1))
    assert booked(t, lambda: t.all_gather(torch.empty(p, 11), x)) == (log, log, 44 * (p - 1), 44 * (p - 1))
    chunk = 4 * -(-11 // p)
    both = 2 * chunk * (p - 1)
    assert booked(t, lambda: t.all_reduce(x)) == (1 + log, p - 1 + log, both, both)
    y = torch.ones(12 * p)
    vendor = 2 * (p - 1) * 48
    assert booked(t, lambda: t.all_reduce(y, native=True)) == (2 * (p - 1), 2 * (p - 1), vendor, vendor)


def check_bad_arguments_are_refused(t: BaseTransport) -> None:
    p, x = t.size, torch.ones(4)
    square = torch.ones(p + 1, p + 1)
    before = astuple(t.traffic)
    bad: list[tuple[str, Callable[[], None]]] = [
        (f"to={p}, must be a rank from 0 to {p - 1}", lambda: t.exchange(x, p, None, 0)),
        ("source=-1, must be", lambda: t.exchange(None, 0, x, -1)),
        ("stride .*must be contiguous", lambda: t.exchange(torch.ones(4, 4)[:, 1:], 0, None, 0)),
        ("its own peer on one side", lambda: t.exchange(x, t.rank, None, 0)),
        ("does not fit", lambda: t.exchange(x, t.rank, torch.ones(3), t.rank)),
        ("overlap", lambda: t.exchange(x, t.rank, x, t.rank)),
        ("must have . rows", lambda: t.all_to_all(torch.empty_like(square), square)),
        ("out is float32.* must be float64", lambda: t.all_to_all(torch.ones(p), torch.ones(p, dtype=torch.float64))),
        ("overlap", lambda: t.all_to_all(square[:p], square[:p])),
        ("must be contiguous", lambda: t.all_gather(torch.empty(p, 3), square[:3, 0].t())),
        (r"out is float32\[3\], must be", lambda: t.all_gather(torch.empty(3), x)),
        ("op='mean', must be one of 'sum', 'max', 'band', 'bor'", lambda: t.all_reduce(x, "mean")),  # type: ignore[arg-type]
        ("takes integers and bool, not torch.float32", lambda: t.all_reduce(x, "bor")),
        ("'sum' takes float32, .*not torch.bool", lambda: t.all_reduce(x > 0)),
        ("native=True takes 'sum' or 'max', not 'bor'", lambda: t.all_reduce(x.int(), "bor", native=True)),
        ("native=True .* torch.int16", lambda: t.all_reduce(x.short(), native=True)),
        ("stride .*must be contiguous", lambda: t.all_reduce(square[:, 0])),
    ]
    for message, call in bad:
        with pytest.raises(ConfigError, match=message):
            call()
    assert astuple(t.traffic) == before
    # A refused call is no call: the group still works.
    t.all_reduce(x)
    assert x.tolist() == [p] * 4


def check_measuring_is_agreed_on_and_not_booked(t: BaseTransport) -> None:
    before = astuple(t.traffic)
    link = t.measure()
    assert astuple(t.traffic) == before
    assert link.latency >= 0
    assert link.bandwidth > 0
    every = torch.empty(t.size, 2, dtype=torch.float64)
    t.all_gather(every, torch.tensor(astuple(link), dtype=torch.float64))
    assert bool((every == every[0]).all())


def check_abort_wakes_whoever_waits(t: BaseTransport) -> None:
    if t.size == 1:
        t.abort("had enough")
    elif t.rank == 1:
        t.abort("had enough")
        t.abort("again")
    else:
        # A chain: rank 2 waits for rank 1, rank 3 for rank 2, ... and each gives up in turn.
        with pytest.raises(PeerError, match=f"rank {(t.rank - 1) % t.size}"):
            t.exchange(None, 0, torch.empty(1), (t.rank - 1) % t.size)
        t.abort("a peer has gone")
    with pytest.raises(PeerError, match="this transport has ended: "):
        t.all_reduce(torch.ones(1))


def check_a_closed_transport_says_so(t: BaseTransport) -> None:
    team = t.split(0, t.rank)
    team.close()
    team.close()
    with pytest.raises(PeerError, match="closed"):
        team.all_reduce(torch.ones(1))
    x = torch.ones(1)
    t.all_reduce(x)
    assert x.item() == t.size


CHECKS = {name: fn for name, fn in globals().items() if name.startswith("check_")}
