#!/usr/bin/env python3
"""Two configurations over the same seeds: the difference of their test scores with its 95 % interval.

    python launch/compare.py --seeds 5 --rates 0.025 0.05 0.1 --json runs/compare.json

With ``--rates`` both arms first choose their learning rate from that grid, on seeds that the comparison does not use.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.launcher import JobFailed, positive, run
from jobs.paired import Interval, paired_difference
from jobs.progress import human

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TUNING_SEED = 1_000_000
BASE, ARM = "base", "arm"
_SHOWN = ("score", "bytes_sent", "ratio", "seconds")


def main(argv: list[str] | None = None) -> int:
    """Runs both arms over all seeds. Returns 1 if a run failed."""
    arguments = _parser().parse_intermixed_args(argv)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    if wrong := refused(seeds):
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    configs = {BASE: arguments.base, ARM: arguments.arm}
    try:
        rates = {which: tune(config, arguments) for which, config in configs.items()}
        runs: dict[str, list[dict[str, Any]]] = {BASE: [], ARM: []}
        # Alternating, so that a busy spell of the machine hits both arms alike.
        for seed in seeds:
            for which, config in configs.items():
                runs[which].append(one(config, seed, rates[which], arguments))
    except JobFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = compare(runs)
    show(configs, rates, runs, found)
    if arguments.json:
        paths = {which: str(config) for which, config in configs.items()}
        result = {"configs": paths, "rates": rates, "runs": runs, "difference": found._asdict()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def refused(seeds: range) -> str | None:
    """Why no comparison can use these seeds, if so."""
    if len(seeds) < 2:
        return "--seeds must be at least 2: one pair has no interval"
    if seeds.start < 0 or seeds.stop > TUNING_SEED:
        return f"--first-seed must leave all seeds between 0 and {TUNING_SEED - 1}: later ones choose learning rates"
    return None


def one(config: Path, seed: int, rate: float | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """The summary of one run."""
    overrides = [*arguments.overrides, f"seed={seed}"] + ([] if rate is None else [f"optimizer.lr={rate}"])
    output = arguments.output / f"{config.stem}-{seed}-{rate}"
    summary = run(config, arguments.ranks, output, overrides, quiet=True)["summary"]
    score = 100 * summary["scores"]["accuracy"] if "accuracy" in summary["scores"] else summary["scores"]["bits"]
    print(
        f"{config.stem} seed={seed} rate={rate}: {score:.3f}, {summary['ratio']:.1f}x, {summary['seconds']:.1f} s",
        flush=True,
    )
    return {**summary, "score": score, "seed": seed}


def tune(config: Path, arguments: argparse.Namespace) -> float | None:
    """The rate of the grid with the best mean score; None (the configuration's own) without a grid.

    Judged by what the comparison judges: the test loss rewards unsure predictions, and picks rates that are too high.
    """
    if not arguments.rates:
        return None
    seeds = range(TUNING_SEED, TUNING_SEED + arguments.tuning_seeds)
    return best({rate: [one(config, seed, rate, arguments) for seed in seeds] for rate in arguments.rates})


def best(tried: dict[float, list[dict[str, Any]]]) -> float:
    """The rate whose runs score best on average (accuracy: high, bits: low); of equals the one tried first."""

    def merit(rate: float) -> float:
        mean = fmean(summary["score"] for summary in tried[rate])
        return mean if "accuracy" in tried[rate][0]["scores"] else -mean

    return max(tried, key=merit)


def compare(runs: dict[str, list[dict[str, Any]]]) -> Interval:
    """Score of the arm minus score of the base, over paired seeds."""
    return paired_difference(*([summary["score"] for summary in runs[which]] for which in (BASE, ARM)))


def show(
    configs: dict[str, Path], rates: dict[str, float | None], runs: dict[str, list[dict[str, Any]]], found: Interval
) -> None:
    """Prints what was found."""
    table = Table(title=f"{len(runs[BASE])} paired seeds", title_justify="left")
    for heading in ("", "rate", "score (mean)", "bytes sent by a rank", "fewer than dense float32", "seconds"):
        table.add_column(heading, justify="left" if not heading else "right")
    for which, config in configs.items():
        mean = {key: fmean(summary[key] for summary in runs[which]) for key in _SHOWN}
        rate = "its own" if rates[which] is None else str(rates[which])
        score, seconds = f"{mean['score']:.3f}", f"{mean['seconds']:.1f}"
        table.add_row(config.stem, rate, score, human(mean["bytes_sent"]), f"{mean['ratio']:.1f}x", seconds)
    Console().print(table)
    print(f"difference of the scores: {found.mean:+.3f}, 95 % interval [{found.low:+.3f}, {found.high:+.3f}]")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compare two configurations over paired seeds.")
    parser.add_argument("--base", type=Path, default=CONFIGS / "digits-dense.yaml")
    parser.add_argument("--arm", type=Path, default=CONFIGS / "digits-spardl.yaml")
    parser.add_argument("--ranks", type=positive, default=4)
    parser.add_argument("--seeds", type=positive, default=5, help="how many pairs")
    parser.add_argument("--first-seed", type=int, default=0, help="seeds are this one and those that follow")
    parser.add_argument("--rates", type=float, nargs="+", help="grid of learning rates that both arms choose from")
    parser.add_argument("--tuning-seeds", type=positive, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    parser.add_argument("--json", type=Path, help="write all summaries and the interval here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="given to every run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
