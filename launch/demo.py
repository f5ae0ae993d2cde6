#!/usr/bin/env python3
"""``make demo``: the same model trained dense and with SparDL at 1 %, on 4 ranks of this machine, side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs import report
from jobs.launcher import JobFailed, positive, run

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def main(argv: list[str] | None = None) -> int:
    """Runs both arms one after the other and prints the table. Returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=positive, default=4)
    parser.add_argument("--task", default="digits", choices=("digits", "charlm"))
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="given to both runs")
    arguments = parser.parse_intermixed_args(argv)
    runs = {}
    try:
        for arm in ("dense", "spardl"):
            config = CONFIGS / f"{arguments.task}-{arm}.yaml"
            print(f"== {config.stem} on {arguments.ranks} ranks", flush=True)
            runs[arm] = run(config, arguments.ranks, arguments.output / arm, arguments.overrides)
    except JobFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    plot = arguments.output / report.PLOT
    report.plot(plot, runs)
    summaries = [metrics["summary"] for metrics in runs.values()]
    report.show(f"{arguments.task}, {arguments.ranks} ranks, side by side", summaries)
    fewer = summaries[0]["bytes_sent"] / summaries[1]["bytes_sent"] if summaries[1]["bytes_sent"] else 1.0
    print(f"spardl sent {fewer:.1f} times fewer bytes over the whole run; plot: {plot}")
    print("(ranks of one machine have no slow network between them: here the bytes count, not the seconds)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
