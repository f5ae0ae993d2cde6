"""PyTorch's own distributed tests, those that ship in its wheel, on the backend mpi4py.

    python tests/support/torch_suite.py                     # all of them, on 4 ranks; minutes
    python tests/support/torch_suite.py -n 3 -k all_reduce  # those whose names contain a text
    python tests/support/torch_suite.py --table --unlock    # what did not pass, by reason, as Markdown

PyTorch starts processes of its own for each test. MPI's ranks are started by mpirun, so the tests run one after the
other in those, as PyTorch runs them for its own MPI backend; each gets a new default group. A test passes if it passes
on all ranks, and is skipped if it is skipped on all. A test that ends or hangs a rank has failed, and the rest goes on
in new processes.

Many tests name the backends that they are for, and are skipped under any other name. PyTorch's lists of what a backend
can do (``DistTestCases``) are told that this one takes part. ``--unlock`` also runs the tests that are skipped because
of the backend's name, or because they fail, or did, in PyTorch's own runs, except for those that are for NCCL alone. It
tells them, in case they ask, that the backend is "mpi", PyTorch's own.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import os
import re
import sys
import tempfile
import time
import traceback
import unittest
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.mpi import mpirun  # noqa: E402

LONGEST = 150  # seconds that one test may take
LIMIT = 20  # seconds that an operation may take
STARTS = {"test_barrier_timeout_global"}  # makes a default group itself, by the name it is told
Outcome = tuple[str, str]  # passed, skipped or failed, and why


# ---- one rank -----------------------------------------------------------------------------------------------------


def suite(folder: str) -> Any:
    """PyTorch's test class, made to run in this process."""
    os.environ.update(BACKEND="mpi4py", TEMP_DIR=folder)
    from torch.testing._internal.common_distributed import DistTestCases

    for feature in ("ddp", "subgroup", "plugin"):
        DistTestCases.backend_feature[feature].add("mpi4py")
    # unittest's own mark replaces the test; one like PyTorch's leaves it to be run all the same.
    before, unittest.skip, unittest.case.skip = unittest.skip, _mark, _mark
    from torch.testing._internal.distributed import distributed_test

    unittest.skip = unittest.case.skip = before

    # Tests of sub-groups are skipped on few ranks, though not under PyTorch's own MPI backend; that is read here.
    os.environ["BACKEND"] = "mpi"

    class Suite(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):
        """Without processes of its own."""

        def setUp(self) -> None:
            pass

        def tearDown(self) -> None:
            pass

    return distributed_test, Suite


def _mark(why: str) -> Callable[[Any], Any]:
    def mark(test: Any) -> Any:
        test.__unittest_skip__, test.__unittest_skip_why__ = True, why
        return test

    return mark


def named(why: str) -> bool:
    """Whether a test is skipped because of the backend's name alone, or is one that fails, or did, for others.

    Those that are for NCCL alone need GPUs.
    """
    words = set(re.findall("[a-z0-9]+", why.lower()))
    return bool(words & {"gloo", "mpi"}) or ("nccl" not in words and bool(words & {"backend", "github"}))


def run_one(module: Any, kind: Any, name: str, file: str, unlock: bool) -> Outcome:
    """One test on this rank, as PyTorch's own processes run it."""
    method, why = getattr(kind, name), ""
    if getattr(method, "__unittest_skip__", False):
        why = method.__unittest_skip_why__
        if not (unlock and named(why)):
            return "skipped", why
    module.BACKEND = "mpi" if why and name not in STARTS else "mpi4py"
    import torch.distributed as dist
    from torch.testing._internal.common_distributed import TEST_SKIPS
    from torch.testing._internal.common_utils import set_rng_seed

    set_rng_seed(1234)
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "OFF"  # some tests set it, and leave it
    dist.set_debug_level_from_env()
    test = kind(name)
    test.rank, test.file_name = int(os.environ["RANK"]), file
    skips = {skip.exit_code: skip.message for skip in TEST_SKIPS.values()}
    limit = timedelta(seconds=min(LIMIT, module.CUSTOM_PG_TIMEOUT.get(name, LIMIT)))
    try:
        size = int(test.world_size)
        dist.init_process_group("mpi4py", init_method=test.init_method, world_size=size, rank=test.rank, timeout=limit)
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(test, name)()
        return "passed", why
    except unittest.SkipTest as skip:
        return "skipped", str(skip)
    except SystemExit as end:
        if end.code in skips:
            return "skipped", skips[end.code]
        return ("passed", "") if not end.code else ("failed", f"exit status {end.code}")
    except BaseException:  # noqa: BLE001  a test may raise anything
        return "failed", traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank(names: list[str], results: Path, unlock: bool) -> None:
    """All the tests on this rank; rank 0 writes down what became of each."""
    import torch

    import sparcomm.mpi_backend  # noqa: F401
    from sparcomm.transport.mpi.world import world

    torch.set_num_threads(1)
    comm = world().Dup()
    folder = comm.bcast(tempfile.mkdtemp() if comm.Get_rank() == 0 else None)
    if comm.Get_rank() == 0:
        (Path(folder) / "barrier").mkdir()
        (Path(folder) / "test_dir").mkdir()
    comm.Barrier()
    module, kind = suite(folder)
    for number, name in enumerate(names):
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        if comm.Get_rank() == 0:
            _write(results, {"started": name})
            for path in (Path(folder) / "barrier").iterdir():
                path.unlink()
        module.Barrier.barrier_id = 0
        comm.Barrier()
        start = time.monotonic()
        outcomes = comm.gather(run_one(module, kind, name, str(Path(folder) / f"store{number}"), unlock))
        if comm.Get_rank() == 0:
            _write(results, {"test": name, "seconds": time.monotonic() - start, "outcomes": outcomes})
    faulthandler.cancel_dump_traceback_later()


