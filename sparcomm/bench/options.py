"""What may be typed after ``sparcomm bench``, checked before anything starts."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sparcomm.bench import models
from sparcomm.errors import ConfigError
from sparcomm.launch.environment import MPI, detect

T = TypeVar("T")

ALGORITHMS = "dense,spardl,topk,torch:fp16,torch:bf16,torch:powersgd"
TRAINED = "dense,torch:bf16,spardl"  # with --model
WAYS = ("gloo", "mpi")

EXAMPLES = """\
started by any launcher (torchrun, mpirun, srun, or what sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or alone:
  torchrun --nproc-per-node 4 -m sparcomm bench --numel 4194304 --density 0.01
  sparcomm bench --ranks 4 --numel 4194304 --algorithms dense,spardl:values=bfloat16,torch:fp16
  mpirun -n 4 sparcomm bench --over mpi,gloo --algorithms dense,topk,spardl
  sparcomm bench --ranks 2 --model charlm --algorithms dense,torch:bf16,spardl:schedule=direct
  sparcomm bench --ranks 4 --algorithms "spardl,hierarchical:local_size=2:outer=spardl(density=0.01, schedule='direct')"

an algorithm is NAME[:FIELD=VALUE]...; NAME is one of 'sparcomm list', 'dense' (the backend's own all-reduce),
'ordered' (ours, in rank order), 'torch:dense', 'torch:fp16', 'torch:bf16', 'torch:powersgd[:rank=R]', or
PACKAGE.MODULE.CLASS of your own. docs/bench.md says what is timed."""


@dataclass(frozen=True)
class Common:
    """Options that every benchmark over several ranks has."""

    density: float = 0.01
    values: str | None = None
    schedule: str | None = None
    steps: int = 20
    warmup: int = 2
    threads: int = 1
    timeout: float = 180.0
    ranks: int | None = None
    json: bool = False


@dataclass(frozen=True)
class Options(Common):
    """Those of ``sparcomm bench`` itself."""

    numel: int = 4_194_304
    algorithms: tuple[str, ...] = ()
    model: str | None = None
    batch: int | None = None
    bucket_mb: float = 4.0
    png: Path | None = None
    seed: int = 0
    over: tuple[str, ...] = ("gloo",)


class Parser(argparse.ArgumentParser):
    """Refuses in one line, and takes no abbreviations: a word typed wrong never means another option."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(f"{self.prog}: {message}")


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of at least ``least``."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return parse


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return number


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    number = positive(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text!r}")
    return number


def several(one: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Values separated by commas, each as ``one`` takes it."""
    return lambda text: tuple(map(one, text.split(",")))


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``Common``."""
    add = parser.add_argument
    add("--density", type=positive, default=0.01, metavar="D", help="k / n of algorithms that have one (0.01)")
    add("--values", metavar="DTYPE", help="width of sent values, for algorithms that have it: float32, bfloat16, ...")
    add("--schedule", metavar="NAME", help="schedule, for algorithms that have one: log or direct")
    add("--steps", type=at_least(1), default=20, metavar="S", help="timed steps (20)")
    add("--warmup", type=at_least(1), default=2, metavar="S", help="steps before them (2)")
    add("--threads", type=at_least(1), default=1, metavar="T", help="PyTorch threads per rank (1)")
    add("--timeout", type=positive, default=180.0, metavar="s",
        help="seconds without a completed step after which a row is given up (180)")  # fmt: skip
    add("--ranks", type=at_least(1), metavar="P", help="start P ranks on this machine")
    add("--json", action="store_true", help="one JSON object a line, printed by rank 0")


def parser() -> Parser:
    """Of ``sparcomm bench``."""
    made = Parser(
        prog="sparcomm bench",
        description="Time one synchronisation of a float32 gradient (or, with --model, whole training steps) with "
        "each algorithm,\nevery one in processes of its own: one that fails, hangs or aborts is a row that says so.",
        epilog=EXAMPLES,
    )
    add = made.add_argument
    add("--numel", type=at_least(1), default=4_194_304, metavar="N", help="elements of the gradient (4194304)")
    add("--algorithms", metavar="A,B,...", help=f"default: {ALGORITHMS}; with --model {TRAINED}")
    add("--model", choices=sorted(models.MODELS), help="time training steps of this built-in model in DDP instead")
    add("--batch", type=at_least(1), metavar="B", help="with --model: examples per rank and step")
    add("--bucket-mb", type=positive, default=4.0, metavar="MB", help="with --model: DDP's bucket size (4)")
    add("--png", type=Path, metavar="FILE", help="draw the times (needs matplotlib)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of gradients, models and data (0)")
    add("--over", metavar="WAY,...", help="gloo, mpi (under mpirun), or both in turn; default: mpi under mpirun")
    add_common(made)
    return made


def parse(argv: Sequence[str]) -> Options:
    """Options from the command line. Raises ConfigError, naming what is wrong."""
    from sparcomm.bench import entries  # needs pydantic, which no benchmark of kernels does

    given = parser().parse_args(argv)
    typed = given.algorithms if given.algorithms is not None else (TRAINED if given.model else ALGORITHMS)
    given.algorithms = tuple(entries.split(typed))
    options = Options(**{f.name: getattr(given, f.name) for f in fields(Options)})
    check(options, options.algorithms)
    options = replace(options, over=ways(given.over))
    if options.batch is not None and options.model is None:
        raise ConfigError("--batch: only with --model")
    if options.png is not None:
        check_png(options.png)
    return options


def check(options: Common, algorithms: Sequence[str]) -> None:
    """Raises ConfigError for an algorithm that cannot be, or a number of ranks that contradicts the launcher's."""
    from sparcomm.bench import entries

    if options.density > 1:
        raise ConfigError(f"--density {options.density:g}: must be in (0, 1]")
    entries.check_shared(options.values, options.schedule)
    for typed in algorithms:
        entries.parse(typed, options.density, options.values, options.schedule)
    if options.ranks is not None and ("RANK" in os.environ or detect(os.environ).launcher != "none"):
        raise ConfigError(f"--ranks {options.ranks}: a launcher has started this rank already; leave it out")


def ways(typed: str | None) -> tuple[str, ...]:
    """What messages go over. Raises ConfigError for what does not exist, or MPI where it has not started the ranks."""
    found = detect(os.environ)
    under_mpi = found.launcher in MPI
    if typed is None:
        return ("mpi",) if under_mpi and importlib.util.find_spec("mpi4py") is not None else ("gloo",)
    named = tuple(typed.split(","))
    if not set(named) <= set(WAYS) or len(set(named)) < len(named):
        raise ConfigError(f"--over {typed!r}: must be gloo, mpi, or both with a comma between them")
    if "mpi" in named and not under_mpi:
        raise ConfigError("--over mpi: MPI must start the ranks, as in: mpirun -n 4 sparcomm bench --over mpi")
    return named


def check_png(path: Path) -> None:
    """Raises ConfigError unless ``path`` can become a picture."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--png needs matplotlib: pip install 'sparcomm[train]'")
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--png {path}: must end in .png")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--png {path}: there is no folder {path.absolute().parent}")
