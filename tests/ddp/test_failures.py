"""Errors reach every rank, soon, with their types, and nothing hangs or is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sparcomm
from sparcomm import Dense, GradientError, HookState, PeerError, RemoteError, SparDL
from sparcomm.algorithms import Algorithm
from sparcomm.ddp.checkpoint import entries
from support.pool import Died, pool, spawn
from support.training import SIZES, Breaking, Fed, gradient_step, integers, wrap

TIMEOUT = 30.0


def no_threads_left() -> bool:
    """Whether all of ours end: one that has just delivered its result may need a moment."""
    for t in [t for t in threading.enumerate() if t.name.startswith("sparcomm")]:
        t.join(5)
    return not [t for t in threading.enumerate() if t.name.startswith("sparcomm")]


def break_in_the_algorithm(rank: int, size: int, find_unused: bool) -> tuple[str, str, float]:
    ddp = wrap(Fed(), find_unused_parameters=find_unused)
    state = sparcomm.attach(ddp, Breaking(rank=1, at=3), timeout=TIMEOUT)
    for step in range(3):
        gradient_step(ddp, integers(SIZES, rank, step))
    state.raise_if_failed()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"sparcomm\.HookError.*ValueError.*no luck on rank 1") as caught:
        gradient_step(ddp, integers(SIZES, rank, 3))
    seconds = time.monotonic() - start
    with pytest.raises(ValueError if rank == 1 else RemoteError, match="no luck on rank 1") as original:
        state.raise_if_failed()
    if rank != 1:
        assert (original.value.rank, original.value.type) == (1, "ValueError")
    assert state.step == 3
    # Dead for good: the next step fails as well, at once.
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"sparcomm\.HookError.*ValueError.*no luck"):
        gradient_step(ddp, integers(SIZES, rank, 4))
    assert time.monotonic() - start < 5
    # What was committed before is still there to be saved.
    assert entries(state.state_dict())[0]["step"] == 3
    state.close()
    assert no_threads_left()
    return type(original.value).__name__, str(caught.value), seconds


@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_an_error_in_the_algorithm_reaches_every_rank(size: int, find_unused: bool) -> None:
    results = pool(size).run(break_in_the_algorithm, find_unused)
    for rank, (name, _, seconds) in enumerate(results):
        assert name == ("ValueError" if rank == 1 else "RemoteError")
        assert seconds < 10  # far below the timeout: waits are woken, not waited out


def after_a_failure(rank: int, size: int) -> None:
    """The same process attaches again and trains."""
    for at in (0, 1):
        ddp = wrap(Fed())
        state = sparcomm.attach(ddp, Breaking(rank=0, at=at), timeout=TIMEOUT)
        for step in range(at):
            gradient_step(ddp, integers(SIZES, rank, step))
        with pytest.raises(RuntimeError, match="no luck"):
            gradient_step(ddp, integers(SIZES, rank, at))
        state.close()
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, Dense(), timeout=TIMEOUT)
    for step in range(2):
        gradient_step(ddp, integers(SIZES, rank, step))
    state.raise_if_failed()
    state.close()
    with pytest.raises(RuntimeError, match="the hook is closed"):
        gradient_step(ddp, integers(SIZES, rank, 2))


def test_a_new_hook_works_after_failures() -> None:
    pool(3).run(after_a_failure)


def run_script(code: str, size: int, path: Path, timeout: float = 60) -> list[subprocess.CompletedProcess[str]]:
    """``code`` as a script of ``size`` processes with a store in ``path``; how each of them ended."""
    prelude = (
        "import sys, torch, torch.distributed as dist, sparcomm\n"
        "from support.training import *\n"
        "torch.set_num_threads(1)\n"
        "rank, size, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]\n"
        "dist.init_process_group('gloo', init_method=f'file://{path}/store', rank=rank, world_size=size)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", prelude + code, str(r), str(size), str(path)],
            env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for r in range(size)
    ]  # fmt: skip
    done = []
    try:
        for p in processes:
            out, err = p.communicate(timeout=timeout)
            done.append(subprocess.CompletedProcess(p.args, p.returncode, out, err))
    finally:
        for p in processes:
            p.kill()
    return done


@pytest.mark.slow
def test_processes_end_cleanly_after_success_and_after_an_error(tmp_path: Path) -> None:
    code = (
        "ddp = wrap(Fed())\n"
        "state = sparcomm.attach(ddp, Breaking(rank=1, at=2), timeout=30)\n"
        "for step in range(2):\n"
        "    gradient_step(ddp, integers(SIZES, rank, step))\n"
        "print('trained', flush=True)\n"
        "if rank == 0: dist.destroy_process_group()\n"  # in either order with our own exit handler
        "if path.endswith('error'): gradient_step(ddp, integers(SIZES, rank, 2))\n"
    )
    for name in ("success", "error"):
        (tmp_path / name).mkdir()
        for process in run_script(
            code.replace("if rank == 0", "if 0" if name == "error" else "if rank == 0"), 2, tmp_path / name
        ):
            assert "trained" in process.stdout
            assert "terminate called" not in process.stderr
            if name == "success":
                assert (process.returncode, process.stderr) == (0, "")
            else:
                assert process.returncode == 1
                assert "sparcomm.HookError" in process.stderr
                assert "no luck on rank 1" in process.stderr


CUT_SHORT = """
import os, time
store = dist.distributed_c10d._get_default_store()
store.set(f"pid {rank}", str(os.getpid()))
state = sparcomm.attach(ddp := wrap(Fed()), sparcomm.Dense(), timeout=40)
for step in range(2):
    gradient_step(ddp, integers(SIZES, rank, step))
