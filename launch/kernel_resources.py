#!/usr/bin/env python3
"""Compiles the CUDA text with nvcc, and prints what each kernel takes of a GPU: registers, spills, shared memory.

    python launch/kernel_resources.py [--archs 75,80,90,120] [--texts select,signs] [--quick]

No GPU is needed. Every text of csrc/ is compiled for every combination of dtypes that sparcomm/kernels/cuda/texts.py
declares, with warnings as errors, spilled registers included. With --quick combinations but the first of each text
are compiled for compute capability 7.5 only once, and that is assembled for the others: most of the time goes there.
"""

from __future__ import annotations

import argparse
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from sparcomm.kernels.cuda import texts

ARCHS = (75, 80, 90, 120)
SHARED = 48 << 10  # bytes of static shared memory that a block may have
REGISTERS = 1 << 16  # of a multiprocessor
THREADS = 256  # of a block, as in csrc/common.cuh
STRICT = ("-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills")

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")


class CompileError(Exception):
    """nvcc refused a text; the message is its own."""


class Resources(NamedTuple):
    """What one kernel takes, by ptxas.

    Attributes:
        kernel, arch: its name, and for which compute capability (75 = 7.5).
        registers: of a thread.
        spilled: bytes of registers stored to and loaded from memory for want of room.
        stack: bytes of memory of a thread, which spilling takes, too.
        shared: static bytes of a block.
    """

    kernel: str
    arch: int
    registers: int
    spilled: int
    stack: int
    shared: int

    @property
    def wrong(self) -> list[str]:
        """What is too much of it, for blocks of THREADS threads."""
        found = [f"{self.spilled} bytes spilled"] if self.spilled else []
        if self.shared > SHARED:
            found.append(f"{self.shared} bytes of shared memory, at most {SHARED} are there")
        if self.registers * THREADS > REGISTERS:
            found.append(f"{self.registers} registers, of which {THREADS} threads have no room")
        return [f"{self.kernel} for sm_{self.arch}: {what}" for what in found]


@functools.cache
def nvcc() -> str | None:
    """The compiler, if there is one."""
    return shutil.which("nvcc")


@functools.cache
def known_archs() -> tuple[int, ...]:
    """Those of ARCHS that this nvcc compiles for."""
    listed = subprocess.run([nvcc() or "nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return tuple(arch for arch in ARCHS if f"compute_{arch}" in listed.split())


def compiled(name: str, source: str, options: Sequence[str], archs: Sequence[int], *, once: bool = False) -> str:
    """What nvcc and ptxas say of a text.

    Args:
        once: compile for the first arch only, and assemble that for all of them.

    Raises:
        CompileError: an error, or a warning.
    """
    if once:
        targets = ["-gencode", f"arch=compute_{archs[0]},code=[{','.join(f'sm_{a}' for a in archs)}]"]
    else:
        targets = [word for a in archs for word in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    with tempfile.TemporaryDirectory(prefix="sparcomm-nvcc-") as folder:
        path = Path(folder) / f"{name}.cu"
        path.write_text(source, encoding="utf-8")
        command = [nvcc() or "nvcc", *options, *STRICT, *targets, "-fatbin", "-o", f"{path}.fatbin", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def parse(report: str) -> Iterator[Resources]:
    """A row for each kernel and compute capability in ptxas' report. Raises ValueError for one that it cannot read."""
    kernel, arch, stack, spilled = "", 0, 0, 0
    for line in report.splitlines():
        if entry := _ENTRY.search(line):
            if kernel:
                raise ValueError(f"ptxas says nothing of {kernel}: {report}")
            kernel, arch = entry[1], int(entry[2])
        elif frame := _STACK.search(line):
            stack, spilled = int(frame[1]), int(frame[2]) + int(frame[3])
        elif used := _USED.search(line):
            yield Resources(kernel, arch, int(used[1]), spilled, stack, int(used[2] or 0))
            kernel = ""
    if kernel:
        raise ValueError(f"ptxas says nothing of {kernel}: {report}")


def resources(
    text: str, types: texts.Types, archs: Sequence[int] | None = None, *, once: bool = False
) -> list[Resources]:
    """Of all kernels of a text, for one combination of dtypes; ``archs``: those that nvcc knows."""
    options = (*texts.OPTIONS, *texts.macros(types))
    return list(parse(compiled(text, texts.source(text), options, archs or known_archs(), once=once)))


def label(types: texts.Types) -> str:
    """A combination of dtypes in a word."""
    return ",".join(f"{name}={texts.C_NAMES[dtype]}" for name, dtype in sorted(types.items())) or "-"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 1 if a text does not compile, or a kernel takes too much."""
    lines = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=lines[0], epilog=lines[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archs", default=",".join(map(str, ARCHS)), help="compute capabilities without their dots")
    parser.add_argument("--texts", default=",".join(texts.TEXTS), help="of csrc/ (all)")
    parser.add_argument("--quick", action="store_true", help="compile most combinations for one capability only")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time (2)")
    options = parser.parse_args(argv)
    if nvcc() is None:
        print("error: there is no nvcc on the PATH", file=sys.stderr)
        return 2
    archs = [arch for arch in known_archs() if str(arch) in options.archs.split(",")]
    wanted = [(text, types) for text, types in texts.variants() if text in options.texts.split(",")]
    if not archs or not wanted:
        print(f"error: nothing to do: archs of {known_archs()}, texts of {list(texts.TEXTS)}", file=sys.stderr)
        return 2
    print(f"{'text':<12} {'dtypes':<34} {'kernel':<20} sm   registers  spilled  stack  shared")
    wrong: list[str] = []

    def one(variant: tuple[str, texts.Types]) -> list[Resources] | CompileError:
        text, types = variant
        try:
            return resources(text, types, archs, once=options.quick and types is not texts.TEXTS[text][0])
        except CompileError as error:
            return error

    with ThreadPoolExecutor(options.jobs) as pool:
        for (text, types), found in zip(wanted, pool.map(one, wanted), strict=True):
            if isinstance(found, CompileError):
                wrong.append(f"{text} {label(types)}: {found}")
                continue
            for row in sorted(found):
                numbers = f"{row.registers:>9} {row.spilled:>8} {row.stack:>6} {row.shared:>7}"
                print(f"{text:<12} {label(types):<34} {row.kernel:<20} {row.arch:<4} {numbers}")
                wrong += row.wrong
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
