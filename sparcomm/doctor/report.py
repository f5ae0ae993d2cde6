"""The findings as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape

from sparcomm.doctor.missing import Missing
from sparcomm.doctor.selftest import Check

WIDTH = 34


def show(console: Console, found: dict[str, Any], absent: list[Missing]) -> None:
    """Prints what there is, and what is missing for what."""
    _block(console, "versions", {k: v or "-" for k, v in found["versions"].items()})
    _block(console, "devices", {d["device"]: _device(d) for d in found["devices"]})
    _block(console, "backends", {k: _yes(v) for k, v in found["backends"].items()})
    _block(console, "launchers", {k: v or "-" for k, v in found["launchers"].items()})
    _block(console, "capabilities", {k: _yes(v) for k, v in found["capabilities"].items()})
    _block(console, "this process", {"started by": found["started by"]})
    if found["problems"]:
        _block(console, "problems", dict.fromkeys(found["problems"], ""))
    if absent:
        _block(console, "missing", {m.what: f"for {m.needed_for}: {m.command}" for m in absent})


def show_tests(console: Console, checks: Iterable[Check]) -> list[Check]:
    """Prints each test as soon as it is done; returns them all."""
    console.print("[bold]self-tests[/bold]")
    done: list[Check] = []
    for check in checks:
        word = {True: "ok", False: "FAILED", None: "skipped"}[check.passed]
        _line(console, check.name, f"{word} ({check.seconds:.1f} s): {check.text}")
        done.append(check)
    return done


def _device(device: dict[str, Any]) -> str:
    if "memory" in device:
        return f"{device['name']}, {device['memory'] / (1 << 30):.0f} GiB"
    return f"{device['name']}, {device['cores']} cores"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _block(console: Console, title: str, lines: dict[str, str]) -> None:
    console.print(f"[bold]{title}[/bold]")
    for name, value in lines.items():
        _line(console, name, value)
    console.print()


def _line(console: Console, name: str, value: str) -> None:
    console.print(f"  {escape(f'{name:<{WIDTH}}')} {escape(value)}", highlight=False, soft_wrap=True)
