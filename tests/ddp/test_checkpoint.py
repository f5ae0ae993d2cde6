"""Saving and resuming: bit for bit at the same world size, without loss at another."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import sparcomm
from sparcomm import (
    CheckpointError,
    Dense,
    Hierarchical,
    HookState,
    MajorityVote,
    OneBitAllReduce,
    S2Reducer,
    SparDL,
    TopKAllGather,
)
from sparcomm.algorithms import Algorithm
from sparcomm.ddp import checkpoint
from sparcomm.ddp.checkpoint import Entry, StateDict
from sparcomm.ddp.distcp import load_distributed
from support.pool import pool
from support.training import SIZES, Fed, Halves, gradient_step, integers, net_step, small_net, wrap

TIMEOUT = 30.0


def only(sd: StateDict) -> Entry:
    """What is in the state_dict of one rank."""
    (entry,) = checkpoint.entries(sd)
    return entry


def trained(
    rank: int, size: int, algorithm: Algorithm, upto: int, resume: Path | None, save_at: int | None, folder: Path,
    way: str, options: dict[str, Any],
) -> tuple[list[Tensor], Entry]:  # fmt: skip
    """Trains to step ``upto``, from the files of ``resume`` on if given; saves after step ``save_at``."""
    ddp = wrap(small_net())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.0 if "memory" in options else 0.9)
    state = sparcomm.attach(ddp, algorithm, timeout=TIMEOUT, **options)
    start = 0
    if resume is not None:
        saved = torch.load(resume / f"{rank}.pt", weights_only=True)
        ddp.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if way == "dcp":
            dcp.load({"hook": state}, checkpoint_id=resume / "dcp")
        else:
            state.load_state_dict(saved["hook"])
        start = saved["step"]
        assert state.step == start
    for step in range(start, upto):
        net_step(ddp, optimizer, rank, step)
        if step + 1 == save_at:
            saved = {"model": ddp.module.state_dict(), "optimizer": optimizer.state_dict(), "step": state.step}
            torch.save(saved | {"hook": state.state_dict()}, folder / f"{rank}.pt")
            if way == "dcp":
                dcp.save({"hook": state}, checkpoint_id=folder / "dcp")
    last = only(state.state_dict())
    state.close()
    return [p.detach() for p in ddp.parameters()], last


PLAIN = SparDL(density=0.05)
NODES = Hierarchical(outer=PLAIN, local_size=2)
SIGNUM = MajorityVote(mask=True, scale=True, error_feedback=True, momentum=0.9)
NESTED = Hierarchical(Halves(), SparDL(density=0.1), groups=((0, 3), (2, 1)))


@pytest.mark.parametrize(
    ("algorithm", "save_at", "way", "options"),
    [
        (PLAIN, 2, "torch", {}),
        (SparDL(density=0.1, values="bfloat16", schedule="direct"), 5, "torch", {}),
        (PLAIN, 5, "dcp", {}),
        (PLAIN, 5, "torch", {"storage": "bfloat16"}),
        (PLAIN, 2, "dcp", {"storage": "bfloat16", "memory": sparcomm.MomentumCorrection(0.9)}),
        (PLAIN, 5, "torch", {"memory": sparcomm.MomentumCorrection(0.9, nesterov=True), "skip": "biases"}),
        (NODES, 2, "dcp", {"memory": sparcomm.MomentumCorrection(0.9)}),
        (NESTED, 3, "torch", {}),
        (SparDL(density=0.1, teams=4, sag="b-sag", values="int8"), 5, "torch", {}),
        (SparDL(density=0.1, teams="auto", values="int8", rounding="stochastic"), 3, "dcp", {}),
        (TopKAllGather(density=0.05, selector="gaussiank(reestimate_every=4)", indices="rice"), 6, "dcp", {}),
        (S2Reducer(0.1, "peel", granularity=4), 5, "torch", {}),
        (S2Reducer(0.05, "projection"), 3, "dcp", {}),
        (SIGNUM, 4, "torch", {}),
        (OneBitAllReduce(), 3, "dcp", {"memory": sparcomm.MomentumCorrection(0.9)}),
    ],
)
def test_a_resumed_run_is_bit_identical(
    algorithm: Algorithm, save_at: int, way: str, options: dict[str, Any], tmp_path: Path
) -> None:
    whole = pool(4).run(trained, algorithm, 8, None, save_at, tmp_path, way, options)
    resumed = pool(4).run(trained, algorithm, 8, tmp_path, None, tmp_path, way, options)
    for (weights, state), (again, state_again) in zip(whole, resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
        assert equal(state, state_again)
        assert state["step"] == 8
        assert len(state["units"]) > 2
        narrow = options.get("storage") == "bfloat16"
        assert {t.dtype for t in state["residuals"].values()} == {torch.bfloat16 if narrow else torch.float32}
        assert bool(state["velocity"]) == ("memory" in options)
        if algorithm == SIGNUM:
            moments = state["per_element"]["momentum"]
            assert moments.keys() == state["parameters"].keys()
            assert all(moment.any() for moment in moments.values())
        if algorithm == NESTED:  # what an algorithm within an algorithm remembers
            assert state["per_element"].keys() == {"inner.seen"}
            assert {int(fields["inner.count"]) for fields in state["shared"].values()} == {8}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b


def owing(
    rank: int, size: int, algorithm: Algorithm, steps: int, options: dict[str, Any], folder: Path | None = None
) -> StateDict:
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, algorithm, timeout=TIMEOUT, **options)
    for step in range(steps):
        gradient_step(ddp, integers(SIZES, rank, step))
    sd = state.state_dict()
    if folder is not None:
        dcp.save({"app": {"hook": sd}}, checkpoint_id=folder)
    state.close()
    return sd


def go_on(
    rank: int, size: int, algorithm: Algorithm, saved: list[StateDict] | Path, steps: int, options: dict[str, Any]
) -> tuple[Any, ...]:
    """What a run that starts from ``saved`` owes at first, what it is fed and delivers, what it owes at last."""
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, algorithm, timeout=TIMEOUT, **options)
    state.load_state_dict(load_distributed(saved, "app.hook") if isinstance(saved, Path) else saved)
    first = only(state.state_dict())
    start = first["step"]
    fed, means = sums(), sums()
    for step in range(start, start + steps):
        gradients = integers(SIZES, rank, step)
        for i, mean in enumerate(gradient_step(ddp, gradients)):
            fed[i] += gradients[i]
            means[i] += mean.double()
    last = only(state.state_dict())
    state.close()
    return first, fed, means, last


def sums() -> list[Tensor]:
    return [torch.zeros(n, dtype=torch.float64) for n in SIZES]


def owed(entry: Entry, i: int, what: str = "residuals") -> Tensor:
    return entry[what].get(f"p.{i}", torch.zeros(SIZES[i])).double()


@pytest.mark.parametrize("way", ["list", "dcp"])
@pytest.mark.parametrize("algorithm", [SparDL(density=0.05), Halves()])
@pytest.mark.parametrize(("old", "new"), [(4, 3), (3, 4), (4, 1)])
def test_what_is_owed_survives_another_world_size(
    algorithm: Algorithm, old: int, new: int, way: str, tmp_path: Path
) -> None:
    if way == "dcp" and algorithm == Halves() and new == 1:
        pytest.skip("covered by the other sizes")
    saved = pool(old).run(owing, algorithm, 4, {}, tmp_path if way == "dcp" else None)
    results = pool(new).run(go_on, algorithm, tmp_path if way == "dcp" else saved, 2, {})
    parts = [only(sd) for sd in saved]
    for rank, (first, *_) in enumerate(results):
        for i in range(len(SIZES)):
            assert torch.equal(owed(first, i), sum((owed(part, i) for part in parts[rank::new]), sums()[i]))
        assert first["units"] == parts[0]["units"]
        assert first["step"] == 4
        assert first["shared"].keys() == parts[0]["shared"].keys()
    for i in range(len(SIZES)):
        before = sum(owed(part, i) for part in parts) + sum(fed[i] for _, fed, _, _ in results)
        after = new * results[0][2][i] + sum(owed(last, i) for *_, last in results)
        if new == 3:
            torch.testing.assert_close(before, after, rtol=0, atol=1e-4)
        else:
            assert torch.equal(before, after), i


@pytest.mark.parametrize("new", [2, 4])
def test_what_nodes_owe_survives_another_number_of_them(new: int) -> None:
    saved = pool(4).run(owing, NODES, 4, {})
    results = pool(new).run(go_on, NODES, saved, 2, {})
    parts = [only(sd) for sd in saved]
    for i in range(len(SIZES)):
        held = sum(owed(part, i) for part in parts)
        assert torch.equal(sum((owed(first, i) for first, *_ in results), sums()[i]), held)
        after = new * results[0][2][i] + sum(owed(last, i) for *_, last in results)
        assert torch.equal(held + sum(fed[i] for _, fed, _, _ in results), after), i


@pytest.mark.parametrize(("old", "new"), [(4, 3), (2, 4)])
def test_velocity_and_narrow_residuals_are_summed_exactly(old: int, new: int) -> None:
    options = {"storage": "bfloat16", "memory": sparcomm.MomentumCorrection(0.5)}
    saved = pool(old).run(owing, PLAIN, 4, options)
    results = pool(new).run(go_on, PLAIN, saved, 1, options)
    parts = [only(sd) for sd in saved]
    for what in ("residuals", "velocity"):
        assert any(owed(part, 3, what).any() for part in parts)
        for i in range(len(SIZES)):
            for rank, (first, *_) in enumerate(results):
                assert torch.equal(owed(first, i, what), sum((owed(p, i, what) for p in parts[rank::new]), sums()[i]))


def skipping(rank: int, size: int, saved: list[StateDict]) -> tuple[list[list[str]], list[Tensor], Entry]:
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, Halves(), skip="p.[03]", timeout=TIMEOUT)
    state.load_state_dict(saved)
    means = gradient_step(ddp, integers(SIZES, rank, 4))
    last = only(state.state_dict())
    state.close()
    return last["units"], means, last


def test_parameters_that_are_skipped_from_now_on_deliver_what_they_owe() -> None:
    saved = pool(2).run(owing, Halves(), 4, {})
    results = pool(2).run(skipping, saved)
    for i in range(len(SIZES)):
        fed = sum(integers(SIZES, rank, 4)[i].double() for rank in range(2))
        before = fed + sum(owed(only(sd), i) for sd in saved)
        after = 2 * results[0][1][i].double() + sum(owed(last, i) for *_, last in results)
        assert torch.equal(before, after), i
        assert any(owed(last, i).any() for *_, last in results) == (i not in (0, 3))
    skipped = {"p.0", "p.3"}
    assert all(set(unit) <= skipped or not set(unit) & skipped for unit in results[0][0])


def deciding(rank: int, size: int, saved: list[StateDict] | None, steps: int) -> tuple[Any, StateDict]:
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, SparDL(density=0.5), auto_off=True, timeout=TIMEOUT)
    if saved is not None:
        state.load_state_dict(saved[rank])
    for step in range(steps):
        gradient_step(ddp, integers(SIZES, rank, step))
    verdict, sd = state.stats()["auto_off"], state.state_dict()
    state.close()
    return verdict, sd


def test_what_was_decided_stays_decided() -> None:
    (undecided, early_sd), _ = pool(2).run(deciding, None, 4)
    assert undecided is None
    assert only(early_sd)["decisions"] == {}
    results = pool(2).run(deciding, None, 20)
    verdicts = {verdict for verdict, _ in results}
    assert len(verdicts) == 1
    assert verdicts <= {"dense", "sparse"}
    again = pool(2).run(deciding, [sd for _, sd in results], 1)
    assert [verdict for verdict, _ in again] == [verdict for verdict, _ in results]
    assert all(equal(only(a)["decisions"], only(b)["decisions"]) for (_, a), (_, b) in zip(results, again, strict=True))
    turned = [changed(sd, decisions={"auto_off": "sparse", "flushed": False}) for _, sd in results]
    assert {verdict for verdict, _ in pool(2).run(deciding, turned, 1)} == {"sparse"}


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
        return lines.lines, go_on(rank, size, Halves(), saved, 3, {})
    finally:
        log.removeHandler(lines)


@pytest.mark.parametrize("steps", [0, 1])
def test_an_early_checkpoint_loses_nothing_and_says_what_it_lacks(steps: int) -> None:
    saved = pool(2).run(owing, Halves(), steps, {})
    parts = [only(sd) for sd in saved]
    assert all(part["units"] is None for part in parts)
    results = pool(2).run(early, saved)
    for lines, _ in results:
        assert [("not be bit-identical" in line) for line in lines] == [True] * steps
    for i in range(len(SIZES)):
        before = sum(owed(part, i) for part in parts) + sum(r[1][i] for _, r in results)
        assert torch.equal(before, 2 * results[0][1][2][i] + sum(owed(r[3], i) for _, r in results))
    assert all(fields["count"] == steps + 3 for _, r in results for fields in r[3]["shared"].values())
    assert all(torch.equal(seen(r[0]), seen(part)) for (_, r), part in zip(results, parts, strict=True))


def seen(entry: Entry) -> Tensor:
    return entry["per_element"].get("seen", {}).get("p.0", torch.zeros(SIZES[0]))


def mid_run(rank: int, size: int) -> None:
    """Loading into a hook at work goes back to what was saved; a state_dict is a copy that later steps leave alone."""
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, Halves(), timeout=TIMEOUT)
    for step in range(3):
        gradient_step(ddp, integers(SIZES, rank, step))
    saved = state.state_dict()
    residual = only(saved)["residuals"]["p.0"].clone()
    first = [gradient_step(ddp, integers(SIZES, rank, step)) for step in range(3, 6)]
    assert torch.equal(only(saved)["residuals"]["p.0"], residual)
    state.load_state_dict(saved)
    assert state.step == 3
    second = [gradient_step(ddp, integers(SIZES, rank, step)) for step in range(3, 6)]
    assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))
    state.close()


def test_loading_goes_back_to_what_was_saved() -> None:
    pool(2).run(mid_run)


def changed(sd: StateDict, **facts: Any) -> StateDict:
    """The state_dict with other facts about it, as if another rank or run had written it."""
    ((_, parts),) = sd.items()
    about = parts["about"][0] | facts
    return {checkpoint.label(about["rank"], about["world_size"]): {**parts, "about": (about,)}}


def refused(rank: int, size: int) -> None:
    state = HookState(Dense(), wrap(Fed()), timeout=TIMEOUT)
    state.start()
    own = state.state_dict()
    (key,) = own
    with pytest.raises(
        CheckpointError, match=f"is rank {1 - rank}'s of 2, but this is rank {rank} of 2: pass the list"
    ):
        state.load_state_dict(changed(own, rank=1 - rank))
    both = [changed(own, rank=r) for r in range(2)]
    state.load_state_dict(both)
    state.load_state_dict(both[0] | both[1])
    without = {key: {part: value for part, value in own[key].items() if part == "about"}}
    for saved, problem in [
        (changed(own, version=99), "version 99, this release reads version 2"),
        ({"version": 1, "step": 3}, "version 1, this release reads version 2"),
        ({key: own[key] | {"owed": ({"residuals": {}},)}}, f"of {key} lacks per_element, velocity"),
        ({key: own[key] | {"owed": {"residuals": {}}}}, "'owed' must be a tuple of one dictionary"),
        ({"hook": own}, "'hook' is no key of a HookState's state_dict, such as 'rank 0 of 4'"),
        ({}, "is empty"),
        ([], "list of state_dicts is empty: it must hold every rank of one run exactly once"),
        ([both[1 - rank]], f"is rank {1 - rank}'s of 2"),
        ([both[0], both[0]], "holds rank 0 of 2 more than once and lacks rank 1 of 2: it must hold every rank"),
        ([changed(own, rank=0, world_size=3), changed(own, rank=2, world_size=3)], "the list lacks rank 1 of 3: "),
        ([both[0], changed(own, rank=1, world_size=3)], r"mixes world sizes \[2, 3\]"),
        ([both[0], changed(own, rank=1, step=3)], "mixes steps: rank 0 at 0, rank 1 at 3"),
        ([both[0], changed(own, rank=1, units=[["p.0"]])], "grouped differently: rank 0: none yet, rank 1: 1 units"),
        ([without, changed(own, rank=1 - rank)], f"what rank {rank} of 2 owes was left out"),
        ([3], "got a int"),
        (changed(own, algorithm={"name": "spardl", "fields": {}}), "is of algorithm 'spardl', not 'dense'"),
    ]:
        with pytest.raises(CheckpointError, match=problem):
            state.load_state_dict(saved)
    state.close()


def test_what_is_no_checkpoint_of_this_run_is_refused() -> None:
    pool(2).run(refused)


def torn(rank: int, size: int, folder: Path) -> None:
    """A distributed checkpoint is read in part only where it fits, and the error says what there is."""
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, PLAIN, timeout=TIMEOUT)
    gradient_step(ddp, integers(SIZES, rank, 0))
    halves = [dist.new_group([r]) for r in range(size)]
    alone = {"group": {checkpoint.label(0, 1, rank): next(iter(state.state_dict().values()))}}
    dcp.save({"hook": state} | alone, checkpoint_id=folder)
    read = load_distributed(folder)
    assert [next(iter(sd)) for sd in read] == ["rank 0 of 2", "rank 1 of 2"]
    assert ["owed" in next(iter(sd.values())) for sd in read] == [r == rank for r in range(2)]
    assert [next(iter(sd)) for sd in load_distributed(folder, "group", process_group=halves[rank])] == [
        checkpoint.label(0, 1, rank)
    ]
    for arguments, problem in [
        ((folder, "other"), "no HookState under 'other', only under 'group', 'hook'"),
        ((folder / "nowhere",), "cannot be read"),
    ]:
        with pytest.raises(CheckpointError, match=problem):
            load_distributed(*arguments)
    with pytest.raises(CheckpointError, match="no state of a group from global rank 1 under 'hook', only rank 0 of 2,"):
        load_distributed(folder, first=1)
    state.close()


def test_a_distributed_checkpoint_is_read_only_as_far_as_needed(tmp_path: Path) -> None:
    pool(2).run(torn, tmp_path)


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
