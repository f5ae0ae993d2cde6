"""SparDL against the paper's own formulation, written out with dense vectors for all ranks at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparcomm.algorithms.spardl import SparDL, log_schedule
from sparcomm.errors import ConfigError
from sparcomm.layout import LAYOUTS, Layout
from support.sums import integers, normals, owed, simulate


def test_schedule_of_six_blocks_is_the_papers_example() -> None:
    assert log_schedule(6) == [(4, 2), (2, 2), (1, 1)]


@pytest.mark.parametrize("size", range(1, 41))
def test_every_contribution_reaches_its_owner_once(size: int) -> None:
    held = [[{r} for _ in range(size)] for r in range(size)]  # held[r][b]: whose shares of block b rank r has
    for gap, count in log_schedule(size):
        moved = [[(r, (r + gap + c) % size) for c in range(count)] for r in range(size)]
        for r, blocks in enumerate(moved):
            assert (r + gap) % size != r
            for _, b in blocks:
                target = held[(r + gap) % size][b]
                assert not target & held[r][b], "a contribution would count twice"
                target |= held[r][b]
                held[r][b] = set()
    assert all(held[b][b] == set(range(size)) for b in range(size))
    assert len(log_schedule(size)) == (size - 1).bit_length()


class Paper:
    """Spar-Reduce-Scatter, all-gather and global residual collection with a dense copy for everything."""

    def __init__(self, cut: Layout, quota: int) -> None:
        self.cut, self.quota, self.size = cut, quota, cut.blocks
        local = torch.arange(cut.length)
        self.where = [cut.to_global(local, b) for b in range(cut.blocks)]
        self.where = [w[w < cut.numel] for w in self.where]

    def top(self, acc: Tensor, b: int) -> Tensor:
        """Global positions of block b's quota: largest first, ties at the lowest position."""
        magnitude = acc[self.where[b]].abs()
        order = sorted(range(len(magnitude)), key=lambda i: (-magnitude[i].item(), i))[: self.quota]
        return self.where[b][torch.tensor(order, dtype=torch.int64)]

    def reduce(self, put_in: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        acc = [x.clone() for x in put_in]
        for gap, count in log_schedule(self.size):
            bags = []
            for r in range(self.size):
                bag = []
                for c in range(count):
                    top = self.top(acc[r], (r + gap + c) % self.size)
                    bag.append((top, acc[r][top].clone()))
                    acc[r][top] = 0
                bags.append(bag)
            for r, bag in enumerate(bags):
                for top, value in bag:
                    acc[(r + gap) % self.size][top] += value
        total = torch.zeros_like(put_in[0])
        for r in range(self.size):
            top = self.top(acc[r], r)
            total[top], acc[r][top] = acc[r][top], 0.0
            reached = torch.zeros(len(total), dtype=torch.bool)
            reached[top] = True
            for other in range(self.size):  # end-procedure: outside the final set, everyone takes its own share back
                back = self.where[r][~reached[self.where[r]]]
                acc[other][back] = put_in[other][back]
        return total, acc


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 8])
@pytest.mark.parametrize("layout", ["dealt", "contiguous"])
@pytest.mark.parametrize("make", [integers, normals])
def test_equals_the_papers_formulation(size: int, layout: str, make: object) -> None:
    n, density = 640, 0.05
    algorithm = SparDL(density=density, layout=layout)
    gradients = [[make(n, r, step) for r in range(size)] for step in range(3)]  # type: ignore[operator]
    ranks = simulate(algorithm, gradients)
    paper = Paper(LAYOUTS[layout](n, size), algorithm.kept(n, size) // size)
    residual = [torch.zeros(n) for _ in range(size)]
    for step, by_rank in enumerate(gradients):
        total, residual = paper.reduce([g + r for g, r in zip(by_rank, residual, strict=True)])
        for rank in range(size):
            reduced = ranks[rank][0][step]
            assert torch.equal(reduced.total, total)
            assert torch.equal(owed(reduced.residual, total), residual[rank])


@pytest.mark.parametrize("schedule", ["log", "direct"])
def test_residual_rules_differ_only_in_what_they_forget(schedule: str) -> None:
    gradients = [[normals(4000, r, 1) for r in range(6)]]
    owing = {}
    for rule in ("global", "partial", "local"):
        ranks = simulate(SparDL(density=0.01, schedule=schedule, residuals=rule), gradients)
        owing[rule] = sum(done[0].residual for done, _, _ in ranks)
        total = ranks[0][0][0].total
    fed = sum(gradients[0])
    lost = {rule: (fed - total - owed_).abs().sum().item() for rule, owed_ in owing.items()}
    assert lost["global"] < 1e-2
    dropped_on_the_way = schedule == "log"  # direct has no intermediate ranks
    assert (lost["partial"] > 1) == dropped_on_the_way
    assert lost["local"] > lost["partial"] + 1


def test_quota_is_spread_over_blocks_and_never_zero() -> None:
    assert SparDL(density=1e-9).kept(1000, 4) == 4
    assert SparDL(density=0.01).kept(2_000_000, 8) == 20_000
    assert SparDL(density=1.0).kept(1001, 4) == 1001


def test_kept_is_all_where_dense_takes_over() -> None:
    n, algorithm = 300, SparDL(density=0.97)
    gradients = [[torch.ones(n) for _ in range(2)]]
    total = simulate(algorithm, gradients)[0][0][0].total
    assert int((total != 0).sum()) == algorithm.kept(n, 2) == n


def test_dense_takes_over_exactly_where_it_sends_fewer_bytes() -> None:
    from sparcomm.algorithms.dense import Dense

    for n in (1, 3, 10, 100, 1000):
        for density in (0.01, 0.3, 0.9, 1.0):
            sparse = SparDL(density=density).cost(n, torch.float32, 4).bytes_sent
            assert sparse <= Dense().cost(n, torch.float32, 4).bytes_sent


@pytest.mark.parametrize(("change", "says"), [
    ({"density": 0}, r"density=0.*above 0 and at most 1"),
    ({"density": 1.5}, r"density=1.5"),
    ({"density": float("nan")}, "density=nan"),
    ({"density": "1%"}, "density='1%'"),
    ({"density": True}, "density=True"),
    ({"schedule": "ring"}, r"schedule='ring'.*'log', 'direct'"),
    ({"layout": "round-robin"}, r"layout='round-robin'.*'dealt', 'contiguous'"),
    ({"residuals": "none"}, r"residuals='none'.*'global', 'partial', 'local'"),
    ({"values": "int4"}, r"values='int4'.*'float32', 'bfloat16', 'float16'"),
])  # fmt: skip
def test_bad_settings_name_the_value_and_the_choices(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SparDL(**change)  # type: ignore[arg-type]


def test_state_of_another_size_is_refused() -> None:
    from sparcomm.transport import sim

    algorithm = SparDL()
    state = algorithm.init(100, torch.float32, torch.device("cpu"), 2)
    with pytest.raises(ConfigError, match="5000 elements over 2 ranks"):
        sim.run(2, lambda t: algorithm.reduce(torch.ones(5000), None, state, 0, t))
