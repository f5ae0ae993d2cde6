"""Tests run where neither Hypothesis nor pytest's plugins are installed, on plain random examples."""

from __future__ import annotations

import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import gpu_tests
import pytest

from support import plain_hypothesis as plain

ROOT = Path(__file__).resolve().parents[2]
st = plain.strategies

INSIDE = """
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

seen = []

@pytest.mark.parametrize("base", [10])
@given(values=st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True), other=st.data())
@settings(max_examples=40)
def test_examples(base, tmp_path, values, other):
    assert len(set(values)) == len(values) <= 4
    assert 0 <= other.draw(st.sampled_from(values)) <= 9 < base
    seen.append(values)

def test_that_there_were_some():
    assert len(seen) == 40
    assert len({tuple(values) for values in seen}) > 10

@given(st.integers(0, 1 << 20))
def test_that_fails(number):
    assert number < 100
"""
NEEDS = "import pydantic\n"
BROKEN = "import nothing_of_that_name\n"
RUN = """
import importlib.machinery as machinery, sys, pytest
find = machinery.PathFinder.find_spec
class Without:  # an object, since pytest stores what is here in a class
    def __call__(self, name, *rest):
        missing = name.partition(".")[0] in ("hypothesis", "_hypothesis_pytestplugin", "pydantic", "xdist")
        return None if missing else find(name, *rest)
machinery.PathFinder.find_spec = Without()
sys.exit(pytest.main(["-c", "pytest.ini", "-p", "no:cacheprovider", "-ra", "-p", "support.borrowed", *sys.argv[1:]]))
"""


def run(tmp_path: Path, **files: str) -> tuple[int, str]:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    command = [sys.executable, "-c", RUN, *(f"{name}.py" for name in files)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout + done.stderr


def test_properties_are_tried_and_failures_shown(tmp_path: Path) -> None:
    code, said = run(tmp_path, test_inside=INSIDE, test_needs=NEEDS)
    assert code == 1, said
    assert "hypothesis is not installed: plain random examples instead" in said
    assert "1 failed, 2 passed, 1 skipped" in said
    assert "falsified by {'number': " in said
    assert "test_needs.py:0: pydantic is not installed" in said


def test_what_is_broken_stays_an_error(tmp_path: Path) -> None:
    code, said = run(tmp_path, test_broken=BROKEN)
    assert code == 2, said
    assert "nothing_of_that_name" in said


COUNTED = """
import pytest

@pytest.mark.parametrize("number", range(40))
def test_passes(number):
    pass

@pytest.mark.skip(reason="for the mark")
def test_other():
    pass
"""


def test_shards_share_all_tests(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "test_counted.py").write_text(COUNTED)
    (tmp_path / "test_one.py").write_text("def test_one(): pass\n")
    (tmp_path / "test_wrong.py").write_text("def test_wrong(): assert False\n")

    def passed(*names: str, marked: str = "not gpu") -> tuple[int, list[int]]:
        code = gpu_tests.run(tmp_path / "out", 2, marked, [str(tmp_path / f"test_{name}.py") for name in names])
        said = capfd.readouterr().out
        assert said.count("-- shard ") == 2
        return code, [int(number) for number in re.findall(r"(\d+) passed", said)]

    code, counts = passed("counted")
    assert code == 0
    assert sum(counts) == 40
    assert len(counts) == 2
    assert passed("one") == (0, [1]), "the other has nothing to do"
    assert passed("one", marked="gpu") == (1, []), "nobody has"
    assert passed("counted", "wrong") == (1, counts)


def test_gpu_tests_are_found() -> None:
    found = gpu_tests.paths()
    assert "tests/kernels" in found
    assert all((ROOT / path).exists() for path in found)
    assert not any(path.startswith(("tests/kernels/", "tests/gpu/")) for path in found), "none is run twice"


def draws(strategy: plain.Strategy, count: int = 300) -> list[object]:
    r = random.Random(0)
    return [strategy.draw(r) for _ in range(count)]


def test_strategies_keep_their_bounds_and_reach_them() -> None:
    whole = draws(st.integers(-3, 70))
    assert min(whole) == -3
    assert max(whole) == 70
    assert 0 in whole
    halves = draws(st.floats(-1, 2, width=16))
    assert (min(halves), max(halves)) == (-1, 2)
    every = draws(st.floats(width=32))
    assert any(math.isnan(x) for x in every)
    assert any(math.isinf(x) for x in every)
    assert all(math.isfinite(x) for x in draws(st.floats(allow_nan=False, allow_infinity=False)))
    assert {len(x) for x in draws(st.lists(st.none(), min_size=2, max_size=5))} == {2, 3, 4, 5}
    assert all(1 <= len(x) <= 3 for x in draws(st.sets(st.integers(0, 2), min_size=1, max_size=3)))
    assert set(draws(st.integers(0, 5).filter(lambda x: x % 2).map(str) | st.just("x"))) == {"1", "3", "5", "x"}


def test_what_cannot_be_drawn_is_an_error() -> None:
    for impossible in (
        st.integers(0, 9).filter(lambda x: x > 9),
        st.lists(st.booleans(), min_size=3, max_size=3, unique=True),
    ):
        with pytest.raises(ValueError, match=r"none of|only 2 different"):
            draws(impossible)
    with pytest.raises(ValueError, match="no integer"):
        st.integers(2, 1)
