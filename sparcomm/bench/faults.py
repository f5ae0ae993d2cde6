"""Fault injection: kills, stops, breaks or removes one rank of a training job at a random moment, many times.

    python -m sparcomm.bench.faults [--ranks 4] [--count 200] [--seed 0] [--kinds kill stall ...] [--json]

Real processes train a small DDP model over Gloo. Each other rank has to end with one error, within the hook's timeout
and some slack for finding out who it was; with the bits that an undisturbed run has after as many steps; without
threads left; and its process has to end by itself. The exit status is 1 if any hangs, is wrong, or ends uncleanly.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from sparcomm.bench.faults_plan import KINDS, draw
from sparcomm.bench.faults_world import Forks, Outcome, references, run_all
from sparcomm.bench.options import Parser

MEANING = {
    "kill": "killed (SIGKILL)", "stall": "stopped (SIGSTOP)", "raise": "raises in its own code",
    "hook": "raises in the hook's work", "leave": "returns and ends", "close": "closes its hook",
    "differ": "configured differently", "all": "all",
}  # fmt: skip


def row(kind: str, outcomes: list[Outcome]) -> dict[str, Any]:
    """What the table says of some injections. ``named``: share of survivors whose error names the rank."""
    seconds = [s for o in outcomes for s in o.seconds.values()]
    return {
        "kind": kind,
        "injections": len(outcomes),
        "in_time": sum(not (o.hangs or o.late) and len(o.seconds) == o.survivors for o in outcomes),
        "hangs": sum(bool(o.hangs) for o in outcomes),
        "wrong": sum(bool(o.wrongs) for o in outcomes),
        "unclean": sum(bool(o.unclean) for o in outcomes),
        "survivors": sum(o.survivors for o in outcomes),
        "named": sum(o.named for o in outcomes),
        "misnamed": sum(o.misnamed for o in outcomes),
        "median_seconds": round(statistics.median(seconds), 3) if seconds else None,
        "max_seconds": round(max(seconds), 3) if seconds else None,
    }


def rows(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """One row per kind, and one of all."""
    kinds = [k for k in KINDS if any(o.plan.kind == k for o in outcomes)]
    return [*(row(k, [o for o in outcomes if o.plan.kind == k]) for k in kinds), row("all", outcomes)]


def show(outcomes: list[Outcome], title: str) -> None:
    """Prints the table."""
    table = Table(title=title, title_justify="left")
    for name in ("what happens to one rank", "injections", "in time", "hangs", "silent wrongs", "unclean exits",
                 "named", "misnamed", "median s", "max s"):  # fmt: skip
        table.add_column(name, justify="left" if name.startswith("what") else "right")
    lines = rows(outcomes)
    for r in lines:
        table.add_row(
            MEANING[r["kind"]], str(r["injections"]), str(r["in_time"]), str(r["hangs"]), str(r["wrong"]),
            str(r["unclean"]), f"{r['named']}/{r['survivors']}", str(r["misnamed"]), f"{r['median_seconds']}",
            f"{r['max_seconds']}", end_section=r is lines[-2:][0],
        )  # fmt: skip
    Console(width=140).print(table)


def tell(outcome: Outcome) -> None:
    """Prints all that is known of one injection."""
    print(f"{outcome.plan}")
    for what in ("hangs", "wrongs", "unclean", "late"):
        for line in getattr(outcome, what):
            print(f"    {what}: {line}")
    for rank, text in sorted(outcome.texts.items()):
        print(f"    rank {rank} after {outcome.seconds[rank]:.2f} s: {text}")
    sys.stdout.flush()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(prog="sparcomm bench faults", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--count", type=int, default=200, help="injections")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--timeout", type=float, default=3.0, help="of the hook, in seconds")
    parser.add_argument("--slack", type=float, default=8.0, help="seconds beyond the timeout that are not a hang yet")
    parser.add_argument("--at-once", type=int, default=2, help="worlds that run at the same time")
    parser.add_argument("--flaw", choices=["patient", "leaky"], default="", help="break the hook, to test this bench")
    parser.add_argument("--verbose", action="store_true", help="print every injection, not only those that went wrong")
    parser.add_argument("--json", action="store_true", help="one object a line: one per kind, and one of all")
    args = parser.parse_args(argv)
    if args.ranks < 2 or args.count < 1 or args.at_once < 1 or min(args.timeout, args.slack) <= 0:
        parser.error("needs --ranks of at least 2, --count and --at-once of at least 1, positive --timeout and --slack")
    return args


def inject(args: argparse.Namespace, outcomes: list[Outcome]) -> None:
    """Runs all injections, and adds what comes of each to ``outcomes`` as it comes."""
    plans = draw(args.count, args.seed, args.kinds, args.ranks, args.timeout, args.flaw)
    with Forks() as forks:
        undisturbed = references(forks, args.ranks)
        for world in run_all(forks, plans, args.at_once, args.slack):
            outcomes.append(world.outcome(undisturbed))
            if args.verbose or (outcomes[-1].bad and not args.json):
                tell(outcomes[-1])


def main(argv: list[str] | None = None) -> None:
    """Injects, prints the table, and exits with 1 if anything went wrong; with 130 if it was interrupted."""
    args = parse(argv)
    begun, outcomes, whole = time.monotonic(), list[Outcome](), True
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        inject(args, outcomes)
    except KeyboardInterrupt:
        whole = False
    if args.json:
        for r in rows(outcomes):
            print(json.dumps(r))
    else:
        seconds = time.monotonic() - begun
        what = f"{len(outcomes)} of {args.count} faults, {args.ranks} ranks, seed {args.seed}"
        show(outcomes, f"{what}, hook timeout {args.timeout:g} s, in {seconds:.0f} s")
    sys.exit(130 if not whole else int(any(o.bad for o in outcomes)))


if __name__ == "__main__":
    main()
