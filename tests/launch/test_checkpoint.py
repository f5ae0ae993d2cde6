"""A checkpoint is whole or ignored, whatever a killed job has left behind."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from jobs import checkpoint
from sparcomm.errors import CheckpointError


def nothing() -> None:
    """The barrier of a single rank."""


def save(folder: Path, step: int, size: int = 1) -> None:
    """All ranks' parts of a checkpoint; ranks are threads."""
    barrier = threading.Barrier(size, timeout=30)

    def rank(number: int) -> None:
        own = {"rank": number, "step": step}
        checkpoint.save(folder, step, {"weight": torch.full((3,), step)}, own, number, size, barrier.wait)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_without_any_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere") is None
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("size", [1, 3])
def test_what_is_saved_is_read(tmp_path: Path, size: int) -> None:
    save(tmp_path, 5, size)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.name == "step-00000005"
    assert torch.equal(checkpoint.read_model(found)["weight"], torch.full((3,), 5))
    for rank in range(size):
        assert checkpoint.read_ranks(found, rank, size) == [{"rank": rank, "step": 5}]
    assert [part["rank"] for part in checkpoint.read_ranks(found, 0, size + 1)] == list(range(size))
    assert {path.name for path in found.iterdir()} == {"model.pt", "complete", *(f"rank-{r}.pt" for r in range(size))}


def test_the_newest_complete_one_counts(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    (tmp_path / "step-00000100" / checkpoint.MARKER).unlink()
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.name == "step-00000010"


def test_prune_keeps_the_newest_and_removes_leftovers(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (tmp_path / "step-00000002" / checkpoint.MARKER).unlink()
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_rank_that_does_not_arrive_leaves_no_marker(tmp_path: Path) -> None:
    def broken() -> None:
        raise ConnectionError("a peer is gone")

    save(tmp_path, 1)
    with pytest.raises(ConnectionError):
        checkpoint.save(tmp_path, 2, {}, {}, 0, 2, broken)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.name == "step-00000001"


def test_saving_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoint.save(tmp_path, 1, {"weight": torch.zeros(1)}, {}, 0, 1, nothing)
    assert torch.equal(checkpoint.read_model(tmp_path / "step-00000001")["weight"], torch.zeros(1))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "model.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"model\.pt cannot be read"):
        checkpoint.read_model(tmp_path / "step-00000001")


def test_a_checkpoint_of_another_run_is_refused() -> None:
    saved = {"batch": 64, "seed": 0, "task": {"name": "digits", "width": 32}}
    checkpoint.check_same_run(Path("here"), saved, dict(saved))
    with pytest.raises(CheckpointError, match=r"here is of another run: batch was 64 and is 32\. .*resume=false"):
        checkpoint.check_same_run(Path("here"), saved, {**saved, "batch": 32})
    with pytest.raises(CheckpointError, match="optimizer was None and is 'sgd'"):
        checkpoint.check_same_run(Path("here"), saved, {**saved, "optimizer": "sgd"})


class Harmful:
    """Runs code when it is unpickled by a reader that allows it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1/0",)


def test_a_file_with_code_in_it_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    torch.save({"weight": Harmful()}, tmp_path / "step-00000001" / "model.pt")
    with pytest.raises(CheckpointError, match="UnpicklingError"):
        checkpoint.read_model(tmp_path / "step-00000001")
