"""The CUDA text on a real device: compiled by NVRTC for it on first use, cached on disk, launched on torch's stream.

CuPy's own way from text to module adds ``-ftz=true``, after which subnormal sums would be zero here and nowhere else;
so the text is compiled without it, and CuPy loads the result.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cupy
import torch
from cupy.cuda import nvrtc

from sparcomm.errors import SparcommError
from sparcomm.kernels.cuda import texts
from sparcomm.kernels.cuda.launch import THREADS, Argument, plain
from sparcomm.kernels.folder import fallback_folder, is_private


@dataclass(frozen=True)
class _Stream:
    """A stream as CuPy's launch wants it: anything with a ``ptr``."""

    ptr: int


class Gpu:
    """Runs kernels on CUDA devices: see ``launch.Launcher``. Thread-safe."""

    def __init__(self) -> None:
        self._functions: dict[tuple[Any, ...], Any] = {}
        self._compiling = threading.Lock()

    def multiprocessors(self, device: torch.device) -> int:
        """As the device says."""
        return _multiprocessors(device)

    def launch(
        self,
        text: str,
        kernel: str,
        options: tuple[str, ...],
        grid: int,
        arguments: Sequence[Argument],
        device: torch.device,
    ) -> None:
        """On torch's current stream of ``device``."""
        with torch.cuda.device(device):
            index = torch.cuda.current_device()
            function = self._functions.get((text, kernel, options, index))
            if function is None:
                function = self._function(text, kernel, options, index)
            stream = _Stream(torch.cuda.current_stream(index).cuda_stream)
            function((grid,), (THREADS,), tuple(map(plain, arguments)), stream=stream)

    def _function(self, text: str, kernel: str, options: tuple[str, ...], index: int) -> Any:
        with self._compiling:
            module = _module(text, options, _arch(index))
            # The kernel itself, of this device: a RawKernel would ask for the device at every launch.
            return self._functions.setdefault((text, kernel, options, index), module.get_function(kernel).kernel)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _arch(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{major}{minor}"


@functools.cache
def _module(text: str, options: tuple[str, ...], arch: str) -> Any:
    """The compiled text, from the disk cache if it is there."""
    source = texts.source(text)
    options = (*texts.OPTIONS, *_target(arch), *options)
    key = repr((source, options, nvrtc.getVersion()))
    path = cache_folder() / f"{text}-sm{arch}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"
    if not path.is_file():
        image = compiled(f"{text}.cu", source, options)
        # Under a name of its own first: ranks of one host may be compiling the same.
        partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        partial.write_bytes(image)
        partial.replace(path)
    return cupy.RawModule(path=str(path))


def _target(arch: str) -> tuple[str, ...]:
    """Machine code of the device; for one that is newer than the compiler PTX, which its driver translates."""
    known = [str(a) for a in nvrtc.getSupportedArchs()]
    if arch in known:
        return (f"-arch=sm_{arch}",)
    older = [a for a in known if int(a) < int(arch)]
    if not older:
        raise SparcommError(f"compute capability {arch}: this CUDA compiles for {', '.join(known)} only")
    return (f"-arch=compute_{max(older, key=int)}",)


def compiled(name: str, source: str, options: tuple[str, ...]) -> bytes:
    """Machine code; PTX if ``options`` name a virtual architecture. Raises SparcommError with the compiler's words."""
    program = nvrtc.createProgram(source, name, (), ())
    try:
        nvrtc.compileProgram(program, options)
        virtual = any(option.startswith("-arch=compute_") for option in options)
        return nvrtc.getPTX(program) if virtual else nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise SparcommError(f"{name} {' '.join(options)} does not compile: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


@functools.cache
def cache_folder() -> Path:
    """Where compiled text is kept: ``~/.cache/sparcomm``, or under the temporary folder if that is not ours alone."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparcomm"
    return usual if is_private(usual) else fallback_folder()
