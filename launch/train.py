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
from jobs.group import first_to_say, joined
from jobs.progress import display
from jobs.settings import Settings, load
from sparcomm.errors import CheckpointError, ConfigError, SparcommError


def main(argv: list[str] | None = None, make: type[Engine] = Engine) -> int:
    """Runs one rank. Returns the exit code: 2 for settings or a checkpoint that do not fit, 1 for a failed run."""
    parser = argparse.ArgumentParser(description="Train with sparcomm.", epilog="see configs/ for ready-made runs")
    parser.add_argument("--config", type=Path, required=True, help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example algorithm.density=0.02")
    arguments = parser.parse_intermixed_args(argv)
    try:
        train(load(arguments.config, arguments.overrides), arguments.config.stem, make)
    except (ConfigError, CheckpointError) as error:
        return failed(str(error), 2)
    except SparcommError as error:
        return failed(f"rank {os.environ.get('RANK', '0')}: {type(error).__name__}: {error}", 1)
    return 0


def failed(text: str, code: int) -> int:
    """Prints why the run ends, on one of the ranks only, and returns ``code``."""
    if first_to_say():
        print(f"error: {text}", file=sys.stderr, flush=True)
    return code


def train(settings: Settings, name: str, make: type[Engine]) -> None:
    """One rank's part of a run, from joining the others to the report."""
    # The same as use_deterministic_algorithms(True), which takes a second to import torch's compiler for nothing.
    torch.set_deterministic_debug_mode("error")
    make_folder(Path(settings.output))
    with joined(settings.timeout) as group:
        engine = make(settings, group)
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


def make_folder(path: Path) -> None:
    """Makes the folder for the results: that it cannot be is better known before the run than after it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output={str(path)!r} cannot be made ({error}): choose another folder") from error


if __name__ == "__main__":
    sys.exit(main())
