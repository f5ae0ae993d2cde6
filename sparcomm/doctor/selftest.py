"""Does it work here? Kernels against their specification, and two ranks over every way that this machine has."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist

from sparcomm.algorithms import registry
from sparcomm.config import algorithm_from_config
from sparcomm.doctor.facts import find_program, without_launcher
from sparcomm.doctor.step import reduce
from sparcomm.kernels import Kernels, chosen, gpu, kernels_for, reference
from sparcomm.launch.variables import of_ranks
from sparcomm.transport import sim

RANKS, PATIENCE = 2, 150.0
SETTINGS: dict[str, dict[str, Any]] = {"hierarchical": {"local_size": 2}}  # elsewhere the launcher says it


@dataclass(frozen=True)
class Check:
    """One self-test.

    Attributes:
        passed: None = it was not possible here, and ``text`` says why.
    """

    name: str
    passed: bool | None
    seconds: float
    text: str


class Skipped(Exception):
    """Why a test cannot be done here."""


def self_tests() -> Iterator[Check]:
    """Runs them one after the other."""
    for device in [torch.device("cpu"), *_gpus()]:
        yield _checked(f"kernels on {device} against the reference", lambda device=device: kernels(device))
    for name, way in (("Gloo", "gloo"), ("NCCL", "nccl")):
        yield _checked(f"SparDL on {RANKS} ranks over {name}", lambda way=way: loopback(way))
    yield _checked(f"SparDL on {RANKS} ranks over MPI (mpirun -n {RANKS})", under_mpirun)


def _gpus() -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cuda", number) for number in range(count)]


def _checked(name: str, test: Callable[[], str]) -> Check:
    begin = time.perf_counter()
    passed: bool | None
    try:
        passed, text = True, test()
    except Skipped as reason:
        passed, text = None, str(reason)
    except Exception as error:  # noqa: BLE001  # a report says what failed, whatever it was
        passed, text = False, f"{type(error).__name__}: {error}"
    return Check(name, passed, time.perf_counter() - begin, text)


def kernels(device: torch.device) -> str:
    """Runs every algorithm on four simulated ranks, with this device's kernels and with the reference's."""
    if device.type == "cuda" and not gpu.runs_on(device):
        raise Skipped("there are none: CuPy is missing or does not work, so plain torch is used")
    kernels_for(torch.empty(0, device=device))
    for name in registry():
        results = [_simulated(name, device, 4)]
        with _reference(device):
            results.append(_simulated(name, device, 4))
        if results[0] != results[1]:
            raise AssertionError(f"{name} gives other bits than with the reference")
    return f"the same bits with {', '.join(registry())}"


def _simulated(name: str, device: torch.device, size: int) -> list[str]:
    algorithm = algorithm_from_config({"name": name, **SETTINGS.get(name, {})})
    return sim.run(size, lambda t: reduce(algorithm, t, device)).results


@contextmanager
def _reference(device: torch.device) -> Iterator[None]:
    before, chosen[device] = chosen[device], cast(Kernels, reference)
    try:
        yield
    finally:
        chosen[device] = before


def loopback(way: str) -> str:
    """Starts the ranks as a launcher would, over a store that this process keeps."""
    if way == "nccl" and len(_gpus()) < RANKS:
        raise Skipped(f"needs {RANKS} GPUs, there are {len(_gpus())}")
    if way == "gloo" and not dist.is_gloo_available():
        raise Skipped("this torch is built without Gloo")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
    command = [sys.executable, "-m", "sparcomm.doctor.step", way]
    return _compared([(command, environ) for environ in of_ranks(RANKS, store.port, without_launcher())])


def under_mpirun() -> str:
    """The same with the mpirun that is found here."""
    mpirun = find_program("mpirun") or find_program("mpiexec")
    if mpirun is None:
        raise Skipped("there is no mpirun")
    try:
        import sparcomm.transport.mpi.library  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise Skipped(str(error)) from error
    environ = {
        **without_launcher(),
        # Two ranks also on one core (Open MPI 5 and 4 have names of their own), and in a container, where all is root.
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    command = [mpirun, "-n", str(RANKS), sys.executable, "-m", "sparcomm.doctor.step", "mpi"]
    return _compared([(command, environ)])


def _compared(commands: list[tuple[list[str], dict[str, str]]]) -> str:
    """Runs them to their end; all ranks must print what the simulator gives."""
    started = [
        subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for command, environ in commands
    ]
    printed, deadline = "", time.monotonic() + PATIENCE
    try:
        for process in started:
            out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            if process.returncode:
                raise AssertionError(f"exit code {process.returncode}: {_gist(err)}")
            printed += out
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"not finished after {PATIENCE:g} s") from error
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    ranks = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    if sorted(found["rank"] for found in ranks) != list(range(RANKS)):
        raise AssertionError(f"expected a line from each of {RANKS} ranks, got: {printed.strip() or 'nothing'}")
    if {found["sha256"] for found in ranks} != set(_simulated("spardl", torch.device("cpu"), RANKS)):
        raise AssertionError("the sums differ from those of the simulator")
    return f"launcher {ranks[0]['launcher']}: the same bits on all ranks as in the simulator"


def _gist(text: str) -> str:
    """The line of a traceback that says what happened, or else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    return next((line for line in lines if re.search(r"(Error|error|Mismatch): ", line)), lines[-1])
