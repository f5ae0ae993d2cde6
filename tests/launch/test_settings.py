"""A run's settings: what the files say is taken exactly, and every mistake names what is valid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparcomm
from jobs.settings import SGD, AdamW, CharLM, Digits, Settings, load
from sparcomm.algorithms.spardl import SparDL
from sparcomm.errors import ConfigError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
GOOD = """
task: {name: digits}
optimizer: {name: sgd, lr: 0.1}
algorithm: {name: spardl, density: 0.02}
batch: 64
epochs: 2
"""


def write(folder: Path, text: str = GOOD) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_project_is_valid(path: Path) -> None:
    settings = load(path)
    assert settings.output == f"runs/{path.stem}"
    assert settings.build_algorithm() is not None
    assert settings.task.name == path.stem.split("-")[0]


def built(settings: Settings) -> sparcomm.HookState:
    """The hook's state with these options, not started: their own checks have passed."""
    algorithm = settings.build_algorithm()
    assert algorithm is not None
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    return sparcomm.HookState(algorithm, optimizer=optimizer, **settings.hook.arguments())


@pytest.mark.parametrize(
    ("overrides", "name", "value"),
    [
        ([], "memory", sparcomm.ErrorFeedback()),
        (["hook.memory={name: momentum_correction, momentum: 0.5, nesterov: true}"], "memory",
         sparcomm.MomentumCorrection(0.5, nesterov=True)),
        (["hook.memory={name: adam_correction, beta2: 0.9}"], "memory", sparcomm.AdamCorrection(0.9)),
        (["hook.warmup={name: density, steps: 9}"], "warmup", sparcomm.DensityWarmup(9)),
        (["hook.warmup={name: refresh, warmup: 9, growth: 2.0}"], "warmup", sparcomm.Refresh(9, growth=2.0)),
        (["hook.skip=[biases, 100]"], "skip", ("biases", 100)),
        (["hook.storage=bfloat16"], "storage", "bfloat16"),
        (["hook.local_clip=2.0"], "local_clip", 2.0),
        (["hook.lr_aware=5.0"], "lr_clamp", 5.0),
        (["hook.auto_off=true"], "auto_off", True),
        (["hook.check={every: 7, max_age: 300}"], "check", sparcomm.Check(every=7, max_age=300)),
    ],
)  # fmt: skip
def test_options_of_the_hook(tmp_path: Path, overrides: list[str], name: str, value: object) -> None:
    state = built(load(write(tmp_path), ["optimizer.momentum=0.0", *overrides]))
    assert getattr(state.options, name) == value


def test_dense_steps_first(tmp_path: Path) -> None:
    warmup = built(load(write(tmp_path), ["hook.warmup={name: dense, steps: 3}"])).options.warmup
    assert [warmup.at(step, 0.02) for step in range(5)] == [None, None, None, 0.02, 0.02]


def test_the_configs_of_a_task_differ_in_the_algorithm_and_its_tuning_only() -> None:
    for task in ("digits", "charlm"):
        loaded = [load(path) for path in CONFIGS if path.stem.startswith(task)]
        runs = [settings.model_dump(exclude={"algorithm", "hook", "output", "optimizer"}) for settings in loaded]
        assert len(runs) >= 2
        assert all(run == runs[0] for run in runs)


def test_what_is_written_is_what_is_taken(tmp_path: Path) -> None:
    settings = load(write(tmp_path))
    assert isinstance(settings.task, Digits)
    assert isinstance(settings.optimizer, SGD)
    assert settings.build_algorithm() == SparDL(density=0.02)
    assert (settings.batch, settings.epochs, settings.steps, settings.seed) == (64, 2, None, 0)


def test_overrides(tmp_path: Path) -> None:
    overrides = ["optimizer.lr=1e-3", "algorithm.density=5e-2", "steps=7", "epochs=null", "output=here",
                 "checkpoint.every=3", "tensorboard=true"]  # fmt: skip
    settings = load(write(tmp_path), overrides)
    assert settings.optimizer.lr == 1e-3
    assert settings.build_algorithm() == SparDL(density=0.05)
    assert (settings.steps, settings.epochs, settings.output, settings.checkpoint.every) == (7, None, "here", 3)
    assert settings.tensorboard


