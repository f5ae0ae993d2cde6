"""Jobs whose optimizer communicates itself: they learn, count their bytes, and resume bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from jobs.engine import Engine
from jobs.group import Group
from jobs.progress import Display
from jobs.settings import validate
from support.pool import pool

OPTIMIZERS = {
    "signum": {"name": "signum", "lr": 2e-3},
    "onebit_adam": {"name": "onebit_adam", "lr": 2e-3, "warmup": 3},
}
CARRIERS = {"signum": "majority-vote", "onebit_adam": "onebit"}


def job(rank: int, size: int, kind: str, output: str) -> dict[str, Any]:
    data = {
        "task": {"name": "digits", "width": 8, "blocks": 1, "dropout": 0.1}, "optimizer": OPTIMIZERS[kind],
        "algorithm": {"name": CARRIERS[kind]}, "batch": 32, "steps": 8, "checkpoint": {"every": 4}, "output": output,
    }  # fmt: skip
    engine = Engine(validate(data, "test"), Group(rank, size, torch.device("cpu")))
    try:
        return engine.run(Display(None, None))
    finally:
        dist.barrier()
        engine.gradients.close()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_job_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    whole = pool(2).run(job, kind, str(tmp_path))
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000008")
    resumed = pool(2).run(job, kind, str(tmp_path))
    for metrics in (*whole, *resumed):
        assert metrics["summary"]["identical"]
        assert metrics["summary"]["sha256"] == whole[0]["summary"]["sha256"]
        # A second start compares settings once more: 16 numbers of 8 bytes.
        assert 0 <= metrics["summary"]["bytes_sent"] - whole[0]["summary"]["bytes_sent"] <= 128 * 2
        assert metrics["summary"]["ratio"] > (2 if kind == "onebit_adam" else 15)
        assert set(metrics["summary"]["phases"]) == {"code", "wire"}
        assert metrics["summary"]["steps"] == 8
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000008")
    fewer = pool(1).run(job, kind, str(tmp_path))
    assert fewer[0]["summary"]["steps"] == 8
