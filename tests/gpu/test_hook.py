"""The hook on a GPU: one rank on NCCL, whose host never waits, and ranks on Gloo that share the GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support.devices import ALGORITHMS, Fedback, amp, failing, fed, net, no_sync, overlap, pinned, traced
from support.pool import pool

pytestmark = pytest.mark.gpu
LIMIT = 110.0  # seconds for a job: the first one in a process loads and compiles kernels


def run(size: int, job: Any, *args: Any) -> list[Any]:
    return pool(size).run(job, *args, timeout=LIMIT)


def same(a: list[Fedback], b: list[Fedback]) -> None:
    """All ranks delivered and owe the same, bit for bit, but for the signs of zeros."""
    for x, y in zip(a, b, strict=True):
        for step, (mine, other) in enumerate(zip(x.means, y.means, strict=True)):
            assert all(torch.equal(m, o) for m, o in zip(mine, other, strict=True)), f"means differ in step {step}"
        assert all(torch.equal(m, o) for m, o in zip(x.debts, y.debts, strict=True)), "debts differ"
        assert x.stats == y.stats


def test_a_wait_is_found() -> None:
    device = torch.device("cuda", 0)
    x = torch.ones(3, device=device)
    with no_sync(device):
        x[1].fill_(5)
        y = x + 1
        for waits in (lambda: float(y.sum()), lambda: y[y > 0], lambda: torch.tensor([1.0], device=device)):
            with pytest.raises(RuntimeError, match="synchroniz"):
                waits()
    assert float(y.sum()) == 10


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_rank_on_nccl_never_waits_and_gives_what_the_cpu_gives(name: str) -> None:
    there, here = run(1, fed, "cuda", "nccl", name), run(1, fed, "cpu", "gloo", name)
    same(there, here)
    assert there[0].stats["skipped"] == 0
    if ALGORITHMS[name].conserves:
        assert there[0].lost == 0


@pytest.mark.parametrize("name", ["spardl", "topk"])
@pytest.mark.parametrize(("size", "backend"), [(1, "nccl"), (2, "gloo")])
def test_momentum_is_masked_where_something_was_sent(size: int, backend: str, name: str) -> None:
    same(run(size, fed, "cuda", backend, name, 7, 0.5), run(size, fed, "cpu", "gloo", name, 7, 0.5))


@pytest.mark.parametrize("name", ["spardl", "topk", "vote, error feedback"])
def test_a_network_learns_alike_on_nccl_and_on_the_cpu(name: str) -> None:
    (there,), (here,) = run(1, net, "cuda", "nccl", name), run(1, net, "cpu", "gloo", name)
    assert there.losses[-1] < there.losses[0]
    # Other sums round otherwise, and then other entries may be chosen: owed to one side, not lost.
    assert there.losses == pytest.approx(here.losses, rel=0.1)
    assert torch.dist(there.weights, here.weights) < 0.1 * here.weights.norm()


@pytest.mark.parametrize(
    ("size", "name"), [*((2, name) for name in ALGORITHMS), (3, "spardl"), (3, "topk"), (3, "vote, error feedback")]
)
def test_ranks_on_gloo_that_share_the_gpu_give_what_they_give_on_the_cpu(size: int, name: str) -> None:
    there, here = run(size, fed, "cuda", "gloo", name), run(size, fed, "cpu", "gloo", name)
    same(there, here)
    if ALGORITHMS[name].conserves:
        assert there[0].lost == 0 if size == 2 else there[0].lost < 1e-4


@pytest.mark.parametrize(("size", "backend"), [(1, "nccl"), (2, "gloo")])
def test_residuals_in_page_locked_memory_are_the_same(size: int, backend: str) -> None:
    there, here = run(size, pinned, "cuda", backend), run(size, pinned, "cpu", "gloo")
    for (left, places, locked), (want, _, _) in zip(there, here, strict=True):
        assert places == {"cpu"}
        assert locked == {True}
        assert all(torch.equal(a, b) for a, b in zip(left, want, strict=True))
        assert any(a.any() for a in left)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize(("size", "backend"), [(1, "nccl"), (2, "gloo")])
def test_autocast_and_a_loss_scale(size: int, backend: str, kind: str) -> None:
    for trained in run(size, amp, "cuda", backend, kind):
        assert trained.scale == 256
        assert trained.losses[-1] < trained.losses[0]


@pytest.mark.parametrize(("size", "backend"), [(1, "nccl"), (2, "gloo")])
def test_an_overflow_leaves_no_trace(size: int, backend: str) -> None:
    for trained in run(size, amp, "cuda", backend, "float16", 5):
        assert trained.scale == 128


def test_a_rank_that_fails_is_an_error_on_all() -> None:
    said = run(3, failing, "cuda")
    assert all("no luck on rank 1" in text for _, text, _ in said)
    assert [(step, kind) for step, _, kind in said] == [(3, "RemoteError"), (3, "ValueError"), (3, "RemoteError")]


def test_a_profile_shows_the_phases_on_a_stream_beside_the_backward_pass(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    run(1, traced, "nccl", str(path))
    seen = overlap(json.loads(path.read_text())["traceEvents"])
    # With one rank nothing is exchanged, but the own block is selected, coded, gathered and settled.
    phases = ("select", "code", "compensate", "encode", "decode", "settle", "mean", "commit")
    assert {f"sparcomm::{phase}" for phase in phases} <= seen.ranges
    assert seen.busy > 0
    assert seen.beside > 0.1 * seen.busy, "nothing runs beside the backward pass"
