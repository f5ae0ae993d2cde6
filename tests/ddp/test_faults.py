"""Every kind of fault, at moments drawn from a fixed seed; and what is broken on purpose is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparcomm.bench.faults_plan import KINDS, STEPS, draw
from sparcomm.bench.faults_world import compare

ROOT = Path(__file__).resolve().parents[2]


def run(*options: str) -> tuple[int, dict[str, Any], str]:
    """(exit status, rows by kind, what else was said)."""
    command = [sys.executable, "-m", "sparcomm", "bench", "faults", "--json", *options]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, {row["kind"]: row for row in rows}, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_every_kind_of_fault_is_known_to_all_in_time_and_leaves_nothing_wrong() -> None:
    status, rows, said = run(
        "--ranks", "3", "--count", str(len(KINDS)), "--seed", "3", "--at-once", "2", "--slack", "20"
    )
    assert status == 0, said
    assert list(rows) == [*KINDS, "all"], said
    total = rows["all"]
    assert total["injections"] == total["in_time"] == len(KINDS)
    assert total["hangs"] == total["wrong"] == total["unclean"] == 0
    assert rows["hook"]["survivors"] == rows["differ"]["survivors"] == 3
    assert rows["differ"]["named"] == 3
    # On a machine that is short of cores an innocent rank may answer too late to be told from a dead one.
    assert total["named"] >= 0.5 * total["survivors"], said


@pytest.mark.slow
@pytest.mark.timeout(320)
def test_a_hook_that_is_broken_on_purpose_is_found_out() -> None:
    status, rows, said = run(
        "--ranks", "2", "--count", "1", "--seed", "20", "--kinds", "stall", "--flaw", "patient", "--slack", "2"
    )
    assert status == 1, said
    assert rows["all"]["hangs"] == 1, said


def test_plans_are_drawn_from_the_seed_and_reach_every_kind_and_point() -> None:
    plans = draw(700, 1, list(KINDS), 4, 3.0)
    assert plans == draw(700, 1, list(KINDS), 4, 3.0)
    assert plans != draw(700, 2, list(KINDS), 4, 3.0)
    assert {p.kind: {q.point for q in plans if q.kind == p.kind} for p in plans} == {
        kind: set(points) for kind, points in KINDS.items()
    }
    assert {p.victim for p in plans} == {0, 1, 2, 3}
    assert {p.rank_hosts for p in plans} == {p.caught for p in plans} == {False, True}
    assert max(p.step for p in plans) < STEPS


UNDISTURBED = {"params": ["a", "b", "c", "d"], "owed": ["x", "y", "z"]}


@pytest.mark.parametrize(
    ("seen", "found"),
    [
        ({"params": ["a", "b"], "last": "b", "committed": 1, "owes": "y"}, []),
        ({"params": ["a", "b"], "last": "b", "committed": 2, "owes": "z"}, []),  # committed, and failed after that
        ({"params": ["a", "b"], "last": "b", "committed": -1}, []),  # never started
        ({"params": []}, []),
        ({"params": ["a", "B"]}, ["weights after 1 steps are not those"]),
        ({"params": ["a", "b"], "last": "c"}, ["weights changed in the step that failed"]),
        ({"params": ["a", "b"], "committed": 1, "owes": "x"}, ["what it owes after 1 steps is not"]),
        ({"params": ["a", "b"], "committed": 0, "owes": "x"}, ["says 0 steps are committed, but has trained 1"]),
    ],
)
def test_bits_are_compared_with_those_of_an_undisturbed_run(seen: dict[str, Any], found: list[str]) -> None:
    got = compare({"rank": 2} | seen, UNDISTURBED)
    assert len(got) == len(found)
    for line, expected in zip(got, found, strict=True):
        assert line.startswith(f"rank 2: {expected}")


def test_bad_options_are_refused_at_once() -> None:
    status, _, said = run("--ranks", "1")
    assert status == 2
    assert "--ranks of at least 2" in said
