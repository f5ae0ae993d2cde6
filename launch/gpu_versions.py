#!/usr/bin/env python3
"""Says what a GPU check runs on: versions, the device, its driver. Ends with 1 if it cannot run at all."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys

import torch

NEEDED = ("torch", "numpy", "numba", "pytest")
PACKAGES = (*NEEDED, "hypothesis", "pydantic", "rich", "typer", "matplotlib")
DRIVER = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.mem", "--format=csv")


def version(package: str) -> str:
    """Of an installed package; "-" if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def cupy_version() -> str:
    """CuPy has a package for each major version of CUDA."""
    names = [name for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy") if version(name) != "-"]
    return " ".join(f"{name} {version(name)}" for name in names) or "-"


def main() -> int:
    """Prints it all."""
    print(f"Python {platform.python_version()}, {platform.platform()}")
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES) + f", CuPy: {cupy_version()}")
    missing = [name for name in NEEDED if version(name) == "-"] + (["cupy"] if cupy_version() == "-" else [])
    print(f"CUDA {torch.version.cuda or '-'} of PyTorch")
    if shutil.which(DRIVER[0]):
        print(subprocess.run(DRIVER, capture_output=True, text=True, check=False).stdout.strip())
    if not torch.cuda.is_available():
        print("error: PyTorch finds no CUDA device", file=sys.stderr)
        return 1
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        capability, memory = f"{device.major}.{device.minor}", device.total_memory / (1 << 30)
        print(
            f"{number}: {device.name}, {capability}, {memory:.0f} GiB, {device.multi_processor_count} multiprocessors"
        )
    if missing:
        print(f"error: missing: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
