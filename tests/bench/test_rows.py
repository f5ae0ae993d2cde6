"""From ranks' samples to a row, and from rows to what is shown."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from sparcomm.bench import report
from sparcomm.bench.gradient import captured, exact_sum, gradient
from sparcomm.bench.options import Options
from sparcomm.bench.rows import Row, combine
from sparcomm.bench.sample import Counted, Sample, Stopwatch
from sparcomm.bench.world import World, agree
from sparcomm.errors import ConfigMismatch
from sparcomm.transport.base import Traffic


def test_the_exact_sum_is_that_of_all_ranks() -> None:
    parts = [gradient(1003, rank, seed=5) for rank in range(3)]
    assert torch.allclose(exact_sum(1003, 3, seed=5), torch.stack(parts).sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(parts[1], gradient(1003, 1, seed=5))
    assert not torch.equal(parts[1], gradient(1003, 1, seed=6))


def test_ranks_share_half_of_their_energy() -> None:
    a, b = gradient(200_000, 0, seed=0), gradient(200_000, 1, seed=0)
    assert float(a @ b / (a.norm() * b.norm())) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("n", [1, 19, 20, 21])
def test_short_gradients(n: int) -> None:
    assert gradient(n, 0, seed=0).shape == exact_sum(n, 2, seed=0).shape == (n,)


def test_energy_captured() -> None:
    total = exact_sum(5000, 4, seed=0)
    top = total.abs().topk(50).indices
    delivered = torch.zeros_like(total).index_copy_(0, top, total[top])
    assert captured(total, delivered.clone(), 50) == pytest.approx(1)
    assert captured(total, delivered / 2, 50) == pytest.approx(0.75)
    assert captured(total, total.clone(), 5000) == pytest.approx(1)
    assert captured(total, torch.zeros_like(total), 50) == pytest.approx(0)
    assert captured(torch.zeros(5), torch.zeros(5), 2) == 1


def test_a_row_is_the_slowest_rank_and_the_busiest() -> None:
    first = Sample([1.0, 2.0, 9.0], [0.1, 0.1, 0.5], 100, 4, 4, 7, 0.5, [4, 4, 120])
    second = Sample([2.0, 1.0, 3.0], [0.2, 0.3, 0.4], 120, 4, 4, 7, None, [4, 4, 120], link_bytes=130.0)
    row = combine("x", 50, [asdict(first), asdict(second)])
    assert (row.seconds, row.cpu_seconds) == (2.0, 0.3)
    assert not row.bound
    assert (row.bytes_sent, row.kept, row.energy, row.exact_cost, row.link_bytes) == (120, 7, 0.5, True, 130.0)
    second.cost = [4, 4, 121]
    assert combine("x", 50, [asdict(first), asdict(second)]).exact_cost is False
    second.bound = True  # sent less than a bound
    assert combine("x", 50, [asdict(first), asdict(second)]).exact_cost is True
    second.cost = [4, 4, 119]
    assert combine("x", 50, [asdict(first), asdict(second)]).exact_cost is False


def test_a_stopwatch_leaves_no_gaps() -> None:
    seen: list[int] = []
    watch = Stopwatch(seen.append)
    watch.tick()
    watch.start()
    watch.tick()
    watch.tick()
    assert len(watch.seconds) == len(watch.cpu_seconds) == 2
    assert sum(watch.seconds) == pytest.approx(watch.wall[-1] - watch.wall[0])
    assert seen == [1, 2, 3]


def test_traffic_per_step() -> None:
    traffic = Traffic(5, 5, 1000, 1000)
    counted = Counted(traffic)
    traffic.book(4, 2, 600, 600)
    assert counted.per_step(2) == {"bytes_sent": 300, "rounds": 2, "messages": 1, "link_bytes": None}


GOOD = Row("spardl", 1_000_000, 4, 0.01, 0.02, 100_000, 4, 4, 10_000, 0.8, exact_cost=True)
DENSE = Row("dense", 1_000_000, 4, 0.05, 0.01, 6_000_000, 6, 6, 1_000_000, 1.0, exact_cost=True)
BAD = Row("worse", 1_000_000, 4, error="rank 3: ended by SIGSEGV [core]")


def test_pays_below() -> None:
    limit = report.pays_below(GOOD)
    assert limit == pytest.approx(8 * 5_900_000 / 0.02)
    assert 0.02 + 8 * 100_000 / limit == pytest.approx(8 * 6_000_000 / limit)  # both take the same time there
    assert report.pays_below(Row("more", 1000, 4, 0.01, 0.02, 6001)) == 0


def test_json_has_exactly_the_promised_keys() -> None:
    shown = json.loads(report.as_json(GOOD))
    assert list(shown) == list(report.KEYS)
    assert shown["seconds"] == 0.01
    failed = json.loads(report.as_json(BAD))
    assert failed["error"] == BAD.error
    assert {key for key, value in failed.items() if value is not None} == {*report.KEYS[:4], "error"}


def test_the_table_names_what_failed_and_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = Row("wrong", 1_000_000, 4, 0.1, 0.02, 7_000_000, 4, 4, 1, 0.8, exact_cost=False, link_bytes=7.5e6)
    report.show("a title", [DENSE, GOOD, wrong, BAD])
    shown = capsys.readouterr().out
    for text in ("a title", "5.00x", "2.36 Gbit/s", "never", "DIFFERS", "MB on link", "7.500", "failed"):
        assert text in shown, shown
    assert "worse: rank 3: ended by SIGSEGV [core]" in shown
    report.show("training", [DENSE, GOOD], trained=True)
    assert "pays below" not in capsys.readouterr().out


def test_without_a_dense_row_nothing_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    report.show("alone", [GOOD])
    assert "0x" not in capsys.readouterr().out
    assert report.baseline([GOOD, BAD]) is None
    assert report.baseline([GOOD, DENSE]) is DENSE
    assert report.baseline([GOOD, DENSE], "mpi") is None


def test_rows_over_two_ways_are_compared_within_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert DENSE.seconds is not None
    over_mpi = [replace(row, over="mpi") for row in (replace(DENSE, seconds=DENSE.seconds / 2), GOOD, BAD)]
    report.show("two", [DENSE, GOOD, *over_mpi])
    lines = [line for line in capsys.readouterr().out.splitlines() if GOOD.algorithm in line]
    assert [("gloo" in line, "mpi" in line, "5.00x" in line, "2.50x" in line) for line in lines] == [
        (True, False, True, False),
        (False, True, False, True),
    ]
    assert report.names([DENSE, *over_mpi])[-1] == "worse over mpi"


def test_ranks_with_other_options_are_told_so() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def join(rank: int) -> str:
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=30))
        try:
            agree(World(rank, 3, "127.0.0.1", server.port, store), Options(numel=1000 + rank // 2))
        except ConfigMismatch as error:
            return str(error)
        return "no error"

    with ThreadPoolExecutor(3) as ranks:
        said = list(ranks.map(join, range(3)))
    assert said == ["rank 2 was started with other options than rank 0: numel=1001 here, 1000 there"] * 3
