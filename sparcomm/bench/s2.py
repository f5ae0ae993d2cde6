"""Where S2Reducer sends least: bytes of a steady step by ranks, density and overlap, beside its rivals.

    sparcomm bench s2 [--numel 4194304] [--sizes 2,4,8,16] [--densities 0.001,0.01,0.1] [--overlaps 0,0.5,1]
    sparcomm bench s2 --widths 64 --sizes 8 --latency 0.0001 --bandwidth 125000000

Worked out from ``cost()`` and the sizes of bags, without a network. Every rank has the same number of non-zero keys
(elements, or rows of --widths elements), a share of which all ranks have and the others nobody else. docs/bench.md
explains the columns.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from sparcomm import wire
from sparcomm.algorithms import registry
from sparcomm.bench.options import Parser, at_least, check_png, positive, several, share
from sparcomm.codecs.packet import Packet
from sparcomm.collectives.dense import dense_traffic, log2_ceil
from sparcomm.density import quota

EXACT = ("compact", "peel", "topk", "rows", "raw", "dense")
WAYS = ("projection", *EXACT)
RATIOS = ("peel/raw", "peel/topk", "projection/raw")
COLORS = ("#4477aa", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb")  # of EXACT
WIDTH = 165


class Row(NamedTuple):
    """One case.

    Attributes:
        numel, width, size, density, overlap: what it is.
        union: keys that any rank has.
        bytes_sent: of a rank in a steady step, by way. seconds: on the link.
    """

    numel: int
    width: int
    size: int
    density: float
    overlap: float
    union: int
    bytes_sent: dict[str, int]
    seconds: dict[str, float]

    def best(self, by: dict[str, Any]) -> str:
        """The exact way with the least of it."""
        return min(EXACT, key=by.__getitem__)


def union_of(keys: int, k: int, overlap: float, size: int) -> int:
    """Keys in the union: of each rank's k the share ``overlap`` counts once, the others count once a rank."""
    common = round(overlap * k)
    return min(keys, common + size * (k - common))


