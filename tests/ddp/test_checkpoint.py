"""Saving and resuming: bit for bit at the same world size, without loss at another."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparcomm
from sparcomm import CheckpointError, Dense, HookState, SparDL
from sparcomm.algorithms import Algorithm
from sparcomm.ddp import checkpoint
from support.pool import pool
from support.training import SIZES, Fed, Halves, gradient_step, integers, net_step, small_net, wrap

TIMEOUT = 30.0
StateDict = dict[str, Any]


def trained(
    rank: int, size: int, algorithm: Algorithm, upto: int, resume: Path | None, save_at: int | None, folder: Path
) -> tuple[list[Tensor], StateDict]:
    """Trains to step ``upto``, from the files of ``resume`` on if given; saves after step ``save_at``."""
    ddp = wrap(small_net())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    state = HookState(algorithm, ddp, timeout=TIMEOUT)
    start = 0
    if resume is not None:
        saved = torch.load(resume / f"{rank}.pt", weights_only=True)
        ddp.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state.load_state_dict(saved["hook"])
        start = saved["hook"]["step"]
        assert state.step == start
    ddp.register_comm_hook(state, sparcomm.hook)
    for step in range(start, upto):
        net_step(ddp, optimizer, rank, step)
        if step + 1 == save_at:
            saved = {"model": ddp.module.state_dict(), "optimizer": optimizer.state_dict(), "hook": state.state_dict()}
            torch.save(saved, folder / f"{rank}.pt")
    last = state.state_dict()
    state.close()
    return [p.detach() for p in ddp.parameters()], last


@pytest.mark.parametrize("algorithm", [SparDL(density=0.05), SparDL(density=0.1, values="bfloat16", schedule="direct")])
@pytest.mark.parametrize("save_at", [2, 5])
def test_a_resumed_run_is_bit_identical(algorithm: Algorithm, save_at: int, tmp_path: Path) -> None:
    whole = pool(4).run(trained, algorithm, 8, None, save_at, tmp_path)
    resumed = pool(4).run(trained, algorithm, 8, tmp_path, None, tmp_path)
    for (weights, state), (again, state_again) in zip(whole, resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
        assert equal(state, state_again)
        assert state["step"] == 8
        assert len(state["units"]) > 2


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b


def owing(rank: int, size: int, algorithm: Algorithm, steps: int) -> StateDict:
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, algorithm, timeout=TIMEOUT)
    for step in range(steps):
        gradient_step(ddp, integers(SIZES, rank, step))
    sd = state.state_dict()
    state.close()
    return sd


def go_on(rank: int, size: int, algorithm: Algorithm, saved: list[StateDict], steps: int) -> tuple[Any, ...]:
    """What a run that starts from ``saved`` owes at first, what it is fed and delivers, what it owes at last."""
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, algorithm, timeout=TIMEOUT)
    state.load_state_dict(saved)
    first = state.state_dict()
    start = first["step"]
    fed, means = sums(), sums()
    for step in range(start, start + steps):
        gradients = integers(SIZES, rank, step)
        for i, mean in enumerate(gradient_step(ddp, gradients)):
            fed[i] += gradients[i]
            means[i] += mean.double()
    last = state.state_dict()
    state.close()
    return first, fed, means, last


def sums() -> list[Tensor]:
    return [torch.zeros(n, dtype=torch.float64) for n in SIZES]


def owed(sd: StateDict, i: int) -> Tensor:
    return sd["residuals"].get(f"p.{i}", torch.zeros(SIZES[i])).double()


@pytest.mark.parametrize("algorithm", [SparDL(density=0.05), Halves()])
@pytest.mark.parametrize(("old", "new"), [(4, 3), (2, 4), (4, 1)])
def test_what_is_owed_survives_another_world_size(algorithm: Algorithm, old: int, new: int) -> None:
    saved = pool(old).run(owing, algorithm, 4)
    results = pool(new).run(go_on, algorithm, saved, 2)
    for rank, (first, *_) in enumerate(results):
        for i in range(len(SIZES)):
            assert torch.equal(owed(first, i), sum((owed(sd, i) for sd in saved[rank::new]), torch.zeros(SIZES[i])))
        assert first["units"] == saved[0]["units"]
        assert first["step"] == 4
        assert first["shared"].keys() == saved[0]["shared"].keys()
    for i in range(len(SIZES)):
        before = sum(owed(sd, i) for sd in saved) + sum(fed[i] for _, fed, _, _ in results)
        after = new * results[0][2][i] + sum(owed(last, i) for *_, last in results)
        if new == 3:
            torch.testing.assert_close(before, after, rtol=0, atol=1e-4)
        else:
            assert torch.equal(before, after), i


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def early(rank: int, size: int, saved: list[StateDict]) -> tuple[list[str], Any]:
    log, lines = logging.getLogger("sparcomm"), Lines()
    log.addHandler(lines)
    try:
        return lines.lines, go_on(rank, size, Halves(), saved, 3)
    finally:
        log.removeHandler(lines)


@pytest.mark.parametrize("steps", [0, 1])
def test_an_early_checkpoint_loses_nothing_and_says_what_it_lacks(steps: int) -> None:
    saved = pool(2).run(owing, Halves(), steps)
    assert all(sd["units"] is None for sd in saved)
    results = pool(2).run(early, saved)
    for lines, _ in results:
        assert [("not be bit-identical" in line) for line in lines] == [True] * steps
    for i in range(len(SIZES)):
        before = sum(owed(sd, i) for sd in saved) + sum(r[1][i] for _, r in results)
        assert torch.equal(before, 2 * results[0][1][2][i] + sum(owed(r[3], i) for _, r in results))
    assert all(fields["count"] == steps + 3 for _, r in results for fields in r[3]["shared"].values())
    assert all(torch.equal(seen(r[0]), seen(sd)) for (_, r), sd in zip(results, saved, strict=True))


def seen(sd: StateDict) -> Tensor:
    return sd["per_element"].get("seen", {}).get("p.0", torch.zeros(SIZES[0]))


def mid_run(rank: int, size: int) -> None:
    """Loading into a hook at work goes back to what was saved; a state_dict is a copy that later steps leave alone."""
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, Halves(), timeout=TIMEOUT)
    for step in range(3):
        gradient_step(ddp, integers(SIZES, rank, step))
    saved = state.state_dict()
    residual = saved["residuals"]["p.0"].clone()
    first = [gradient_step(ddp, integers(SIZES, rank, step)) for step in range(3, 6)]
    assert torch.equal(saved["residuals"]["p.0"], residual)
    state.load_state_dict(saved)
    assert state.step == 3
    second = [gradient_step(ddp, integers(SIZES, rank, step)) for step in range(3, 6)]
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))
    state.close()


def test_loading_goes_back_to_what_was_saved() -> None:
    pool(2).run(mid_run)


def refused(rank: int, size: int) -> None:
    state = HookState(Dense(), wrap(Fed()), timeout=TIMEOUT)
    state.start()
    own = state.state_dict()
    with pytest.raises(
        CheckpointError, match=f"is rank {1 - rank}'s of 2, but this is rank {rank} of 2: pass the list"
    ):
        state.load_state_dict(own | {"rank": 1 - rank})
    both = [own | {"rank": r} for r in range(2)]
    state.load_state_dict(both)
    for saved, problem in [
        (own | {"version": 99}, "version 99, this release reads version 1"),
        ({k: v for k, v in own.items() if k != "residuals"}, "lacks residuals"),
        ([], "must hold every rank of one run exactly once"),
        (both[:1], "must hold every rank of one run exactly once"),
        ([both[0], both[0]], r"ranks \[0, 0\]"),
        ([both[0], both[1] | {"step": 3}], "mixes steps: rank 0 at 0, rank 1 at 3"),
        ([3], "got a int"),
        (own | {"algorithm": {"name": "spardl", "fields": {}}}, "is of algorithm 'spardl', not 'dense'"),
    ]:
        with pytest.raises(CheckpointError, match=problem):
            state.load_state_dict(saved)
    state.close()


def test_what_is_no_checkpoint_of_this_run_is_refused() -> None:
    pool(2).run(refused)


def test_parameters_that_differ_are_named() -> None:
    def params(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    sd = checkpoint.pack(Dense(), checkpoint.Carried(), {}, params(a=(2,), b=(3, 4), c=(1,)), None, 0, 0, 1)
    checkpoint.check_fits(sd, Dense(), params(c=(1,), a=(2,), b=(3, 4)))
    with pytest.raises(
        CheckpointError, match=r"unknown here: c; missing in it: d; of another shape: b \[3, 4\] instead of \[4, 3\]"
    ):
        checkpoint.check_fits(sd, Dense(), params(a=(2,), b=(4, 3), d=(1,)))


def test_another_setting_of_the_same_algorithm_is_taken_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    weights = {"a": torch.zeros(2)}
    sd = checkpoint.pack(SparDL(density=0.1), checkpoint.Carried(), {}, weights, None, 0, 0, 1)
    checkpoint.check_fits(sd, SparDL(density=0.1), weights)
    assert not caplog.records
    checkpoint.check_fits(sd, SparDL(density=0.2), weights)
    assert "goes on with" in caplog.text


def test_loading_before_there_is_a_process_group_checks_at_once_what_can_be_checked() -> None:
    net = nn.Linear(2, 2)
    state = HookState(Dense(), net)
    params = dict(net.named_parameters())
    state.load_state_dict(checkpoint.pack(Dense(), checkpoint.Carried(), {}, params, None, 0, 0, 1))
    with pytest.raises(CheckpointError, match="unknown here: nobody"):
        state.load_state_dict(
            checkpoint.pack(Dense(), checkpoint.Carried(), {}, params | {"nobody": torch.zeros(1)}, None, 0, 0, 1)
        )
