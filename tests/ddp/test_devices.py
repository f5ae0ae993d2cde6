"""The jobs of tests/gpu on the CPU: what they check holds here too, and they run where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sparcomm
from sparcomm import SparDL
from sparcomm.kernels import chosen
from sparcomm.kernels.cuda.launch import launchers
from support import emulator
from support.devices import ALGORITHMS, Fedback, amp, conform, failing, fed, net, overlap, pinned
from support.pool import pool
from support.training import SIZES, Fed, integers, wrap

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("name", ALGORITHMS)
def test_fed_conserves(name: str) -> None:
    for size in (1, 2):
        for run in pool(size).run(fed, "cpu", "gloo", name):
            assert run.stats["steps"] == len(run.means)
            assert run.stats["skipped"] == 0
            if ALGORITHMS[name].conserves:
                assert run.lost == 0


class Counting(emulator.Emulator):
    """Knows whether it was ever asked."""

    launched = 0

    def launch(self, *what: Any) -> None:
        self.launched += 1
        super().launch(*what)


def emulated(rank: int, size: int, name: str) -> Fedback:
    """As ``fed``, with the GPU's kernels on tensors of the CPU."""
    from sparcomm.kernels import cuda

    counting = Counting()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chosen, torch.device("cpu"), cuda)
        patch.setitem(launchers, "cpu", counting)
        run = fed(rank, size, "cpu", "gloo", name)
    assert counting.launched
    return run


@pytest.mark.skipif(not emulator.available(), reason="no C++ compiler")
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "dense"])
def test_the_gpu_text_gives_a_whole_run_the_same_bits(name: str) -> None:
    for size in (1, 2):
        pairs = zip(pool(size).run(emulated, name), pool(size).run(fed, "cpu", "gloo", name), strict=True)
        for there, here in pairs:
            means = zip(
                [m for step in there.means for m in step], [m for step in here.means for m in step], strict=True
            )
            assert all(torch.equal(a, b) for a, b in [*means, *zip(there.debts, here.debts, strict=True)])


def test_fed_with_momentum() -> None:
    for run in pool(2).run(fed, "cpu", "gloo", "spardl", 4, 0.5):
        assert run.stats["skipped"] == 0
        assert run.lost > 0  # momentum adds to what came in


def test_pinned_residuals_are_ordinary_ones_on_the_cpu() -> None:
    for left, places, _ in pool(2).run(pinned, "cpu", "gloo"):
        assert places == {"cpu"}
        assert any(d.any() for d in left)


def test_net_learns() -> None:
    for run in pool(2).run(net, "cpu", "gloo", "spardl"):
        assert run.losses[-1] < run.losses[0]


@pytest.mark.parametrize("overflow", [None, 5])
def test_amp(overflow: int | None) -> None:
    for run in pool(2).run(amp, "cpu", "gloo", "bfloat16", overflow):
        assert run.scale == (256.0 if overflow is None else 128.0)
        assert run.losses[-1] < run.losses[0]


def test_failing_is_an_error_on_all() -> None:
    said = pool(3).run(failing, "cpu")
    assert all("no luck on rank 1" in text for _, text, _ in said)
    assert [(step, kind) for step, _, kind in said] == [(3, "RemoteError"), (3, "ValueError"), (3, "RemoteError")]


def test_conformance() -> None:
    pool(2).run(conform, "cpu")


def elsewhere(rank: int, size: int) -> dict[str, object]:
    """Steps where PyTorch makes tensors on another device unless told otherwise."""
    ddp, given = wrap(Fed()), [integers(SIZES, rank, step) for step in range(4)]
    torch.set_default_device("meta")
    try:
        state = sparcomm.attach(ddp, SparDL(0.05), timeout=30, check=sparcomm.Check(every=1), memory=MEMORY)
        for gradients in given:
            ddp.zero_grad()
            ddp(gradients).backward()
            state.clip_grad_norm_(1e6)
        state.load_state_dict(state.state_dict())
        state.flush()
        state.close()
        return state.stats()
    finally:
        torch.set_default_device(None)


MEMORY = sparcomm.MomentumCorrection(0.9)


def test_a_default_device_elsewhere_changes_nothing() -> None:
    for stats in pool(2).run(elsewhere):
        assert stats["steps"] == 4


def test_a_trace_is_read() -> None:
    def event(cat: str, name: str, stream: int, ts: float, dur: float) -> dict[str, object]:
        return {"cat": cat, "name": name, "pid": 0, "tid": stream, "ts": ts, "dur": dur}

    events = [
        event("gpu_user_annotation", "sparcomm::unit 0 spardl", 20, 0, 30),
        event("gpu_user_annotation", "sparcomm::select", 20, 0, 30),
        event("gpu_user_annotation", "Optimizer", 7, 0, 30),
        event("kernel", "select", 20, 0, 10),
        event("kernel", "merge", 20, 20, 10),
        event("kernel", "gemm", 7, 5, 10),
        event("kernel", "gemm", 8, 8, 4),
        event("kernel", "gemm", 7, 25, 100),
        {"name": "process_name", "ph": "M", "pid": 0},
    ]
    assert overlap(events) == (20.0, 10.0, {"sparcomm::unit 0 spardl", "sparcomm::select"})


def test_gpu_tests_need_no_plugin_and_nothing_beyond_torch_numba_and_pytest(tmp_path: Path) -> None:
    for name in ("hypothesis", "pydantic", "typer", "rich", "yaml", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not here')")
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/gpu"]
    command += [f"-p no:{plugin}" for plugin in ("xdist", "timeout", "hypothesispytest")]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
