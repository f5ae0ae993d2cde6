#!/usr/bin/env python3
"""Trains with Ray Train, one worker per rank, and sparcomm in DDP's hook.

    pip install 'ray[train]'
    launch/ray_train.py --workers 2 [--gpu] [--address auto] [--density 0.01] [--steps 50] [--storage FOLDER]

Without ``--address`` Ray starts on this machine and ends with the job; ``--address auto`` uses the cluster that the
machine belongs to (``ray start``), whose nodes need sparcomm installed. Ray starts the process group; ``init()`` finds
it and says what it found. The last line is what rank 0 reported, as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Ray reads these when it is imported: no usage reports, and the training API without its deprecated half.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")


def train_loop(settings: dict[str, Any]) -> None:
    """One rank: a small classifier on data that a fixed linear teacher has labelled."""
    import torch
    from ray import train
    from ray.train.torch import prepare_model
    from torch import nn

    import sparcomm
    from sparcomm.launch import init

    logging.basicConfig(level=logging.INFO)
    here = init()
    made = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 10, generator=made)
    torch.manual_seed(0)
    model = prepare_model(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).to(here.device))
    state = sparcomm.attach(model, sparcomm.SparDL(density=settings["density"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    losses: list[float] = []
    own = torch.Generator().manual_seed(1 + here.rank)
    for _ in range(settings["steps"]):
        x = torch.randn(32, 64, generator=own)
        loss = nn.functional.cross_entropy(model(x.to(here.device)), (x @ teacher).argmax(-1).to(here.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    found: list[Any] = [None] * here.size
    torch.distributed.all_gather_object(found, digest.hexdigest())
    outcome = {
        "launcher": here.launcher,
        "ranks": here.size,
        "backend": here.backend,
        "first_loss": losses[0],
        "last_loss": sum(losses[-5:]) / 5,
        "identical": len(set(found)) == 1,
    }
    # Ray puts what the ranks bring into one folder, so every rank's residual is kept: see docs/checkpoints.md.
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state.state_dict(), Path(folder) / f"hook-rank{here.rank}.pt")
        if here.rank == 0:
            torch.save(model.state_dict(), Path(folder) / "model.pt")
        train.report(outcome, checkpoint=train.Checkpoint.from_directory(folder))
    state.close()


def main(argv: list[str] | None = None) -> int:
    """Starts the workers and prints what they reported. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Train with Ray Train and sparcomm.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("--address", help="of a Ray cluster; auto = the one this machine belongs to")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--storage", type=Path, help="where Ray keeps results; on a cluster a folder that all nodes see"
    )
    chosen = parser.parse_args(argv)
    try:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        print(f"error: Ray is missing ({error}): pip install 'ray[train]'", file=sys.stderr)
        return 2
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    runtime = {"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}}
    cores = {} if chosen.address else {"num_cpus": max(chosen.workers + 1, os.cpu_count() or 1)}
    ray.init(chosen.address, runtime_env=runtime, include_dashboard=False, **cores)
    with tempfile.TemporaryDirectory() as temporary:
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={"density": chosen.density, "steps": chosen.steps},
            scaling_config=ScalingConfig(num_workers=chosen.workers, use_gpu=chosen.gpu),
            torch_config=TorchConfig(backend="nccl" if chosen.gpu else "gloo"),
            run_config=RunConfig(name="sparcomm", storage_path=str(chosen.storage or temporary)),
        )
        result = trainer.fit()
        kept = sorted(p.name for p in Path(result.checkpoint.path).iterdir()) if result.checkpoint else []
        print(json.dumps({**(result.metrics or {}), "checkpoint": kept}), flush=True)
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
