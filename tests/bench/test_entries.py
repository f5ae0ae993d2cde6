"""What may be typed, what it means, and that everything else is one line that says what is allowed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from sparcomm.algorithms.dense import Dense
from sparcomm.algorithms.hierarchical import Hierarchical
from sparcomm.algorithms.majority_vote import MajorityVote
from sparcomm.algorithms.s2 import S2Reducer
from sparcomm.algorithms.spardl import SparDL
from sparcomm.algorithms.topk import TopKAllGather
from sparcomm.bench import entries, options, overlap, world
from sparcomm.bench.sync import without_ranks
from sparcomm.errors import ConfigError


@pytest.mark.parametrize(
    ("typed", "algorithm"),
    [
        ("dense", Dense(native=True)),
        ("dense:native=false", Dense()),
        ("ordered", Dense()),
        ("spardl", SparDL(density=0.1, values="bfloat16", schedule="direct")),
        ("spardl:density=0.5:schedule=log", SparDL(density=0.5, values="bfloat16", schedule="log")),
        ("topk:values=float16", TopKAllGather(density=0.1, values="float16")),
        ("sparcomm.algorithms.topk.TopKAllGather:density=0.2", TopKAllGather(density=0.2, values="bfloat16")),
    ],
)
def test_an_algorithm_of_ours(typed: str, algorithm: object) -> None:
    entry = entries.parse(typed, 0.1, "bfloat16", "direct")
    assert (entry.typed, entry.algorithm, entry.hook) == (typed, algorithm, "")


def test_hooks_of_pytorch() -> None:
    for hook in entries.TORCH:
        assert entries.parse(f"torch:{hook}", 0.1, None, None) == entries.Entry(f"torch:{hook}", hook=hook)
    assert entries.parse("torch:powersgd:rank=4", 0.1, None, None).rank == 4


def test_without_shared_options_an_algorithm_keeps_its_own() -> None:
    assert entries.parse("spardl", 0.01, None, None).algorithm == SparDL()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--algorithms", "S2Reducer"], "unknown algorithm 'S2Reducer' (did you mean 's2'?)"),
        (["--algorithms", "s2(density=0.1)"], "unknown algorithm 's2(density=0.1)'; options follow a colon"),
        (["--algorithms", "spardll"], "unknown algorithm 'spardll' (did you mean 'spardl'?)"),
        (["--algorithms", "spardl,values=bfloat16"], "options follow a colon"),
        (["--algorithms", "spardl:values"], "'values' must be FIELD=VALUE"),
        (["--algorithms", "spardl:values=int3"], "values='int3'"),
        (["--algorithms", "spardl:colour=1"], "unknown key 'colour'"),
        (["--algorithms", "spardl:density=0.1:density=0.2"], "'density' is given twice"),
        (["--algorithms", "dense,"], "unknown algorithm ''"),
        (["--algorithms", "ordered:native=true"], "'ordered' has no options"),
        (["--algorithms", "torch:fp8"], "(did you mean 'torch:fp16'?)"),
        (["--algorithms", "torch:fp16:rank=2"], "take no options"),
        (["--algorithms", "torch:powersgd:rank=0"], "at least 1"),
        (["--algorithms", "no.such.Class"], "cannot be imported"),
        (["--algorithms", "sparcomm.wire.words"], "must be a subclass"),
        (["--algorithms", "sparcomm.algorithms.topk.TopKAllGather:colour=1"], "unknown key 'colour'"),
        (["--density", "1.5"], "must be in (0, 1]"),
        (["--density", "0"], "must be a number above 0"),
        (["--values", "int4"], "values='int4': must be one of 'float32', 'bfloat16', 'float16', 'int8'"),
        (["--schedule", "direkt"], "(did you mean 'direct'?)"),
        (["--numel", "0"], "at least 1"),
        (["--numel", "1e6"], "'1e6'"),
        (["--steps", "-1"], "--steps"),
        (["--warmup", "0"], "at least 1"),
        (["--timeout", "nan"], "must be a number above 0"),
        (["--model", "gpt5"], "gpt5"),
        (["--batch", "3"], "only with --model"),
        (["--png", "times.pdf"], "must end in .png"),
        (["--png", "no/such/folder/times.png"], "there is no folder"),
        (["--nume", "3"], "unrecognized arguments"),
        (["--over", "tcp"], "must be gloo, mpi, or both"),
        (["--over", "gloo,gloo"], "must be gloo, mpi, or both"),
        (["--over", "mpi"], "mpirun -n 4"),
    ],
)
def test_nonsense_is_refused_in_one_line(arguments: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        options.parse(arguments)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_overlap_refuses_what_cannot_run_inline() -> None:
    with pytest.raises(ConfigError, match="only algorithms of ours"):
        overlap.parse(["--algorithm", "torch:fp16"])


def test_defaults() -> None:
    parsed = options.parse([])
    assert (parsed.steps, parsed.warmup, parsed.numel) == (20, 2, 4_194_304)
    assert parsed.algorithms == tuple(options.ALGORITHMS.split(","))
    assert options.parse(["--model", "conv"]).algorithms == tuple(options.TRAINED.split(","))
    assert options.parse(["--png", "times.png"]).png == Path("times.png")


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"RANK": "0"}, "RANK=0 set but not WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_ADDR=a set but not MASTER_PORT"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK='x'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2 with WORLD_SIZE=2"),
    ],
)
def test_half_an_environment(variables: dict[str, str], complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert world.place() is None
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=complaint):
        world.place()


def test_ranks_and_a_launcher_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="leave it out"):
        options.parse(["--ranks", "2"])


def test_under_mpirun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("MPI_LOCALRANKID", "1")
    assert options.parse([]).over == (("mpi",) if importlib.util.find_spec("mpi4py") else ("gloo",))
    assert options.parse(["--over", "gloo,mpi"]).over == ("gloo", "mpi")
    with pytest.raises(ConfigError, match="leave it out"):
        options.parse(["--ranks", "2"])


@pytest.mark.parametrize("typed", [["--ranks", "2", "--json"], ["--ranks=2", "--json"], ["--json"]])
def test_a_rank_is_not_told_to_start_ranks(typed: list[str]) -> None:
    assert without_ranks(typed) == ["--json"]


@pytest.mark.parametrize("none", ["none", "null", "None"])
def test_no_density(none: str) -> None:
    assert entries.parse(f"s2:density={none}:granularity=4", 0.01, None, None).algorithm == S2Reducer(granularity=4)
    assert entries.parse("s2", 0.01, None, None).algorithm == S2Reducer(0.01)


def test_algorithms_within_algorithms() -> None:
    voted = entries.parse("hierarchical:outer=majority-vote(momentum=0.9)", 0.01, None, None).algorithm
    assert voted == Hierarchical(outer=MajorityVote(momentum=0.9))
    typed = "hierarchical:local_size=2:outer=spardl(density=0.05, schedule='direct')"
    assert entries.split(f"dense, {typed},topk") == ["dense", typed, "topk"]
    made = entries.parse(typed, 0.01, "bfloat16", None).algorithm
    assert made == Hierarchical(outer=SparDL(density=0.05, schedule="direct"), local_size=2), "as it was typed"
    made = entries.parse("hierarchical:local_size=2", 0.03, "bfloat16", "direct").algorithm
    assert made == Hierarchical(outer=SparDL(density=0.03, values="bfloat16", schedule="direct"), local_size=2)
    for bad, says in (("outer=spardl(density=0.05", "no algorithm"), ("outer=spardl(densty=1)", "did you mean")):
        with pytest.raises(ConfigError, match=says):
            entries.parse(f"hierarchical:{bad}", 0.01, None, None)
