"""Runs the CUDA text of ``csrc/`` on CPU tensors, compiled by g++ behind ``cuda_on_host.h``: its tests need no GPU.

What a CPU cannot show: the order in which a GPU's memory sees writes, and speed. What it does show: every index, every
bit of arithmetic, barriers that not all threads reach, results that depend on who comes first, accesses of two threads
that nothing orders (``watch.h``), and accesses outside of the arguments' tensors.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparcomm.kernels.cuda import launch, texts
from sparcomm.kernels.folder import is_private

HERE = Path(__file__).parent
MULTIPROCESSORS = 2
# Undefined arithmetic and misaligned accesses end the process with the line that made them.
FLAGS = (
    "-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-w",
    "-fsanitize=shift,signed-integer-overflow,integer-divide-by-zero,bounds,alignment", "-fno-sanitize-recover=all",
)  # fmt: skip
# Every access calls a function of watch.h. The linker must not hear of it: it would add ThreadSanitizer itself.
WATCH = ("-fsanitize=thread", "--param", "tsan-distinguish-volatile=1", "--param", "tsan-instrument-func-entry-exit=0")


def available() -> bool:
    """Whether there is a compiler."""
    return shutil.which("g++") is not None


def build() -> None:
    """Compiles all texts that have not been compiled yet on this machine: 40 s on one core."""
    for text, types in texts.variants():
        _library(text, texts.macros(types))


class Emulator:
    """A ``launch.Launcher`` for CPU tensors.

    Attributes:
        seed: who goes on when; 0 = in order.
    """

    def __init__(self, seed: int = 1) -> None:
        self.seed = seed

    def multiprocessors(self, device: torch.device) -> int:
        """Few, so that blocks have several turns of their loops."""
        return MULTIPROCESSORS

    def launch(
        self,
        text: str,
        kernel: str,
        options: tuple[str, ...],
        grid: int,
        arguments: Sequence[launch.Argument],
        device: torch.device,
    ) -> None:
        """Runs the kernel to its end. Raises RuntimeError if its threads do what on a GPU must not happen."""
        library = _library(text, options)
        index = _kernels(text).index(kernel)
        takes = library.sparcomm_takes(index)
        if takes != len(arguments):
            raise RuntimeError(f"kernel {kernel} of {text}.cu takes {takes} arguments, not {len(arguments)}")
        plain = [launch.plain(a) for a in arguments]
        words = [struct.pack("d", a) if isinstance(a, float) else struct.pack("q", a) for a in plain]
        held = ctypes.create_string_buffer(b"".join(words), 8 * len(words))
        pointers = (ctypes.c_void_p * len(words))(*(ctypes.addressof(held) + 8 * i for i in range(len(words))))
        ranges = [_range(a) for a in arguments if isinstance(a, torch.Tensor) and a.numel()]
        bounds = (ctypes.c_ulonglong * (2 * len(ranges)))(*(end for both in ranges for end in both))
        trouble = library.sparcomm_run(index, pointers, bounds, len(ranges), grid, self.seed)
        if trouble:
            raise RuntimeError(f"kernel {kernel} of {text}.cu {' '.join(options)}: {trouble.decode()}")


emulator = Emulator()
launch.launchers["cpu"] = emulator


@contextmanager
def schedule(seed: int) -> Iterator[None]:
    """Within it threads run in the order that ``seed`` gives."""
    before, emulator.seed = emulator.seed, seed
    try:
        yield
    finally:
        emulator.seed = before


def _range(t: torch.Tensor) -> tuple[int, int]:
    """Where a tensor begins and ends, in whole words: narrower numbers are changed atomically by the word."""
    begin, elements = t.data_ptr(), 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return begin & ~3, (begin + elements * t.element_size() + 3) & ~3


@functools.cache
def _kernels(text: str) -> list[str]:
    return re.findall(r"^KERNEL (\w+)\(", texts.source(text), flags=re.MULTILINE)


@functools.cache
def _library(text: str, options: tuple[str, ...]) -> Any:
    names = _kernels(text)
    calls = "".join(f"case {i}: emulator::call(&{name}, args); break;\n" for i, name in enumerate(names))
    takes = "".join(f"case {i}: return emulator::count(&{name});\n" for i, name in enumerate(names))
    source = f"""#include "cuda_on_host.h"
{texts.source(text)}
static int chosen;
UNWATCHED static void body(void** args) {{ switch (chosen) {{ {calls} }} }}
#define SEEN extern "C" __attribute__((visibility("default")))
SEEN int sparcomm_takes(int kernel) {{
    switch (kernel) {{ {takes} }}
    return -1;
}}
static std::mutex turn;
SEEN const char* sparcomm_run(int kernel, void** args, watch::Range* tensors, int count, unsigned blocks,
                              unsigned long long seed) {{
    std::lock_guard<std::mutex> guard(turn);
    static unsigned launches[{len(names)}];
    chosen = kernel;
    watch::tensors = tensors, watch::tensor_count = count;
    return emulator::run(body, args, blocks, seed, launches[kernel]++);
}}
"""
    library = ctypes.CDLL(str(_built(text, source, options)))
    library.sparcomm_run.restype = ctypes.c_char_p
    library.sparcomm_run.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_ulonglong
    ]  # fmt: skip
    return library


def _built(text: str, source: str, options: tuple[str, ...]) -> Path:
    """The shared library of a source, compiled once for all processes of this machine."""
    folder = Path(tempfile.gettempdir()) / f"sparcomm-emulator-{os.getuid()}"
    assert is_private(folder), folder
    headers = [path.read_text() for path in sorted(HERE.glob("*.h"))]
    name = hashlib.sha256("\0".join([*headers, source, *options, *FLAGS, *WATCH]).encode()).hexdigest()[:24]
    path = folder / f"{text}-{name}.so"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            own, partial = path.with_suffix(".cpp"), path.with_suffix(".part")
            own.write_text(source)
            _call("g++", *FLAGS, *WATCH, *options, f"-I{HERE}", "-c", "-o", str(path.with_suffix(".o")), str(own))
            _call("g++", *FLAGS, "-shared", "-o", str(partial), str(path.with_suffix(".o")))
            partial.replace(path)
    return path


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[:4000]}")
