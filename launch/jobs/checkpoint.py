"""Checkpoints that are either whole or ignored.

A checkpoint is a folder: ``model.pt`` from rank 0, ``rank-i.pt`` from every rank (its residuals belong to it alone),
and ``complete``, written after a barrier when all of them are on the disk. Each file appears by a rename. A job killed
at any moment therefore leaves the previous checkpoint usable. Files are read with ``weights_only=True``: tensors and
plain Python values, no code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparcomm.errors import CheckpointError

MARKER = "complete"


def save(
    folder: Path,
    step: int,
    model: dict[str, Any],
    own: dict[str, Any],
    rank: int,
    size: int,
    barrier: Callable[[], Any],
) -> None:
    """Writes the checkpoint of ``step``; collective. ``model`` matters on rank 0 only, ``own`` on every rank."""
    here = folder / f"step-{step:08d}"
    here.mkdir(parents=True, exist_ok=True)
    _write(here / f"rank-{rank}.pt", own)
    if rank == 0:
        _write(here / "model.pt", model)
    barrier()
    if rank == 0:
        _rename_into(here / MARKER, json.dumps({"step": step, "size": size}).encode())


def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None."""
    found = complete(folder)
    return found[-1] if found else None


def complete(folder: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    return sorted(marker.parent for marker in folder.glob(f"step-*/{MARKER}"))


def prune(folder: Path, keep: int) -> None:
    """Removes all but the ``keep`` newest complete checkpoints, and what interrupted runs left. Rank 0 only."""
    kept = complete(folder)[-keep:]
    for path in folder.glob("step-*"):
        if path not in kept:
            # Without its marker a folder that is only half removed cannot be taken for a checkpoint.
            (path / MARKER).unlink(missing_ok=True)
            shutil.rmtree(path)


def read_model(path: Path) -> dict[str, Any]:
    """What rank 0 saved."""
    return _read(path / "model.pt")


def check_same_run(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises CheckpointError, naming what differs, if the checkpoint at ``path`` is of a run with other settings."""
    differing = [
        f"{key} was {saved.get(key)!r} and is {wanted[key]!r}" for key in wanted if saved.get(key) != wanted[key]
    ]
    if differing:
        raise CheckpointError(
            f"{path} is of another run: {'; '.join(differing)}. Choose another output, or set checkpoint.resume=false"
        )


def read_ranks(path: Path, rank: int, size: int) -> list[dict[str, Any]]:
    """What this rank needs of the ranks' own files: its own, or all of them if the number of ranks has changed."""
    saved = json.loads((path / MARKER).read_text())["size"]
    wanted = [rank] if saved == size else range(saved)
    return [_read(path / f"rank-{i}.pt") for i in wanted]


def _read(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the unpickler met
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error}); delete its folder") from error


def _write(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _rename_into(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
