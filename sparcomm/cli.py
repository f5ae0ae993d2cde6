"""The ``sparcomm`` command: what there is, how fast the parts run here, and whether they work."""

from __future__ import annotations

import ast
import json
import os
import pkgutil
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import sparcomm
from sparcomm import bench as bench_package
from sparcomm import selectors
from sparcomm.algorithms import registry
from sparcomm.algorithms.base import Algorithm
from sparcomm.config import algorithm_suggestion, settings, suggestion
from sparcomm.errors import ConfigError, SparcommError
from sparcomm.selectors import Selector

EXIT_USAGE: Final = 2
MAIN_BENCH: Final = "sync"  # what `sparcomm bench` runs without a name

app = typer.Typer(
    name="sparcomm",
    help="Sparse all-reduce for data-parallel PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def benches() -> dict[str, str]:
    """Benchmarks and what they show: modules of ``sparcomm.bench`` that define ``main``, found without an import."""
    found: dict[str, str] = {}
    for path in map(Path, bench_package.__path__):
        for module in pkgutil.iter_modules([str(path)]):
            tree = ast.parse((path / f"{module.name}.py").read_text(encoding="utf-8")) if not module.ispkg else None
            if tree and any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
                found[module.name] = (ast.get_docstring(tree) or "").partition("\n\n")[0].translate({10: " ", 96: None})
    return dict(sorted(found.items()))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sparcomm {sparcomm.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version  # the callback has printed it


@app.command("list")
def list_(
    names: Annotated[list[str] | None, typer.Argument(help="Of these only.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Name the algorithms and selectors with their fields, types, defaults and allowed values."""
    known: dict[str, dict[str, Any]] = {"algorithms": registry(), "selectors": selectors.registry()}
    every = sorted({name for classes in known.values() for name in classes})
    for name in names or []:
        if name not in every:
            listed = ", ".join(map(repr, every))
            raise ConfigError(f"nothing is called {name!r}{algorithm_suggestion(name, every)}: must be one of {listed}")
    found = {
        kind: [describe(name, cls) for name, cls in classes.items() if not names or name in names]
        for kind, classes in known.items()
    }
    if as_json:
        typer.echo(json.dumps(found, indent=2, default=str))
        return
    console = Console()
    for title, entries in found.items():
        if entries:
            console.print(f"[bold]{title}[/bold]")
        for entry in entries:
            name = f"[bold]{entry['name']}[/bold] ({entry['class']})"
            console.print(f"{name}: {escape(entry['doc'])}", highlight=False)
            console.print(_table(entry) if entry["fields"] else "")


def describe(name: str, cls: type[Algorithm] | type[Selector]) -> dict[str, Any]:
    """What ``sparcomm list --json`` says of one algorithm or selector."""
    rows = [{**s._asdict(), "default": _plain(s.default), "allowed": list(s.allowed)} for s in settings(cls)]
    return {"name": name, "class": cls.__name__, "doc": (cls.__doc__ or "").strip().split("\n")[0], "fields": rows}


def _table(entry: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("field", "default", "meaning"):
        table.add_column(heading, no_wrap=heading != "meaning")
    for row in entry["fields"]:
        table.add_row(*map(escape, (str(row["name"]), _default(row), f"{row['type']}: {_meaning(row)}")))
    return table


def launched() -> bool:
    """Whether a launcher has started this process, alone or as one of many."""
    from sparcomm.launch.environment import detect

    return detect(os.environ).launcher != "none"


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Measure on this network; or one of the other benchmarks, by its name. Without options: what there is."""
    known, arguments = benches(), context.args
    if arguments[:1] in (["-h"], ["--help"]) or (not arguments and not launched()):
        typer.echo("others: sparcomm bench NAME [options], with NAME one of")
        for name, shows in known.items():
            typer.echo(f"  {name:<11}{shows}")
        typer.echo()
        arguments = ["--help"]
    name = MAIN_BENCH
    if arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
    if name not in known:
        listed = ", ".join(known)
        raise ConfigError(f"unknown benchmark {name!r}{suggestion(name, known)}: must be one of {listed}")
    import_module(f"{bench_package.__name__}.{name}").main(arguments)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    tests: Annotated[bool, typer.Option(help="Whether to run the self-tests.")] = True,
) -> None:
    """Say what there is here, what is missing for what, and whether it works. Ends with 1 if a self-test fails."""
    from sparcomm import doctor as doctor_package  # loads torch
    from sparcomm.doctor import report

    found = doctor_package.facts()
    absent = doctor_package.missing(found)
    checks = doctor_package.self_tests() if tests else iter(())
    if as_json:
        done = list(checks)
        listed = {"missing": [m._asdict() for m in absent], "self-tests": [asdict(check) for check in done]}
        typer.echo(json.dumps({**found, **listed}, indent=2))
    else:
        console = Console()
        report.show(console, found, absent)
        done = report.show_tests(console, checks) if tests else []
    if any(check.passed is False for check in done):
        raise typer.Exit(1)


def _plain(default: Any) -> Any:
    """A default as a configuration would give it."""
    if not isinstance(default, Algorithm):
        return default
    return {"name": default.name, **{key: _plain(value) for key, value in default.fields().items()}}


def _default(row: dict[str, Any]) -> str:
    default: Any = row["default"]
    if isinstance(default, dict):
        return str(default["name"])
    return "(required)" if row["required"] else repr(default)


def _meaning(row: dict[str, Any]) -> str:
    allowed = ", ".join(map(repr, row["allowed"]))
    return str(row["doc"]) or (f"one of {allowed}" if allowed else "")


def main() -> None:
    """Entry point: an error that sparcomm raises on purpose is one line, not a traceback."""
    try:
        app()
    except SparcommError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
