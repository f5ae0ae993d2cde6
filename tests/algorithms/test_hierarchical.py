"""Two levels against their definition, written out for all ranks at once; what leaves a node; nodes that do not fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from sparcomm.algorithms import Reduced, State
from sparcomm.algorithms.base import field_kinds, get_field, shared
from sparcomm.algorithms.dense import Dense
from sparcomm.algorithms.hierarchical import Hierarchical
from sparcomm.algorithms.spardl import SparDL, SparDLState
from sparcomm.algorithms.topk import TopKAllGather
from sparcomm.collectives.nodes import Nodes, in_order_of_nodes
from sparcomm.collectives.slices import Slices
from sparcomm.errors import ConfigError
from sparcomm.transport import sim
from sparcomm.transport.base import Transport
from sparcomm.transport.torchdist import TorchTransport
from support.pool import pool
from support.sums import integers, normals, owed, simulate, steps
from support.training import Halves

CPU = torch.device("cpu")


def grouping(algorithm: Hierarchical, size: int) -> list[list[int]]:
    """The ranks of every node."""
    s = algorithm.local_size or 1
    return [list(g) for g in algorithm.groups or (range(m, m + s) for m in range(0, size, s))]


def by_definition(algorithm: Hierarchical, put_in: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The total, and every rank's residual: sums of nodes, their slices reduced by ``outer``, left where they were."""
    size, nodes = len(put_in), grouping(algorithm, len(put_in))
    s, n = len(nodes[0]), put_in[0].numel()
    slices, total = Slices(n, s, CPU), torch.zeros(n)
    residual = [torch.zeros(n) for _ in range(size)]
    sums = [sum(put_in[r] for r in node) for node in nodes]
    for local in range(s):
        parts = [slices.take(x, local, torch.empty(slices.length)) for x in sums]
        for m, (done, _, _) in enumerate(simulate(algorithm.outer, [parts])):
            slices.put(owed(done[0].residual, parts[0]), local, residual[nodes[m][local]])
            slices.put(done[0].total, local, total)
    return total, residual


@pytest.mark.parametrize("numel", [1, 2, 3, 5, 64, 65, 257, 1000, 9001])
@pytest.mark.parametrize(("size", "fields"), [
    (4, {"local_size": 2}), (4, {"local_size": 4}), (4, {"groups": ((0, 2), (1, 3))}), (6, {"local_size": 3}),
    (6, {"groups": ((5, 0, 2), (1, 4, 3))}), (8, {"local_size": 2}),
])  # fmt: skip
def test_equals_its_definition(size: int, fields: dict[str, Any], numel: int) -> None:
    for outer in (SparDL(density=0.05), SparDL(density=0.3, schedule="direct"), Dense(), TopKAllGather(density=0.1)):
        algorithm = Hierarchical(outer=outer, **fields)
        gradients = [[integers(numel, r, step) for r in range(size)] for step in range(3)]
        ranks = simulate(algorithm, gradients)
        residual = [torch.zeros(numel) for _ in range(size)]
        for step, by_rank in enumerate(gradients):
            total, residual = by_definition(algorithm, [g + r for g, r in zip(by_rank, residual, strict=True)])
            for rank in range(size):
                reduced = ranks[rank][0][step]
                assert torch.equal(reduced.total, total)
                assert torch.equal(owed(reduced.residual, total), residual[rank])


@pytest.mark.parametrize("schedule", ["log", "direct"])
def test_one_rank_per_node_is_outer_alone(schedule: str) -> None:
    outer, gradients = (
        SparDL(density=0.1, schedule=schedule),
        [[normals(500, r, step) for r in range(4)] for step in (0, 1)],
    )
    plain = simulate(outer, gradients)
    nested = simulate(Hierarchical(outer=outer, local_size=1), gradients)
    for (one, _, traffic), (two, _, booked) in zip(plain, nested, strict=True):
        assert traffic == booked
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a.total, b.total)
            assert torch.equal(a.residual, b.residual)
            assert torch.equal(a.sent, b.sent)