def _write(results: Path, line: dict[str, Any]) -> None:
    with results.open("a") as out:
        out.write(json.dumps(line) + "\n")


# ---- all of them --------------------------------------------------------------------------------------------------


def listed(pattern: str) -> list[str]:
    """Names of PyTorch's tests that contain the text."""
    os.environ.setdefault("WORLD_SIZE", "4")
    _, kind = suite(tempfile.mkdtemp())
    return [name for name in unittest.TestLoader().getTestCaseNames(kind) if pattern in name]


def verdict(outcomes: list[Outcome]) -> Outcome:
    """One for all ranks."""
    kinds = {kind for kind, _ in outcomes}
    why = next((why for kind, why in outcomes if kind == "failed"), outcomes[0][1])
    return ("failed" if "failed" in kinds else "skipped" if kinds == {"skipped"} else "passed"), why


def run(size: int, names: list[str], results: Path, unlock: bool = False) -> dict[str, Outcome]:
    """Runs the tests under mpirun, again and again until all are through."""
    found: dict[str, Outcome] = {}
    while rest := [name for name in names if name not in found]:
        results.unlink(missing_ok=True)
        done = mpirun(
            size, __file__, "--rank", results, *(["--unlock"] * unlock), *rest, timeout=LONGEST * len(rest),
            WORLD_SIZE=str(size),
        )  # fmt: skip
        lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        found |= {line["test"]: verdict(line["outcomes"]) for line in lines if "test" in line}
        if not lines or (stuck := lines[-1].get("started")) is None:
            if done.code and not lines:
                raise RuntimeError(done.output[-4000:])
            continue
        found[stuck] = "failed", f"a rank ended or hung: {done.output[-1500:]}"
    return found


def table(found: dict[str, Outcome]) -> Iterator[str]:
    """What did not pass, by reason, as Markdown."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, (kind, why) in sorted(found.items()):
        if kind != "passed":
            reasons.setdefault((kind, (why.strip().splitlines() or [""])[-1]), []).append(name.removeprefix("test_"))
    yield "| what | tests | why | which (without `test_`) |\n|---|---|---|---|\n"
    for (kind, why), names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        yield f"| {kind} | {len(names)} | {why} | {', '.join(names)} |\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=4, help="ranks")
    parser.add_argument("-k", default="", help="only tests whose names contain it")
    parser.add_argument("--unlock", action="store_true", help="run what is skipped because of the backend's name, too")
    parser.add_argument("--table", action="store_true", help="print what did not pass, by reason, as Markdown")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help="tests")
    given = parser.parse_args()
    if given.rank:
        rank(given.names, given.rank, given.unlock)
        return
    names = given.names or listed(given.k)
    with tempfile.TemporaryDirectory() as folder:
        found = run(given.n, names, Path(folder) / "results", given.unlock)
    if given.table:
        sys.stdout.writelines(table(found))
    for name, (kind, why) in () if given.table else sorted(found.items(), key=lambda item: (item[1][0], item[0])):
        sys.stdout.write(f"{kind:8}{name}\n" + (f"        {why}\n" if kind != "passed" else ""))
    named_ones = sum(kind == "passed" and bool(why) for kind, why in found.values())
    sys.stdout.write(f"{named_ones} of those that passed are skipped unless --unlock is given\n")
    sys.stdout.write(f"{dict(Counter(kind for kind, _ in found.values()))} of {len(found)} on {given.n} ranks\n")


if __name__ == "__main__":
    main()
