#!/usr/bin/env python3
"""Configurations over the same seeds: each one's difference to a base in test score, with its 95 % interval.

    python launch/compare.py --seeds 5 --rates 0.05 0.1 0.2 --json runs/compare.json --base configs/digits-dense.yaml
        --arms configs/digits-plain.yaml configs/digits-spardl.yaml "configs/digits-spardl.yaml algorithm.density=0.1"

An arm is a file, or a file and overrides in one argument; overrides for all runs come before the options. With
``--rates`` the base and every arm first choose their learning rate from that grid, on seeds that the comparison does
not use. ``--reuse`` takes runs of the same settings that have finished in ``--output`` before, so that arms can be
added later.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs import report
from jobs.launcher import JobFailed, positive, run
from jobs.paired import Interval, paired_difference
from jobs.progress import human
from jobs.settings import load
from sparcomm.errors import ConfigError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TUNING_SEED = 1_000_000
_SHOWN = ("score", "bytes_sent", "ratio", "seconds")

Runs = list[dict[str, Any]]


class Arm(NamedTuple):
    """A configuration: a file and overrides of its own."""

    config: Path
    overrides: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Arm:
        """From one argument. Raises ArgumentTypeError for an empty one."""
        first, *overrides = shlex.split(text) or [""]
        if not first:
            raise argparse.ArgumentTypeError("must be a file of configs/, with or without overrides after it")
        return cls(Path(first), tuple(overrides))

    @property
    def label(self) -> str:
        """How it is called in tables."""
        return " ".join((self.config.stem, *self.overrides))


def main(argv: list[str] | None = None) -> int:
    """Runs base and arms over all seeds. Returns 1 if a run failed, 2 for arguments that cannot be compared."""
    arguments = _parser().parse_intermixed_args(argv)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    arms: list[Arm] = [arguments.base, *arguments.arms]
    if wrong := refused(seeds, arms):
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    try:
        for arm in arms:  # mistakes are better known before the first run than before the last
            load(arm.config, [*arguments.overrides, *arm.overrides])
        tuned = [tune(arm, arguments) for arm in arms]
        rates = [best(tried) if tried else None for tried in tuned]
        runs: list[Runs] = [[] for _ in arms]
        # Alternating, so that a busy spell of the machine hits all arms alike.
        for seed in seeds:
            for arm, rate, mine in zip(arms, rates, runs, strict=True):
                mine.append(one(arm, seed, rate, arguments))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except JobFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = [compare(runs[0], mine) for mine in runs[1:]]
    show(arms, rates, runs, found)
    if arguments.json:
        write(arguments.json, arms, tuned, rates, runs, found)
    return 0


def refused(seeds: range, arms: list[Arm]) -> str | None:
    """Why these cannot be compared, if so."""
    if len(seeds) < 2:
        return "--seeds must be at least 2: one pair has no interval"
    if seeds.start < 0 or seeds.stop > TUNING_SEED:
        return f"--first-seed must leave all seeds between 0 and {TUNING_SEED - 1}: later ones choose learning rates"
    labels = [arm.label for arm in arms]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    return f"--base and --arms must all differ, {twice[0]!r} comes twice" if twice else None


def one(arm: Arm, seed: int, rate: float | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """The summary of one run."""
    overrides = [*arguments.overrides, *arm.overrides, f"seed={seed}"]
    overrides += [] if rate is None else [f"optimizer.lr={rate}"]
    folder = re.sub(r"[^\w.=+-]+", "_", f"{arm.label}-{seed}-{rate}")
    output = arguments.output / folder
    metrics = finished(arm, overrides, output) if arguments.reuse else None
    if metrics is None:
        metrics = run(arm.config, arguments.ranks, output, overrides, quiet=True)
    summary = metrics["summary"]
    score = 100 * summary["scores"]["accuracy"] if "accuracy" in summary["scores"] else summary["scores"]["bits"]
    print(
        f"{arm.label} seed={seed} rate={rate}: {score:.3f}, {summary['ratio']:.1f}x, {summary['seconds']:.1f} s",
        flush=True,
    )
    return {**summary, "score": score, "seed": seed}


def finished(arm: Arm, overrides: list[str], output: Path) -> dict[str, Any] | None:
    """The metrics of a run that has finished in ``output`` with these settings, if there is one."""
    if not (output / report.METRICS).exists():
        return None
    metrics = report.read(output)
    wanted = load(arm.config, [*overrides, f"output={output}", "checkpoint.resume=false"]).model_dump()
    return metrics if metrics["settings"] == json.loads(json.dumps(wanted)) else None


def tune(arm: Arm, arguments: argparse.Namespace) -> dict[float, Runs]:
    """Runs over the grid of rates by rate; empty (the configuration's own rate is taken) without a grid.

    Judged by what the comparison judges: the test loss rewards unsure predictions, and picks rates that are too high.
    """
    seeds = range(TUNING_SEED, TUNING_SEED + arguments.tuning_seeds)
    return {rate: [one(arm, seed, rate, arguments) for seed in seeds] for rate in arguments.rates or ()}


def best(tried: dict[float, Runs]) -> float:
    """The rate whose runs score best on average (accuracy: high, bits: low); of equals the one tried first."""

    def merit(rate: float) -> float:
        mean = fmean(summary["score"] for summary in tried[rate])
        return mean if "accuracy" in tried[rate][0]["scores"] else -mean

    return max(tried, key=merit)


def compare(base: Runs, arm: Runs) -> Interval:
    """Score of the arm minus score of the base, over paired seeds."""
    return paired_difference(*([summary["score"] for summary in runs] for runs in (base, arm)))


def show(arms: list[Arm], rates: list[float | None], runs: list[Runs], found: list[Interval]) -> None:
    """Prints what was found."""
    table = Table(title=f"{len(runs[0])} paired seeds", title_justify="left")
    headings = ("rate", "score (mean)", "difference, 95 % interval", "bytes sent by a rank", "fewer", "seconds")
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right")
    differences = ["", *(f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" for d in found)]
    for arm, rate, mine, difference in zip(arms, rates, runs, differences, strict=True):
        mean = {key: fmean(summary[key] for summary in mine) for key in _SHOWN}
        cells = ("its own" if rate is None else str(rate), f"{mean['score']:.3f}", difference)
        sent = (human(mean["bytes_sent"]), f"{mean['ratio']:.1f}x", f"{mean['seconds']:.1f}")
        table.add_row(escape(arm.label), *cells, *sent)
    Console(width=max(140, Console().width)).print(table)


def write(
    path: Path, arms: list[Arm], tuned: list[dict[float, Runs]], rates: list[float | None], runs: list[Runs],
    found: list[Interval],
) -> None:  # fmt: skip
    """Everything as JSON, base first."""
    differences = [None, *(interval._asdict() for interval in found)]
    result = [
        {
            "label": arm.label,
            "config": str(arm.config),
            "overrides": list(arm.overrides),
            "tuning": {str(rate): [summary["score"] for summary in mine] for rate, mine in tried.items()},
            "rate": rate,
            "difference": difference,
            "runs": mine,
        }
        for arm, tried, rate, mine, difference in zip(arms, tuned, rates, runs, differences, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare configurations over paired seeds.")
    parser.add_argument("--base", type=Arm.parse, default=Arm(CONFIGS / "digits-dense.yaml"))
    parser.add_argument("--arms", type=Arm.parse, nargs="+", default=[Arm(CONFIGS / "digits-spardl.yaml")])
    parser.add_argument("--ranks", type=positive, default=4)
    parser.add_argument("--seeds", type=positive, default=5, help="how many pairs")
    parser.add_argument("--first-seed", type=int, default=0, help="seeds are this one and those that follow")
    parser.add_argument("--rates", type=float, nargs="+", help="grid of learning rates that all choose from")
    parser.add_argument("--tuning-seeds", type=positive, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    parser.add_argument("--reuse", action="store_true", help="take runs of the same settings that have finished")
    parser.add_argument("--json", type=Path, help="write all summaries and the intervals here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="given to every run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
