"""What every test gets: one thread per process, one Hypothesis profile, and a stack dump from whatever hangs."""

from __future__ import annotations

import faulthandler
import os
import signal

# Before torch or numba is imported anywhere: pytest-xdist already uses every core.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import pytest

# A machine with a GPU may have torch, CuPy, Numba and pytest only: tests/gpu and what it imports need no more, and
# Hypothesis, pytest-xdist and pytest-timeout may be missing here.
try:
    from hypothesis import HealthCheck, settings
except ImportError:
    pass
else:
    settings.register_profile(
        "sparcomm",
        deadline=None,  # the first example of a kernel includes its compilation
        max_examples=25,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settings.register_profile("thorough", parent=settings.get_profile("sparcomm"), max_examples=1000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "sparcomm"))


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """What pyproject.toml sets for plugins that are missing is known all the same, and means nothing."""
    if not pluginmanager.hasplugin("xdist"):
        parser.addoption("--dist")
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "of one test, in seconds")
        parser.addini("timeout_method", "how it is ended")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are cores: many tests wait, for other processes and for time limits."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + 1


def pytest_configure(config: pytest.Config) -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Compiles the kernels before any test's clock runs: in a fresh clone that takes most of a minute of CPU.

    Whoever comes second waits for it. Left to the tests, several processes would compile variants of one kernel at the
    same time, too, and Numba's disk cache is not made for that. Meanwhile another worker compiles the CUDA text for
    the emulator, if it is going to run.
    """
    if not session.items or session.config.option.collectonly:
        return
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") != "gw0" and any("text" in _parameters(i) for i in session.items):
        from support import emulator

        emulator.build()
    from sparcomm.kernels import warm_up

    warm_up()


def _parameters(item: pytest.Item) -> list[str]:
    """Those of an item's parameters that are words."""
    parameters: dict[str, object] = getattr(getattr(item, "callspec", None), "params", {})
    return [value for value in parameters.values() if isinstance(value, str)]


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests that have a GPU as a parameter; skips GPU tests where there is none, and nothing else."""
    for item in items:
        if not {"gpu", "reference-gpu"}.isdisjoint(_parameters(item)):
            item.add_marker(pytest.mark.gpu)
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