def row(n: int, width: int, size: int, density: float, overlap: float, latency: float, bandwidth: float) -> Row:
    """What every way sends."""
    keys = -(-n // width)
    k = quota(density, keys)
    union, filled = union_of(keys, k, overlap, size), min(n, k * width)
    s2: Any = registry()["s2"]
    state = s2().init(n, torch.float32, torch.device("cpu"), size)
    state.union, state.crest, state.peak = union, union, 0
    found: dict[str, tuple[int, int, int]] = {}
    for way in ("projection", "peel", "compact"):
        planner = s2(decoder=way, granularity=width).planner(n, torch.float32, size)
        found[way] = planner.usual(state)
    rounds = log2_ceil(size)
    bag = wire.WORD * (wire.HEADER_WORDS + Packet(filled, n).words)
    found["topk"] = (rounds, rounds, (size - 1) * bag)
    found["rows"] = (rounds, rounds, (size - 1) * (4 * k + 4 * filled))
    found["raw"] = (rounds, rounds, (size - 1) * 8 * filled)
    found["dense"] = dense_traffic(n, 4, size)
    sent = {way: traffic[2] for way, traffic in found.items()}
    seconds = {way: traffic[0] * latency + traffic[2] / bandwidth for way, traffic in found.items()}
    return Row(n, width, size, density, overlap, union, sent, seconds)


def rows(options: Any) -> Iterator[Row]:
    """All cases."""
    for case in itertools.product(options.widths, options.sizes, options.densities, options.overlaps):
        yield row(options.numel, *case, options.latency, options.bandwidth)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table for each width, or a JSON object for each case; draws who sends least."""
    options = parse(argv)
    found = list(rows(options))
    if options.json:
        for case in found:
            fewest, fastest = case.best(case.bytes_sent), case.best(case.seconds)
            print(json.dumps({**case._asdict(), "fewest_bytes": fewest, "fastest": fastest}))
    else:
        for width in options.widths:
            Console(width=WIDTH).print(table([case for case in found if case.width == width], options))
    if options.png is not None:
        draw(found, options.png)


def parse(argv: Sequence[str] | None) -> Any:
    """What was typed. Raises ConfigError, naming what is wrong."""
    lines = (__doc__ or "").partition("\n\n")
    made = Parser(prog="sparcomm bench s2", description=lines[0], epilog=lines[2])
    add = made.add_argument
    add("--numel", type=at_least(1), default=4_194_304, metavar="N", help="elements of the gradient (4194304)")
    add("--widths", type=several(at_least(1)), default=(1, 64), metavar="W,...", help="elements of a key (1,64)")
    add("--sizes", type=several(at_least(1)), default=(2, 4, 8, 16), metavar="P,...", help="ranks (2,4,8,16)")
    add("--densities", type=several(share), default=(0.001, 0.01, 0.1), metavar="D,...",
        help="share of the keys that a rank has (0.001,0.01,0.1)")  # fmt: skip
    add("--overlaps", type=several(_part), default=(0.0, 0.5, 1.0), metavar="O,...",
        help="share of these that all ranks have (0,0.5,1)")  # fmt: skip
    add("--latency", type=positive, default=1e-4, metavar="s", help="of a round, for the fastest way (0.0001)")
    add("--bandwidth", type=positive, default=125e6, metavar="B/s", help="of a rank's link (125000000)")
    add("--json", action="store_true", help="one JSON object a line")
    add("--png", type=Path, metavar="FILE", help="draw which way sends least (needs matplotlib)")
    options = made.parse_args(argv)
    if options.png is not None:
        check_png(options.png)
    return options


def table(found: Sequence[Row], options: Any) -> Table:
    """Bytes of every way for keys of one width, and which sends least."""
    width = found[0].width
    kind = "keys are elements" if width == 1 else f"keys are rows of {width}"
    link = f"fastest: {1e3 * options.latency:g} ms a round, {8 * options.bandwidth / 1e6:g} Mbit/s"
    made = Table(title=f"kB sent by a rank, n = {options.numel:,}, {kind}; {link}", title_justify="left")
    for name in ("p", "density", "overlap", "union", *WAYS, "fewest", "fastest", *RATIOS):
        made.add_column(name, justify="left" if name in ("fewest", "fastest") else "right", no_wrap=True)
    for at, case in enumerate(found):
        sent = case.bytes_sent
        ratios = ("-" if not sent[b] else f"{sent[a] / sent[b]:.2f}" for a, b in (r.split("/") for r in RATIOS))
        last = at + 1 == len(found) or (found[at + 1].size, found[at + 1].density) != (case.size, case.density)
        made.add_row(
            str(case.size), f"{case.density:g}", f"{case.overlap:g}", f"{case.union:,}",
            *(f"{sent[way] / 1e3:,.0f}" for way in WAYS), case.best(sent), case.best(case.seconds), *ratios,
            end_section=last,
        )  # fmt: skip
    return made


def draw(found: Sequence[Row], path: Path) -> None:
    """A map for each width and number of ranks: the exact way that sends least, by density and overlap."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    widths, sizes, densities, overlaps = (
        sorted({getattr(case, name) for case in found}) for name in ("width", "size", "density", "overlap")
    )
    figure = Figure(figsize=(2 + 2.6 * len(sizes), 1.2 + 2.4 * len(widths)), layout="constrained")
    panels: Any = figure.subplots(len(widths), len(sizes), squeeze=False)
    best = {(c.width, c.size, c.density, c.overlap): EXACT.index(c.best(c.bytes_sent)) for c in found}
    for (i, width), (j, size) in itertools.product(enumerate(widths), enumerate(sizes)):
        cells = [[best[width, size, d, o] for d in densities] for o in overlaps]
        axes = panels[i][j]
        axes.imshow(cells, cmap=ListedColormap(COLORS), vmin=-0.5, vmax=len(EXACT) - 0.5, origin="lower", aspect="auto")
        axes.set(title=f"p = {size}, " + ("elements" if width == 1 else f"rows of {width}"))
        axes.set_xticks(range(len(densities)), [f"{d:g}" for d in densities])
        axes.set_yticks(range(len(overlaps)), [f"{o:g}" for o in overlaps])
    figure.supxlabel("density")
    figure.supylabel("overlap")
    used = sorted(set(best.values()))
    figure.legend(handles=[Patch(color=COLORS[i], label=EXACT[i]) for i in used], loc="outside upper center", ncols=6)
    figure.savefig(path, dpi=150)


def _part(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], got {text!r}")
    return number


if __name__ == "__main__":
    main()
