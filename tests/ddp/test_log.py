"""The logger: who says what, and at which level."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import pytest
import torch

import sparcomm
from sparcomm.algorithms.dense import Dense
from sparcomm.algorithms.s2 import S2Reducer
from sparcomm.algorithms.spardl import SparDL
from sparcomm.ddp import log
from sparcomm.ddp.units import Carried, Partition
from support.pool import pool
from support.training import SIZES, Fed, gradient_step, integers, wrap


def test_every_record_names_its_rank(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sparcomm"):
        log.get_logger(2, 8).warning("lost %d of %s", 3, "100%", extra={"unit": 5})
    (record,) = caplog.records
    assert record.getMessage() == "[rank 2/8] lost 3 of 100%"
    assert (record.name, record.rank, record.size, record.unit) == ("sparcomm", 2, 8, 5)


@pytest.mark.parametrize(("rank", "level"), [(0, logging.WARNING), (1, logging.DEBUG), (7, logging.DEBUG)])
def test_what_all_ranks_know_is_said_by_rank_0(rank: int, level: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "sparcomm"):
        log.get_logger(rank, 8).tell(logging.WARNING, "all of us")
    (record,) = caplog.records
    assert record.levelno == level
    assert record.filename == "test_log.py"  # where it was said, and not where it was passed on


def say_everything(rank: int) -> None:
    mine = log.get_logger(rank, 4)
    params = [torch.empty(250_000), torch.empty(1000)]
    log.started(mine, SparDL(density=0.01), params)
    partition = Partition(final=True)
    for p, algorithm in zip(params, (SparDL(density=0.01), Dense()), strict=True):
        partition.add([p], p.dtype, p.device, algorithm, 4, Carried())
    log.units_made(mine, 1, partition.units)
    log.warmed_up(mine, 500, 0.01)
    log.warmed_up(mine, 500)
    log.switched(mine, 20, 0.0125, 0.0032, off=True)
    log.switched(mine, 20, 0.0125, 0.2, off=False)


def test_a_run_says_what_it_does_in_a_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sparcomm"):
        say_everything(0)
        said = [r.getMessage().removeprefix("[rank 0/4] ") for r in caplog.records]
        caplog.clear()
        say_everything(3)
        assert caplog.records == []
    start, units, *rest = said
    assert "SparDL(density=0.01" in start
    assert start.endswith("over 4 ranks, 251,000 elements in 2 parameters")
    cost = SparDL(density=0.01).cost(250_000, torch.float32, 4).bytes_sent + Dense().cost(1000, torch.float32, 4)[2]
    dense = sum(Dense().cost(n, torch.float32, 4).bytes_sent for n in (250_000, 1000))
    assert units == (
        f"step 1: 2 units of 1,000 to 250,000 elements; a step sends at most {cost / 1000:.1f} kB a rank, "
        f"{dense / cost:.1f}x less than dense"
    )
    assert rest == [
        "step 500: the warm-up is over, gradients travel compressed from here, at density 0.01",
        "step 500: the warm-up is over, gradients travel compressed from here",
        "step 20: compression does not pay on this link: dense from here (12.50 ms a step compressed, 3.20 ms dense)",
        "step 20: compression pays, and stays on (12.50 ms a step compressed, 200.00 ms dense)",
    ]


def test_nothing_known_yet(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sparcomm"):
        log.started(log.get_logger(0, 1), Dense(), [])
        log.units_made(log.get_logger(0, 1), 1, [])
    first, second = (r.getMessage() for r in caplog.records)
    assert first.endswith("over 1 ranks, parameters not known yet")
    assert "0 units of no elements; a step sends at most 0 B a rank, 1.0x less" in second


class Kept(logging.Handler):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append((record.levelno, record.getMessage()))


def trained(rank: int, size: int, warmup: int) -> list[tuple[int, str]]:
    kept, logger = Kept(), logging.getLogger("sparcomm")
    logger.addHandler(kept)
    logger.setLevel(logging.DEBUG)
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, SparDL(density=0.05), warmup=warmup, timeout=30)
    for step in range(5):
        gradient_step(ddp, integers(SIZES, rank, step))
    state.close()
    logger.removeHandler(kept)
    logger.setLevel(logging.NOTSET)
    return kept.said


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_real_run_says_how_it_was_set_up_and_cut_and_when_it_is_warm(warmup: int) -> None:
    first, second = pool(2).run(trained, warmup)
    assert [text.split("] ")[0] for _, text in first] == ["[rank 0/2"] * len(first)
    assert [text.split("] ")[0] for _, text in second] == ["[rank 1/2"] * len(second)
    said = [text.split("] ")[1] for level, text in first if level == logging.INFO]
    assert said == [text.split("] ")[1] for level, text in second if level == logging.DEBUG]
    assert said[2:] == ["step 3: the warm-up is over, gradients travel compressed from here, at density 0.05"] * (
        warmup > 0
    )
    assert f"over 2 ranks, {sum(SIZES):,} elements in {len(SIZES)} parameters" in said[0]
    assert said[1].startswith("step 1: ")
    assert "less than dense" in said[1]


def full_and_sparse(rank: int, size: int) -> list[str]:
    """What S2Reducer without a density is said to do, on gradients without zeros and on ones that are mostly zero."""
    said: list[str] = []
    for filled in (1.0, 0.02):
        ddp = wrap(torch.nn.Linear(1000, 4, bias=False))
        with capture() as records:
            state = sparcomm.attach(ddp, S2Reducer(latency=0.0, bandwidth=1e6), timeout=30)
            for step in range(12):
                x = torch.zeros(1, 1000)
                x[0, : int(1000 * filled)] = 1.0 + step
                ddp(x).sum().backward()
            state.stats()  # waits
            state.close()
        said += [r.getMessage() for r in records if r.levelno >= logging.WARNING] or ["nothing"]
    return said


@contextlib.contextmanager
def capture() -> Iterator[list[logging.LogRecord]]:
    """Records of the logger, in whatever process."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("sparcomm").addHandler(handler)
    try:
        yield records
    finally:
        logging.getLogger("sparcomm").removeHandler(handler)


def test_a_missing_density_is_noticed_where_nothing_is_zero() -> None:
    first, other = pool(2).run(full_and_sparse)
    assert len(first) == 2
    assert "step 10: 4,000 elements travel densely: s2 without a density" in first[0]
    assert first[1] == "nothing"
    assert other == ["nothing", "nothing"]
