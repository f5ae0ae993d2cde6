"""A pytest plugin for machines that have PyTorch, CuPy, Numba and pytest alone: ``pytest -p support.borrowed``.

Where Hypothesis is missing, plain random examples take its place. Test files that need anything else that is missing
are skipped with its name, instead of failing to be collected. SHARD=i/n in the environment runs the i-th of n parts.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import zlib
from collections.abc import Generator

import pytest

SKIPPED = ("matplotlib", "mpi4py", "pydantic", "rich", "sklearn", "tensorboard", "typer", "yaml")
PLAIN = importlib.util.find_spec("hypothesis") is None

if PLAIN:
    from support import plain_hypothesis

    sys.modules["hypothesis"] = plain_hypothesis
    sys.modules["hypothesis.strategies"] = plain_hypothesis.strategies


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.failed:
        # The report holds the traceback as text, and no exception.
        missing = re.search(rf"ModuleNotFoundError: No module named '({'|'.join(SKIPPED)})\b", str(report.longrepr))
        if missing:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: {missing[1]} is not installed")
    return report


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests of this process' part, told by their names alone."""
    part, _, parts = os.environ.get("SHARD", "0/1").partition("/")
    kept = [item for item in items if zlib.crc32(item.nodeid.encode()) % int(parts) == int(part)]
    left = set(items) - set(kept)
    config.hook.pytest_deselected(items=list(left))
    items[:] = kept


def pytest_report_header() -> str:
    """Says what stands in for what."""
    return "hypothesis is not installed: plain random examples instead" if PLAIN else "hypothesis is installed"