def test_what_was_sent_is_what_the_others_slices_delivered_and_the_own_one_left() -> None:
    algorithm, n = Hierarchical(outer=SparDL(density=0.1), local_size=2), 400
    gradients = [[normals(n, r, 1) for r in range(4)]]
    slices = Slices(n, 2, CPU)
    for rank, (done, _, _) in enumerate(simulate(algorithm, gradients)):
        (reduced,) = done
        delivered = set(reduced.total.nonzero().flatten().tolist())
        own = set(slices.cut.to_global(torch.arange(slices.length), rank % 2).tolist())
        sent = set(reduced.sent.tolist())
        assert sent - own == delivered - own
        assert sent & own <= delivered
        assert not set(reduced.residual.nonzero().flatten().tolist()) - own, "owed on the own slice only"


def test_an_inner_algorithm_that_keeps_something_back_owes_it_on_its_own_rank() -> None:
    algorithm, n = Hierarchical(TopKAllGather(density=0.3), SparDL(density=0.2), local_size=2), 300
    gradients = [[integers(n, r, step) for r in range(4)] for step in range(3)]
    ranks = simulate(algorithm, gradients)
    fed = sum(g for by_rank in gradients for g in by_rank)
    delivered = sum(reduced.total for reduced in ranks[0][0])
    assert torch.equal(fed, delivered + sum(done[-1].residual for done, _, _ in ranks))
    for rank, (done, _, _) in enumerate(ranks):
        first = done[0]
        assert not first.residual[first.sent].any()
        assert (gradients[0][rank][first.sent] != 0).any()


# ---- traffic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["log", "direct"])
def test_a_rank_sends_its_share_of_what_its_node_sends(schedule: str) -> None:
    n, size, s = 40_000, 8, 4
    algorithm = Hierarchical(outer=SparDL(density=0.01, schedule=schedule), local_size=s)
    gradients = [[normals(n, r, 0) for r in range(size)]]

    def crossing(t: Transport) -> int:
        """Bytes that this rank sends to other nodes, counted on the link."""
        seen, bytes_before = Watching(t), t.traffic.bytes_sent
        steps(algorithm, gradients, seen)  # type: ignore[arg-type]
        assert t.traffic.bytes_sent - bytes_before == algorithm.cost(n, torch.float32, size).bytes_sent
        return seen.crossed

    counted = sim.run(size, crossing).results
    link = algorithm.link_cost(n, torch.float32, size)
    assert counted == [link.bytes_sent] * size
    flat, nodes = SparDL(density=0.01, schedule=schedule).cost(n, torch.float32, size), size // s
    among_all = flat.bytes_sent * size / (size - 1)  # SparDL's bytes are in proportion to (p - 1) / p
    assert link.bytes_sent * s == pytest.approx(among_all * (nodes - 1) / nodes, rel=0.1)
    assert link.bytes_sent * s < flat.bytes_sent


class Watching:
    """A transport that counts what its group across nodes sends: the second one that is split off."""

    def __init__(self, transport: Transport) -> None:
        self._transport, self.crossed, self._groups = transport, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def split(self, color: int, key: int) -> Any:
        self._groups += 1
        made = self._transport.split(color, key)
        return Counting(made, self) if self._groups == 2 else made


class Counting:
    def __init__(self, transport: Transport, owner: Watching) -> None:
        self._transport, self._owner = transport, owner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._transport, name)
        if name not in ("exchange", "all_to_all", "all_gather"):
            return found

        def call(*args: Any, **kwargs: Any) -> None:
            before = self._transport.traffic.bytes_sent
            found(*args, **kwargs)
            self._owner.crossed += self._transport.traffic.bytes_sent - before

        return call