def test_an_override_can_change_the_whole_section(tmp_path: Path) -> None:
    settings = load(write(tmp_path), ["task={name: charlm, width: 64}", "optimizer={name: adamw, lr: 0.01}"])
    assert isinstance(settings.task, CharLM)
    assert isinstance(settings.optimizer, AdamW)
    assert load(write(tmp_path), ["algorithm=null"]).build_algorithm() is None


SPARSE = "task={name: embedding, layout: sparse}"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["batchh=3"], ["'batchh'", "did you mean 'batch'?", "optimizer", "checkpoint"]),
        (["optimizer.lrr=0.1"], ["'optimizer.lrr'", "did you mean 'lr'?", "momentum", "nesterov"]),
        (["task.layers=3"], ["'task.layers'", "blocks", "dropout", "width"]),
        (["checkpoint.evry=3"], ["'checkpoint.evry'", "'every'", "keep", "resume"]),
        (["schedule.warm=3"], ["'schedule.warm'", "warmup", "floor"]),
        (["optimizer.name=adam"], ["optimizer.name", "'sgd'", "'adamw'"]),
        (["task.name=mnist"], ["task.name", "'digits'", "'charlm'"]),
        (["task={width: 3}"], ["task.name", "'digits'", "'charlm'"]),
        (["optimizer={name: sgd}"], ["missing", "'optimizer.lr'"]),
        (["batch=many"], ["batch='many'", "integer"]),
        (["batch=yes"], ["batch=True", "integer"]),
        (["batch=0"], ["batch=0", "greater than or equal to 1"]),
        (["batch=64.0"], ["batch=64.0", "integer"]),
        (["optimizer.lr=fast"], ["optimizer.lr='fast'", "number"]),
        (["optimizer.lr=-1.0"], ["optimizer.lr=-1.0", "greater than 0"]),
        (["tensorboard=1"], ["tensorboard=1", "boolean"]),
        (["record_gradients={steps: []}"], ["record_gradients.steps", "at least 1"]),
        (["record_gradients={steps: [0]}"], ["record_gradients.steps", "greater than or equal to 1"]),
        (["record_gradients={steps: [1], foldr: x}"], ["'record_gradients.foldr'", "did you mean 'folder'?"]),
        (["record_gradients={steps: [1], folder: ''}"], ["record_gradients.folder", "at least 1"]),
        (["record_gradients={steps: [1]}", "algorithm=null"], ["record_gradients", "algorithm: null"]),
        (["task=digits"], ["task"]),
        (["optimizer={name: signum, lr: 0.1}", "clip_norm=1.0"], ["'signum'", "clip_norm"]),
        (["optimizer={name: lion, lr: 0.1}", "algorithm=null"], ["'lion'", "needs an algorithm"]),
        (["optimizer={name: lion, lr: 0.1}", "hook.auto_off=true"], ["'lion'", "hook"]),
        (["optimizer={name: onebit_adam, lr: 0.1}"], ["missing", "'optimizer.warmup'"]),
        (["steps=3"], ["either epochs or steps"]),
        (["epochs=null"], ["either epochs or steps"]),
        (["task={name: charlm, width: 130, heads: 4}"], ["width=130", "heads=4"]),
        ([SPARSE, "optimizer={name: signum, lr: 0.1}"], ["task.layout='sparse'", "'sgd'"]),
        (["algorithm=s2"], ["must be a mapping with a 'name'", "{name: spardl}", "got 's2'"]),
        (["algorithm.densty=0.1"], ["'densty'", "did you mean 'density'?", "'schedule'"]),
        (["algorithm.name=spardll"], ["'spardll'", "did you mean 'spardl'?", "'topk'"]),
        (["algorithm.density=2.0"], ["2.0"]),
        (["algorithm=spardl"], ["algorithm must be a mapping", "got 'spardl'"]),
        (["batch"], ["'batch'", "key=value"]),
        (["=3"], ["'=3'", "key=value"]),
        (["batch.size=3"], ["'batch.size=3'", "'batch' is a value"]),
        (["batch=[1"], ["batch=[1", "YAML", "column 3"]),
        (["bucket_mb=.inf"], ["bucket_mb=inf", "finite"]),
        (["timeout=1e300"], ["timeout=1e+300", "1000000"]),
        (["hook.memry=3"], ["'hook.memry'", "did you mean 'memory'?", "warmup", "lr_aware"]),
        (["hook.memory={name: dgc}"], ["hook.memory.name", "'error_feedback'", "'adam_correction'"]),
        (["hook.memory={name: adam_correction, beta: 0.9}"], ["'hook.memory.beta'", "did you mean 'beta2'?", "eps"]),
        (["hook.memory={name: momentum_correction, momentum: 1.5}"], ["hook.memory.momentum=1.5", "less than 1"]),
        (["hook.memory={name: momentum_correction}"], ["momentum_correction", "momentum: 0.0"]),
        (["hook.warmup={name: refresh}"], ["missing", "'hook.warmup.warmup'"]),
        (["hook.check.evry=3"], ["'hook.check.evry'", "'every'", "max_age"]),
        (["hook.lr_aware=0.5"], ["hook.lr_aware=0.5", "greater than or equal to 1"]),
        (["hook.storage=int8"], ["hook.storage='int8'", "pinned"]),
        (["hook.skip=[-1]"], ["hook.skip", "-1", "greater than or equal to 0"]),
        (["algorithm=null", "hook.auto_off=true"], ["hook", "algorithm: null"]),
        (["optimizer.momentum=0.0", "hook.memory={name: adam_correction}", "clip_norm=1.0"], ["local_clip"]),
        (["optimizer={name: held_adamw, lr: 0.1}"], ["held_adamw", "refresh"]),
        (["task={name: embedding, context: 2}"], ["task.context=2", "greater than or equal to 3"]),
        ([SPARSE, "optimizer={name: lion, lr: 0.1}"], ["sparse", "optimizer.name='sgd'"]),
        ([SPARSE, "algorithm=null"], ["task.layout", "algorithm"]),
        ([SPARSE, "optimizer.weight_decay=0.1"], ["task.layout", "weight_decay: 0.0"]),
        ([SPARSE, "optimizer={name: rmsprop, lr: 0.1}"], ["task.layout", "optimizer.name='sgd'"]),
        ([SPARSE, "optimizer.momentum=0.0", "hook.memory={name: adam_correction}"], ["task.layout", "adam_correction"]),
        ([SPARSE, "clip_norm=1.0"], ["clip_norm", "hook.local_clip"]),
        (["batchh=1", "optimizer.lrr=1.0"], ["'batchh'", "'optimizer.lrr'"]),
    ],
)
def test_mistakes(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path), overrides)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + "batch: 32\n", ["'batch'", "twice"]),
        (GOOD.replace("lr: 0.1", "lr: 0.1, lr: 0.2"), ["'lr'", "twice"]),
        ("- a list", ["mapping", "list"]),
        ("", ["mapping"]),
        ("task: {", ["not valid YAML"]),
        ("3", ["mapping", "int"]),
        ("!!python/object/apply:os.getcwd []", ["not valid YAML"]),
    ],
)
def test_files_that_are_no_settings(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    for word in ["run.yaml", *words]:
        assert word in str(caught.value)


def test_a_missing_file_lists_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ConfigError, match=r"no configuration.*: run\.yaml"):
        load(tmp_path / "rum.yaml")
    with pytest.raises(ConfigError, match=r"no configuration.*: run\.yaml"):
        load(tmp_path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ConfigError, match=r"run\.yaml: not valid YAML"):
        load(tmp_path / "run.yaml")


def test_a_run_is_the_same_as_long_as_its_length_and_rates_change_only(tmp_path: Path) -> None:
    path = write(tmp_path)
    same, other = ["optimizer.lr=0.3", "epochs=9", "algorithm.density=0.5"], ["algorithm.name=topk"]
    assert load(path, same).identity() == load(path).identity()
    assert load(path, other).identity() != load(path).identity() != load(path, ["algorithm=null"]).identity()
