"""What a real profile of real steps shows."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import sparcomm
from sparcomm import SparDL
from support.pool import pool
from support.training import SIZES, Fed, gradient_step, integers, wrap

EXPERIMENTAL = torch._C._profiler._ExperimentalConfig
ALL_THREADS = "profile_all_threads" in (EXPERIMENTAL.__init__.__doc__ or "")
PHASES = ("select", "code", "wire", "commit", "check", "wait")
STAGES = ("compensate", "encode", "exchange", "decode", "merge", "all_gather", "settle", "mean")


def profiled(rank: int, size: int, everything: bool) -> tuple[dict[str, int], int]:
    """How often each range was seen in steps 3 and 4, of which step 4 is looked at, and the number of units."""
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, SparDL(density=0.05), timeout=30, check=sparcomm.Check(every=4))
    for step in range(3):
        gradient_step(ddp, integers(SIZES, rank, step))
    kwargs: dict[str, Any] = {"experimental_config": EXPERIMENTAL(profile_all_threads=True)} if everything else {}
    with profile(activities=[ProfilerActivity.CPU], **kwargs) as seen:
        for step in (3, 4):
            gradient_step(ddp, integers(SIZES, rank, step))
        units = len(state.stats()["per_unit"])
    state.close()
    return {e.key: e.count for e in seen.key_averages() if e.key.startswith("sparcomm")}, units


@pytest.mark.skipif(not ALL_THREADS, reason="this torch has no profile_all_threads")
def test_a_profile_of_all_threads_names_steps_units_and_phases() -> None:
    for seen, units in pool(2).run(profiled, True):
        assert all(name.startswith("sparcomm::") for name in seen)
        for step in (3, 4):
            assert seen[f"sparcomm::step {step}"] == units + 1  # a job for each unit, and the commit
        for unit in range(units):
            assert seen[f"sparcomm::unit {unit} spardl"] == 2
        assert seen["sparcomm::commit"] == 2
        assert seen["sparcomm::check"] == 2  # before and after the unit that is looked at
        assert {f"sparcomm::{phase}" for phase in PHASES} <= set(seen)
        kinds = {re.sub(r"\d+", "N", name.removeprefix("sparcomm::")) for name in seen}
        assert kinds <= {"step N", "unit N spardl", "bucket N", *PHASES, *STAGES, "all_to_all", "all_reduce"}
        assert set(STAGES) <= kinds


def test_an_ordinary_profile_shows_the_thread_that_calls_backward() -> None:
    for seen, units in pool(2).run(profiled, False):
        assert units > 1
        assert {name.removeprefix("sparcomm::").split()[0] for name in seen} == {"bucket", "wait"}
        assert seen["sparcomm::bucket 0"] == 2
