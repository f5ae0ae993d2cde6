"""What a run records is what its algorithm was given, and recording changes nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sparcomm
from jobs.engine import check_recorded
from jobs.record import recording
from jobs.settings import Settings, validate
from sparcomm.algorithms import Algorithm, registry
from sparcomm.config import settings as fields_of
from sparcomm.errors import ConfigError
from sparcomm.transport import sim
from sparcomm.transport.base import Transport
from support.jobs_run import finish

N, SIZE = 3000, 3


def steps(algorithm: Algorithm, dtype: torch.dtype = torch.float32) -> Any:
    """Gives every rank's sums over three steps with error feedback, and what rank 0 put in."""

    def rank(transport: Transport) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        state, residual = algorithm.init(N, dtype, torch.device("cpu"), SIZE), None
        state.unit = 7
        totals: list[torch.Tensor] = []
        fed: list[torch.Tensor] = []
        for step in range(3):
            made = torch.Generator().manual_seed(10 * step + transport.rank)
            grad = torch.randn(N, generator=made).to(dtype)
            fed.append(grad.float() if residual is None else grad + residual)
            done = algorithm.reduce(grad, residual, state, step, transport)
            assert done.total is not None
            residual, state = done.residual, done.state
            totals.append(done.total)
        return totals, fed

    return sim.run(SIZE, rank, timeout=60).results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(registry()))
def test_what_rank_0_is_given_is_written_and_nothing_changes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    plain = registry()[name](**({"local_size": 1} if name == "hierarchical" else {}))
    recorded = recording(plain, tmp_path / "made", {1, 3})
    found, wanted = steps(recorded, dtype), steps(plain, dtype)
    for (mine, _), (theirs, _) in zip(found, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    files = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert files == ["step-00001-unit-7.pt", "step-00003-unit-7.pt"]
    for file, fed in zip(files, (found[0][1][0], found[0][1][2]), strict=True):
        saved = torch.load(tmp_path / "made" / file, weights_only=True)
        assert saved.dtype == torch.float32
        assert torch.equal(saved, fed.float())


def test_a_recording_algorithm_is_what_it_was(tmp_path: Path) -> None:
    plain = sparcomm.SparDL(density=0.05)
    recorded = recording(plain, tmp_path, {1})
    assert isinstance(recorded, sparcomm.SparDL)
    assert (recorded.name, recorded.fields()) == (plain.name, plain.fields())
    assert fields_of(type(recorded)) == fields_of(sparcomm.SparDL)


def run_of(**more: Any) -> Settings:
    data = {"task": {"name": "digits"}, "optimizer": {"name": "sgd", "lr": 0.1}, "batch": 8, "steps": 9}
    return validate({**data, "algorithm": {"name": "spardl"}, **more}, "test")


def test_a_step_that_the_run_does_not_have() -> None:
    check_recorded(run_of(), 9)
    check_recorded(run_of(record_gradients={"steps": [9, 1]}), 9)
    with pytest.raises(ConfigError, match="no step 10, the last one is 9"):
        check_recorded(run_of(record_gradients={"steps": [1, 10]}), 9)


TINY = """
task: {name: digits, width: 8, blocks: 1}
optimizer: {name: sgd, lr: 0.05}
algorithm: {name: spardl, density: 0.05}
record_gradients: {steps: [1, 3]}
batch: 32
steps: 4
"""


@pytest.mark.torchrun
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_run_leaves_its_gradients_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    done = finish(tmp_path / "tiny.yaml", 2, [f"output={tmp_path / 'out'}"])
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "out" / "gradients"
    files = {path.name: torch.load(path, weights_only=True) for path in sorted(folder.iterdir())}
    first, later = ([x for name, x in files.items() if name.startswith(f"step-0000{s}")] for s in (1, 3))
    assert len(files) == len(first) + len(later)
    assert sum(x.numel() for x in first) == sum(x.numel() for x in later) > 0
    assert all(x.dtype == torch.float32 and x.dim() == 1 and bool(x.isfinite().all()) for x in files.values())
