#!/usr/bin/env python3
"""The main job: data-parallel training whose gradients travel by sparcomm.

    torchrun --standalone --nproc-per-node 4 launch/train.py --config configs/digits-spardl.yaml [key=value ...]

Results go to the folder ``output`` of the configuration (``runs/<name of the file>`` unless it says otherwise).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# cuBLAS reads it when it is loaded; without it CUDA has no deterministic matrix product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from jobs import report
from jobs.engine import Engine
from jobs.group import joined
from jobs.progress import display
from jobs.settings import Settings, load
from sparcomm.errors import ConfigError, SparcommError


def main(argv: list[str] | None = None) -> int:
    """Runs one rank. Returns the process's exit code: 2 for a wrong setting, 1 for a failed run."""
    parser = argparse.ArgumentParser(description="Train with sparcomm.", epilog="see configs/ for ready-made runs")
    parser.add_argument("--config", type=Path, required=True, help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example algorithm.density=0.02")
    arguments = parser.parse_intermixed_args(argv)
    first = os.environ.get("RANK", "0") == "0"
    try:
        settings = load(arguments.config, arguments.overrides)
    except ConfigError as error:
        if first:
            print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        train(settings, arguments.config.stem)
    except SparcommError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error: rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def train(settings: Settings, name: str) -> None:
    """One rank's part of a run, from joining the others to the report."""
    torch.use_deterministic_algorithms(True)
    with joined(settings.timeout) as group:
        engine = Engine(settings, group)
        try:
            events = Path(settings.output) / "tensorboard" if settings.tensorboard else None
            with display(group.rank, name, events) as shown:
                metrics = engine.run(shown)
        finally:
            engine.gradients.close()
    if group.rank == 0:
        report.write(Path(settings.output), metrics)
        report.show(name, [metrics["summary"]])
        print(f"written to {settings.output}: {report.METRICS}, {report.PLOT}")


if __name__ == "__main__":
    sys.exit(main())