def test_the_gather_inside_is_sparse_where_that_is_shorter_and_exact_in_float64() -> None:
    n, size = 2000, 4

    def inside(density: float) -> int:
        algorithm = Hierarchical(outer=SparDL(density=density), local_size=2)
        whole, link = (cost(n, torch.float32, size) for cost in (algorithm.cost, algorithm.link_cost))
        return whole.bytes_sent - link.bytes_sent

    dense = 2 * (16 + 4 * Slices(n, 2, CPU).length)
    assert inside(1.0) == dense
    assert inside(0.01) < 0.6 * dense
    # Thirds are not exact in float32: what arrives is the sum of the nodes' sums, not rounded on its last way.
    third = torch.full((n,), 1 / 3, dtype=torch.float64)
    gradients = [[third * (r + 1) for r in range(size)]]
    (done, _, _), *_ = simulate(Hierarchical(outer=Dense(), local_size=2), gradients)
    assert torch.equal(done[0].total, (gradients[0][0] + gradients[0][1]) + (gradients[0][2] + gradients[0][3]))


# ---- nodes that do not fit ------------------------------------------------------------------------------------------


def refused(t: Transport, algorithm: Hierarchical, told: list[str] | None = None) -> str:
    """What ``reduce`` raises on this rank, which has been told another number of ranks per node."""
    if told is not None:
        algorithm = replace(algorithm, local_size=int(told[t.rank]))
    state = algorithm.init(50, torch.float32, CPU, t.size)
    with pytest.raises(ConfigError) as caught:
        algorithm.reduce(torch.ones(50), None, state, 0, t)
    return str(caught.value)


def refused_on_gloo(rank: int, size: int, algorithm: Hierarchical, told: list[str] | None) -> str:
    t = TorchTransport.from_group(timeout=20)
    said = refused(t, algorithm, told)
    t.close()
    return said


@pytest.mark.parametrize(
    "told", [["3", "3", "3", "1"], ["2", "2", "1", "2"], ["4", "2", "2", "4"], ["8"] * 4, ["3"] * 4]
)
def test_nodes_that_are_not_equal_are_an_error_on_every_rank(told: list[str]) -> None:
    said = sim.run(4, lambda t: refused(t, Hierarchical(), told)).results
    assert all("4 ranks make nodes of" in text and "local_size=" in text for text in said)
    assert len(set(said)) == 1


@pytest.mark.parametrize("told", [["3", "3", "3", "1"], ["2", "2", "1", "2"]])
def test_nodes_that_are_not_equal_are_an_error_on_every_real_rank(told: list[str]) -> None:
    said = pool(4).run(refused_on_gloo, Hierarchical(), told, timeout=30)
    assert all("4 ranks make nodes of" in text for text in said)


@pytest.mark.parametrize(
    ("nodes", "per_node", "order"),
    [
        ((), 2, [0, 1, 2, 3]),
        (((0, 1), (2, 3)), 2, [0, 1, 2, 3]),
        (((0, 2), (1, 3)), 2, [0, 2, 1, 3]),
        (((0, 2), (1, 3)), 1, [0, 2, 1, 3]),
        (((0, 1, 2, 3),), 2, [0, 1, 2, 3]),
        (((0, 2), (1, 3)), 4, [0, 1, 2, 3]),
        (((0, 2, 3), (1,)), 2, [0, 1, 2, 3]),
    ],
)
def test_nodes_that_the_transport_knows(nodes: tuple[tuple[int, ...], ...], per_node: int, order: list[int]) -> None:
    assert in_order_of_nodes(nodes, 4, per_node) == order

    def teams(t: Transport) -> tuple[list[int], list[int]]:
        t.nodes = nodes
        found: list[list[int]] = []
        for team in Nodes(per_node).teams(t):
            members = torch.empty(team.size, dtype=torch.int64)
            team.all_gather(members, torch.tensor(t.rank))
            found.append(members.tolist())
        return found[0], found[1]

    for rank, (node, across) in enumerate(sim.run(4, teams).results):
        place = order.index(rank)
        first = place - place % per_node
        assert node == order[first : first + per_node]
        assert across == (order[place % per_node :: per_node] if per_node > 1 else [0, 1, 2, 3])


def teams_by_environment(rank: int, size: int, local_ranks: str) -> str:
    t, said = TorchTransport.from_group(timeout=20), ""
    told = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": local_ranks[rank], "LOCAL_WORLD_SIZE": "2"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        try:
            Nodes().teams(t)
        except ConfigError as error:
            said = str(error)
    t.close()
    return said


