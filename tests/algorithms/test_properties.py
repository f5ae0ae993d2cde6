"""The laws that every algorithm in the registry keeps, in every configuration and at every number of ranks.

A new algorithm file is swept by this suite without being named here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import pytest
import torch

from sparcomm.algorithms import Algorithm, Reduced, registry
from sparcomm.algorithms.base import Cost
from sparcomm.codecs.packet import VALUES
from sparcomm.dtypes import working_dtype
from sparcomm.errors import ConfigError, DamagedBag, GradientError
from sparcomm.transport import sim
from support.sums import Damaging, integers, normals, owed, recycled, simulate, steps, with_residual

SIZES, LARGE = (1, 2, 3, 4, 5), (7, 8, 13)


def cases(size: int) -> list[Algorithm]:
    return [case for cls in registry().values() for case in cls.cases(size)]


# Every configuration at each of the small sizes, and at one of the large ones, which take the longest.
SWEEP = [(size, case) for size in SIZES for case in cases(size)]
SWEEP += [(size, case) for turn, size in enumerate(LARGE) for case in cases(size)[turn :: len(LARGE)]]


def usual(cls: Any, size: int) -> Algorithm:
    """The default configuration, or the first that can run over ``size`` ranks without an environment."""
    for case in (cls(), *cls.cases(size)):
        with contextlib.suppress(ConfigError):
            case.check_size(size)
            return case
    raise AssertionError(f"{cls.name} has no case for {size} ranks")


FEW = [(size, usual(cls, size)) for size in (1, 2, 3, 4, 7) for cls in registry().values()]


def name_of(value: Any) -> str:
    if not isinstance(value, Algorithm):
        return f"p{value}" if isinstance(value, int) else str(value).removeprefix("torch.")
    changed = [str(getattr(value, f.name)) for f in dataclasses.fields(value) if getattr(value, f.name) != f.default]
    return "-".join([value.name, *changed])


def width_of(algorithm: Algorithm) -> str:
    """That of the values it sends, or that the algorithm between its nodes sends."""
    return getattr(getattr(algorithm, "outer", algorithm), "values", "float32")


def sweep(pairs: list[tuple[int, Algorithm]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("size", "algorithm"), pairs, ids=name_of)


@sweep(SWEEP)
def test_sums_are_conserved_replicas_agree_and_traffic_is_cost(size: int, algorithm: Algorithm) -> None:
    for n in (1, 6, 300) if size < 3 else (6, 300) if size < 6 else (300,):
        gradients = [[integers(n, rank, step) for rank in range(size)] for step in range(2)]
        ranks = simulate(algorithm, gradients)
        for step in range(2):
            reduced = [done[step] for done, _, _ in ranks]
            total = reduced[0].total
            cost = cost_of(algorithm, n, torch.float32, ranks, step)
            assert all(r.ok for r in reduced)
            assert all(same_bits(r.total, total) for r in reduced), "replicas differ"
            assert int((total != 0).sum()) <= algorithm.kept(n, size)
            booked = [t[step] for _, _, t in ranks]
            busiest = tuple(max(getattr(t, f) for t in booked) for f in cost._fields)
            sent, received = sum(t.bytes_sent for t in booked), sum(t.bytes_received for t in booked)
            if algorithm.static:
                assert busiest == tuple(cost)
                assert sent == received
            else:  # what is received is booked by its bound
                assert all(b <= c for b, c in zip(busiest, cost, strict=True))
                assert sent <= received
            if algorithm.conserves:
                before = [None if step == 0 else done[step - 1].residual for done, _, _ in ranks]
                put_in = sum(with_residual(g, r) for g, r in zip(gradients[step], before, strict=True))
                left = sum(owed(r.residual, total) for r in reduced)
                assert conserved(algorithm, put_in, total + left), f"mass lost at n={n}, step {step}"


def cost_of(algorithm: Algorithm, n: int, dtype: torch.dtype, ranks: list[Any], step: int) -> Cost:
    """What step ``step`` of ``ranks`` should have sent, at most if sizes are not static."""
    size = len(ranks)
    # What a first step finds out, such as the speed of the link, is in the state that it leaves.
    cost = algorithm.cost(n, dtype, size, ranks[0][0][max(step - 1, 0)].state)
    if step or algorithm.static:
        return cost
    # So is what later steps go by, but the first did not.
    return Cost(*map(max, zip(cost, algorithm.cost(n, dtype, size), strict=True)))


def conserved(algorithm: Algorithm, before: torch.Tensor, after: torch.Tensor) -> bool:
    """Bit for bit, or to the last few bits of the largest where the algorithm divides."""
    if algorithm.exact:
        return torch.equal(before, after)
    return bool(((before - after).abs() <= 1e-5 * (1 + before.abs().amax())).all())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Unlike torch.equal, for which -0.0 is 0.0."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@sweep([pair for number, pair in enumerate(SWEEP) if pair[0] == 3 + number % 2])
def test_a_step_that_is_repeated_comes_out_the_same(size: int, algorithm: Algorithm) -> None:
    """As after a step that was dropped: nothing that was committed has changed."""
    n = 300

    def rank(transport: Any) -> None:
        state, residual = algorithm.init(n, torch.float32, torch.device("cpu"), size), None
        for step in range(4):
            grad = normals(n, transport.rank, step)
            bad = grad.clone()
            bad[7] = float("nan")
            dropped = algorithm.reduce(bad, residual, state, step, transport)
            assert not dropped.ok
            first, second = (algorithm.reduce(grad, residual, state, step, transport) for _ in range(2))
            assert torch.equal(first.total, second.total)
            assert torch.equal(owed(first.residual, grad), owed(second.residual, grad))
            residual, state = first.residual, first.state

    sim.run(size, rank)


@sweep([pair for pair in SWEEP if pair[0] in (1, 3)])
def test_repeats_agree_arguments_are_left_alone_and_buffers_are_reused(size: int, algorithm: Algorithm) -> None:
    gradients = [[normals(500, rank, step) for rank in range(size)] for step in range(4)]
    first, second = simulate(algorithm, gradients), recycled(algorithm, gradients)
    for (one, _, _), two in zip(first, second, strict=True):
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a.total, b.total)
            assert (a.residual is None) == (b.residual is None)
            assert a.residual is None or torch.equal(a.residual, owed(b.residual, b.total))


@sweep([pair for pair in SWEEP if pair[0] in (1, 4)])
def test_parts_are_the_total(size: int, algorithm: Algorithm) -> None:
    for n in (5, 1500):
        gradients = [[normals(n, rank, step) for rank in range(size)] for step in range(2)]
        for (whole, *_), (parted, *_) in zip(
            simulate(algorithm, gradients), simulate(algorithm, gradients, wants_total=False), strict=True
        ):
            for expected, reduced in zip(whole, parted, strict=True):
                assert (reduced.total is None) == (reduced.parts is not None)
                total = written_out(reduced, n)
                assert torch.equal(total, expected.total)
                assert torch.equal(owed(reduced.residual, total), owed(expected.residual, total))


def written_out(reduced: Reduced, n: int) -> torch.Tensor:
    """The total, from parts where these were given; no position may come twice."""
    if reduced.parts is None:
        return reduced.total
    total, seen = torch.zeros(n), torch.zeros(n, dtype=torch.int64)
    for index, value, layout, block in reduced.parts:
        where = layout.to_global(index, block)
        stored = where < n
        total[where[stored]] = value[stored]
        seen.index_add_(0, where[stored], torch.ones_like(where[stored]))
    assert int(seen.amax()) <= 1
    return total


def sends_all(case: Algorithm) -> bool:
    """Everything at density 1; the published threshold does not know that."""
    return getattr(case, "density", None) in (1.0, None) and "guard=False" not in getattr(case, "selector", "")


@sweep([(p, c) for p, c in SWEEP if c.conserves and sends_all(c) and not c.coarse])
def test_density_one_gives_the_exact_sum(size: int, algorithm: Algorithm) -> None:
    for n in (6, 1000):
        gradients = [[integers(n, rank, 7) for rank in range(size)]]
        for done, _, _ in simulate(algorithm, gradients):
            assert torch.equal(done[0].total, sum(gradients[0]))
            assert done[0].residual is None or not done[0].residual.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=name_of)
@sweep([(p, c) for p, c in SWEEP if p in (1, 5) and getattr(c, "density", None) in (0.1, 1.0, None)])
def test_every_gradient_dtype(size: int, algorithm: Algorithm, dtype: torch.dtype) -> None:
    n = 333
    gradients = [[integers(n, rank, step, dtype) for rank in range(size)] for step in range(2)]
    ranks = simulate(algorithm, gradients)
    for step in range(2):
        reduced = [done[step] for done, _, _ in ranks]
        total = reduced[0].total
        assert total.dtype == working_dtype(dtype)
        assert all(torch.equal(r.total, total) for r in reduced)
        cost = cost_of(algorithm, n, dtype, ranks, step)
        assert ranks[0][2][step].bytes_sent <= cost.bytes_sent
        assert not algorithm.static or ranks[0][2][step].bytes_sent == cost.bytes_sent
        if algorithm.conserves:
            before = [None if step == 0 else done[0].residual for done, _, _ in ranks]
            put_in = sum(with_residual(g, r) for g, r in zip(gradients[step], before, strict=True))
            assert conserved(algorithm, put_in, total + sum(owed(r.residual, total) for r in reduced))


@sweep([(p, c) for p, c in SWEEP if p in (2, 7) and c.conserves])
def test_real_values_are_conserved_to_rounding(size: int, algorithm: Algorithm) -> None:
    n = 2000
    gradients = [[normals(n, rank, step) * 10.0 ** (rank - 3) for rank in range(size)] for step in range(4)]
    ranks = simulate(algorithm, gradients)
    fed = sum(g.double() for by_rank in gradients for g in by_rank)
    delivered = sum(r.total.double() for r in ranks[0][0])
    left = sum(owed(done[-1].residual, done[-1].total).double() for done, _, _ in ranks)
    scale = sum(g.double().abs() for by_rank in gradients for g in by_rank)
    assert ((fed - delivered - left).abs() <= 1e-5 * scale).all()


@sweep([(p, c) for p, c in SWEEP if p in (1, 4, 7)])
def test_sent_positions_are_those_whose_mass_left(size: int, algorithm: Algorithm) -> None:
    gradients = [[normals(200, rank, 3) for rank in range(size)]]
    ranks = simulate(algorithm, gradients)
    left = torch.zeros(200, dtype=torch.bool)
    for done, _, _ in ranks:
        left[slice(None) if done[0].sent is None else done[0].sent] = True
    assert left[ranks[0][0][0].total != 0].all(), "delivered, but sent by nobody"
    for rank, (done, _, _) in enumerate(ranks):
        (reduced,) = done
        if algorithm.coarse:
            continue
        residual, mine = owed(reduced.residual, reduced.total), gradients[0][rank]
        if reduced.sent is None:
            assert not residual.any()
            continue
        assert torch.equal(reduced.sent, reduced.sent.unique())
        kept_back = torch.ones(200, dtype=torch.bool)
        kept_back[reduced.sent] = False
        share = {"float32": 0.0, "int8": 0.016}.get(width_of(algorithm), 0.008)
        rounding = share * size * mine.abs().max()
        assert (residual[reduced.sent].abs() <= rounding).all(), "sent, but still owed"
        undelivered = kept_back & (reduced.total == 0)
        alone = not hasattr(algorithm, "inner")  # elsewhere, others' shares are owed here, too
        if size == 1 or (alone and width_of(algorithm) == "float32"):
            assert torch.equal(residual[undelivered], mine[undelivered])


@pytest.mark.parametrize(
    ("where", "bad"), [("gradient", float("inf")), ("residual", float("nan")), ("sum", float("inf"))]
)
@sweep([(p, c) for p, c in SWEEP if p in (2, 5)])
def test_a_non_finite_value_is_known_to_all_ranks(size: int, algorithm: Algorithm, where: str, bad: float) -> None:
    n, culprit = 100, size // 2

    def rank(transport: Any, wants_total: bool) -> bool:
        grad, residual = normals(n, transport.rank, 1), torch.zeros(n)
        if where == "sum":
            grad[37] = 3e38
        elif transport.rank == culprit:
            (grad if where == "gradient" else residual)[37] = bad
        state = algorithm.init(n, grad.dtype, grad.device, size)
        state.wants_total = wants_total
        reduced = algorithm.reduce(grad, residual, state, 5, transport)
        return bool(reduced.ok and (where != "sum" or torch.isfinite(written_out(reduced, n)).all()))

    # Where such a sum does not come about, all ranks agree all the same.
    bounded = where == "sum" and (width_of(algorithm) == "float16" or algorithm.coarse)
    for wants_total in (True, False):
        verdicts = sim.run(size, functools.partial(rank, wants_total=wants_total)).results
        assert verdicts == ([verdicts[0]] * size if bounded else [False] * size)


@sweep([(p, c) for p, c in SWEEP if p in (2, 3, 5) and c.checked and getattr(c, "density", None) in (0.1, 1.0, None)])
def test_damaged_bytes_in_any_round_are_an_error(size: int, algorithm: Algorithm) -> None:
    n, calls = 400, 0
    while True:
        hits: list[bool] = []

        def rank(transport: Any, at: int = calls, hits: list[bool] = hits) -> None:
            wire = Damaging(transport, at if transport.rank == size - 1 else 10**9, seed=at)
            try:
                steps(algorithm, [[normals(n, r, 2) for r in range(size)]], wire)  # type: ignore[arg-type]
            finally:
                hits.append(wire.hit)

        try:
            sim.run(size, rank)
        except DamagedBag:
            calls += 1
        else:
            assert not any(hits), f"damage in call {calls} went unnoticed"
            assert calls >= 1
            return


@sweep([(p, c) for p, c in FEW if p > 1])
def test_a_failing_rank_ends_all_with_its_error(size: int, algorithm: Algorithm) -> None:
    def rank(transport: Any) -> None:
        for step in range(3):
            if step == 1 and transport.rank == size - 1:
                raise ZeroDivisionError("on purpose")
            steps(algorithm, [[normals(50, r, step) for r in range(size)]], transport)

    with pytest.raises(ZeroDivisionError, match="on purpose"):
        sim.run(size, rank)


@sweep(FEW)
def test_nothing_to_reduce(size: int, algorithm: Algorithm) -> None:
    for done, _, traffic in simulate(algorithm, [[torch.empty(0) for _ in range(size)]]):
        assert done[0].total.numel() == 0
        assert done[0].ok
        assert traffic[0].bytes_sent == 0
    assert tuple(algorithm.cost(0, torch.float32, size)) == (0, 0, 0)


@pytest.mark.parametrize("grad", [
    torch.ones(4, dtype=torch.int64), torch.ones(4, dtype=torch.complex64), torch.eye(3).to_sparse(),
    torch.ones(2, 2), torch.ones(8)[::2],
], ids=["int64", "complex64", "sparse", "matrix", "strided"])  # fmt: skip
@sweep([pair for pair in FEW if pair[0] == 1])
def test_gradients_that_cannot_be_reduced(size: int, algorithm: Algorithm, grad: torch.Tensor) -> None:
    with pytest.raises(GradientError, match=r"layout|dtype|flat"):
        sim.run(size, lambda t: algorithm.reduce(grad, None, algorithm.init(4, torch.float32, grad.device, 1), 0, t))


def test_registry_names_are_those_of_the_classes() -> None:
    assert {"dense", "topk", "spardl"} <= set(registry())
    assert all(name == cls.name and issubclass(cls, Algorithm) for name, cls in registry().items())
    assert set(VALUES) == {"float32", "bfloat16", "float16", "int8"}