if rank == 0:
    ddp.module.p[0].register_hook(lambda g: 1 / 0)  # its bucket is the last: the others have gone to the worker
else:
    other, deadline = int(store.get("pid 0")), time.monotonic() + 20
    while os.path.exists(f"/proc/{other}") and time.monotonic() < deadline:
        time.sleep(0.01)
    print("rank 0 is gone" if time.monotonic() < deadline else "rank 0 still waits", flush=True)
gradient_step(ddp, integers(SIZES, rank, 2))
"""


@pytest.mark.slow
def test_a_process_that_ends_in_the_middle_of_a_step_waits_for_nobody_and_tells_the_others(tmp_path: Path) -> None:
    first, second = run_script(CUT_SHORT, 2, tmp_path)
    assert first.returncode == second.returncode == 1
    assert "ZeroDivisionError" in first.stderr
    assert "rank 0 is gone" in second.stdout
    assert "RemoteError: rank 0 failed first with HookError: the hook was closed while" in second.stderr
    assert "terminate called" not in first.stderr + second.stderr


def stalled(rank: int, size: int) -> tuple[str, float]:
    """Rank 0, which hosts the store, is stopped: no call of the store ever answers, and none has a timeout."""
    pool_store = dist.distributed_c10d._get_default_store()
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pool_store.set("stalled", f"{store.port} {os.getpid()}")
    port, host = map(int, pool_store.get("stalled").split())
    if rank != 0:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, SparDL(density=0.1), timeout=2)
    for step in range(2):
        gradient_step(ddp, integers(SIZES, rank, step))
    dist.barrier()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)  # until the other rank is done
        return "", 0.0
    start = time.monotonic()
    try:
        with pytest.raises(RuntimeError, match=r"sparcomm\.HookError.*PeerError.*waiting for rank 0"):
            gradient_step(ddp, integers(SIZES, rank, 2))
        with pytest.raises(PeerError, match=r"step 2, unit 0.*waiting for rank 0 of 2.*Timed out") as caught:
            state.raise_if_failed()
        return str(caught.value), time.monotonic() - start
    finally:
        os.kill(host, signal.SIGCONT)


@pytest.mark.slow
def test_a_rank_that_stands_still_is_an_error_within_the_timeout_even_if_it_hosts_the_store() -> None:
    _, (_, seconds) = spawn(2, stalled, timeout=50)
    assert seconds < 12  # 2 of the wait, 5 of the store, and some for a busy machine


def killed(rank: int, size: int, algorithm: Algorithm) -> tuple[str, float]:
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, algorithm, timeout=TIMEOUT)
    for step in range(2):
        gradient_step(ddp, integers(SIZES, rank, step))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"sparcomm\.HookError.*(PeerError|RemoteError)"):
        gradient_step(ddp, integers(SIZES, rank, 2))
    with pytest.raises((PeerError, RemoteError)) as caught:
        state.raise_if_failed()
    state.close()
    assert no_threads_left()
    return str(caught.value), time.monotonic() - start


@pytest.mark.slow
def test_a_killed_rank_is_an_error_on_all_others() -> None:
    """Also on those of another team, which never exchange anything with it."""
    results = spawn(4, killed, SparDL(density=0.1, teams=2))
    assert isinstance(results[1], Died)
    for text, seconds in (r for rank, r in enumerate(results) if rank != 1):
        assert "step 2, unit" in text
        assert seconds < 10


def different(rank: int, size: int, algorithms: list[Algorithm]) -> str:
    ddp = wrap(Fed())
    with pytest.raises(sparcomm.ConfigMismatch) as caught:
        sparcomm.attach(ddp, algorithms[rank], timeout=TIMEOUT)
    return str(caught.value)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        (SparDL(density=0.02), r"spardl\.density \(ranks 0, 1: 0\.01; rank 2: 0\.02\)"),
        (SparDL(density=0.01, values="bfloat16"), r"spardl\.values \(ranks 0, 1: 'float32'; rank 2: 'bfloat16'\)"),
        (Dense(), r"algorithm \(ranks 0, 1: spardl; rank 2: dense\)"),
    ],
)
def test_different_configurations_are_named_on_every_rank(others: Algorithm, expected: str) -> None:
    import re

    for text in pool(3).run(different, [SparDL(density=0.01), SparDL(density=0.01), others]):
        assert re.search(expected, text), text


def different_by_hand(rank: int, size: int) -> None:
    ddp = wrap(Fed())
    state = HookState(SparDL(density=0.01 * (1 + rank)), timeout=TIMEOUT)
    ddp.register_comm_hook(state, sparcomm.hook)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"sparcomm\.HookError.*ConfigMismatch.*density"):
            gradient_step(ddp, integers(SIZES, rank, 0))
    with pytest.raises(sparcomm.ConfigMismatch, match="density"):
        state.raise_if_failed()


def test_a_mismatch_found_at_the_first_bucket_surfaces_in_backward() -> None:
    pool(2).run(different_by_hand)


def late(rank: int, size: int) -> None:
    ddp = wrap(Fed())
    if rank == 0:
        with pytest.raises(PeerError, match=r"rank 1 did not come within 0\.3 s.*attach the same hooks"):
            sparcomm.attach(ddp, Dense(), timeout=0.3)
    dist.barrier()
    if rank == 1:  # who comes too late hears of it
        with pytest.raises(RemoteError, match=r"rank 0 failed first with PeerError.*rank 1 did not come"):
            sparcomm.attach(ddp, Dense(), timeout=0.3)


def test_a_rank_that_attaches_too_late_is_named() -> None:
    pool(2).run(late)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.ones(4, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.p.abs() * x).sum()


def wrong_gradient(rank: int, size: int) -> tuple[str, str]:
    ddp = wrap(Complex())
    state = sparcomm.attach(ddp, Dense(), timeout=TIMEOUT)
    with pytest.raises(RuntimeError, match=r"sparcomm\.HookError.*GradientError") as caught:
        ddp(torch.ones(4)).backward()
    with pytest.raises((GradientError, RemoteError), match="gradient has") as original:
        state.raise_if_failed()
    state.close()
    return str(caught.value), str(original.value)


def test_a_gradient_that_cannot_be_compressed_says_what_to_do() -> None:
    for in_backward, original in pool(2).run(wrong_gradient):
        assert "view_as_complex" in in_backward
        assert "view_as_complex" in original


def no_bucket(rank: int, size: int) -> None:
    state = HookState(Dense(), small := wrap(Fed()), timeout=TIMEOUT)
    with pytest.raises(sparcomm.ConfigError, match=r"tuple instead of a GradBucket.*optimize_ddp = True"):
        sparcomm.hook(state, (torch.zeros(1), next(iter(small.parameters()))))  # type: ignore[arg-type]
    with pytest.raises(sparcomm.ConfigError, match="NoneType, must be a HookState"):
        sparcomm.hook(None, None)  # type: ignore[arg-type]


def test_calls_that_are_not_ddps_are_refused() -> None:
    pool(1).run(no_bucket)


def steps_apart(rank: int, size: int) -> str:
    ddp = wrap(Fed())
    state = sparcomm.attach(ddp, Dense(), timeout=TIMEOUT)
    saved: dict[int, Any] = {}
    for step in range(4):
        gradient_step(ddp, integers(SIZES, rank, step))
        saved[step + 1] = state.state_dict()
    state.close()
    again = wrap(Fed())
    state = sparcomm.attach(again, Dense(), timeout=TIMEOUT)
    state.load_state_dict(saved[4 if rank == 1 else 3])
    with pytest.raises(RuntimeError, match="CheckpointError"):
        gradient_step(again, integers(SIZES, rank, 4))
    with pytest.raises(sparcomm.CheckpointError) as caught:
        state.raise_if_failed()
    state.close()
    return str(caught.value)


def units_apart(rank: int, size: int) -> str:
    """Checkpoints of one step and of runs whose buckets differed: without a comparison, Gloo aborts the process."""
    saved = []
    for cap in (0.001, 0.003):
        state = sparcomm.attach(net := wrap(Fed(), bucket_cap_mb=cap), SparDL(density=0.1), timeout=TIMEOUT)
        for step in range(2):
            gradient_step(net, integers(SIZES, rank, step))
        saved.append(state.state_dict())
        state.close()
    assert entries(saved[0])[0]["units"] != entries(saved[1])[0]["units"]
    state = sparcomm.attach(net := wrap(Fed()), SparDL(density=0.1), timeout=TIMEOUT)
    state.load_state_dict(saved[rank])
    with pytest.raises(RuntimeError, match="CheckpointError"):
        gradient_step(net, integers(SIZES, rank, 2))
    with pytest.raises(sparcomm.CheckpointError) as caught:
        state.raise_if_failed()
    state.close()
    return str(caught.value)


def test_ranks_with_units_of_different_runs_are_told() -> None:
    for text in pool(2).run(units_apart):
        assert "cut the gradient differently: units (rank 0: " in text


def test_ranks_at_different_steps_are_told_which_checkpoint_to_load() -> None:
    for text in pool(3).run(steps_apart):
        assert "step (ranks 0, 2: 3; rank 1: 4)" in text
        assert "of step 3 or earlier" in text