def test_ranks_that_the_launcher_has_dealt_to_nodes_are_refused_where_nobody_knows_which() -> None:
    assert pool(4).run(teams_by_environment, "0101", timeout=30) == [""] * 4
    said = pool(4).run(teams_by_environment, "0011", timeout=30)
    assert len(set(said)) == 1
    assert "--map-by slot" in said[0]


def test_a_group_that_does_not_fit_is_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match=r"unknown \(LOCAL_WORLD_SIZE is not set\).*local_size= or groups="):
        Hierarchical().check_size(4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="LOCAL_WORLD_SIZE='two'"):
        Hierarchical().check_size(4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    Hierarchical().check_size(4)
    assert Hierarchical().surroundings() == {"LOCAL_WORLD_SIZE": "2"}
    assert Hierarchical(local_size=2).surroundings() == {}
    with pytest.raises(ConfigError, match="5 ranks make nodes of 2, 2, 1, where 2 were asked for"):
        Hierarchical().check_size(5)
    with pytest.raises(ConfigError, match="every rank from 0 to 5 once"):
        Hierarchical(groups=((0, 1), (2, 3))).check_size(6)
    with pytest.raises(ConfigError, match="2 ranks make nodes of 2, where 3 were asked for"):  # of the algorithm within
        Hierarchical(outer=Hierarchical(local_size=3), local_size=2).check_size(4)
    with pytest.raises(ConfigError, match=r"outer=Halves\(\): keeps state by element"):
        Hierarchical(outer=Halves(), local_size=2).check_size(4)
    with pytest.raises(ConfigError, match="inner=3"):
        Hierarchical(inner=3)  # type: ignore[arg-type]


def test_nodes_within_nodes() -> None:
    algorithm = Hierarchical(outer=Hierarchical(outer=SparDL(density=1.0), local_size=2), local_size=2)
    gradients = [[integers(300, r, step) for r in range(8)] for step in range(2)]
    for done, _, _ in simulate(algorithm, gradients):
        for step in range(2):
            assert torch.equal(done[step].total, sum(gradients[step]))


# ---- state and density ----------------------------------------------------------------------------------------------


@dataclass
class CountingState(SparDLState):
    count: int = shared(default=0)


@dataclass(frozen=True)
class CountingSparDL(SparDL):
    """SparDL that counts its steps."""

    name: ClassVar[str] = "counting spardl"

    def init(self, n: int, dtype: torch.dtype, device: torch.device, size: int) -> CountingState:
        return CountingState(layout=super().init(n, dtype, device, size).layout)

    def _reduce(self, grad: Tensor, residual: Tensor | None, state: State, step: int, transport: Transport) -> Reduced:
        reduced = super()._reduce(grad, residual, state, step, transport)
        assert isinstance(state, CountingState)
        return reduced._replace(state=replace(state, count=state.count + 1))


@pytest.mark.parametrize("local", [1, 2])
def test_what_algorithms_within_remember_is_pending_with_the_rest(local: int) -> None:
    algorithm = Hierarchical(outer=CountingSparDL(density=0.1), local_size=local)

    def rank(t: Transport) -> tuple[int, int]:
        state = algorithm.init(200, torch.float32, CPU, 4)
        reduced = algorithm.reduce(normals(200, t.rank, 0), None, state, 0, t)
        return get_field(state, "outer.count"), get_field(reduced.state, "outer.count")

    assert sim.run(4, rank).results == [(0, 1)] * 4
    kinds = dict(field_kinds(algorithm.init(200, torch.float32, CPU, 4)))
    assert kinds["outer.count"] == "shared"
    assert kinds["outer.layout"] == kinds["slices"] == kinds["inner.unit"] == "derived"


def test_the_density_is_outers() -> None:
    algorithm = Hierarchical(outer=SparDL(density=0.1, schedule="direct"), local_size=2)
    assert algorithm.density == 0.1
    assert algorithm.with_density(0.5) == Hierarchical(outer=SparDL(density=0.5, schedule="direct"), local_size=2)
    assert not hasattr(Hierarchical(outer=Dense()), "density")
    assert (algorithm.sparse, Hierarchical(outer=Dense()).sparse) == (True, False)
