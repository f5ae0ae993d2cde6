"""A pytest plugin for machines that have PyTorch, CuPy, Numba and pytest alone: ``pytest -p support.borrowed``.

Where Hypothesis is missing, plain random examples take its place. Test files that need anything else that is missing
are skipped with its name, instead of failing to be collected.
"""

from __future__ import annotations

import importlib.util
import re
import sys
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


def pytest_report_header() -> str:
    """Says what stands in for what."""
    return "hypothesis is not installed: plain random examples instead" if PLAIN else "hypothesis is installed"
