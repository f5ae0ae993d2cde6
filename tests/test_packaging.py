"""What lies in the wheel: the package, the CUDA text, the type marker; and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sparcomm

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    # Without isolation: the installed hatchling builds, and no network is needed.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env={**os.environ, "NO_COLOR": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def sources(folder: str) -> set[str]:
    """Files below ``folder`` that belong into the wheel, relative to it."""
    skipped = {".pyc", ".nbi", ".nbc"}
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in skipped)
    return {path.relative_to(ROOT / folder).as_posix() for path in files}


def test_the_whole_package_is_inside(wheel: zipfile.ZipFile) -> None:
    packed = {name.removeprefix("sparcomm/") for name in wheel.namelist() if name.startswith("sparcomm/")}
    cuda = {f"csrc/{name}" for name in sources("csrc")}
    assert cuda, "csrc/ must not be empty"
    assert packed == sources("sparcomm") | cuda
    assert "py.typed" in packed


def test_nothing_else_is_inside(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"sparcomm", f"sparcomm-{sparcomm.__version__}.dist-info"}


def test_metadata(wheel: zipfile.ZipFile) -> None:
    folder = f"sparcomm-{sparcomm.__version__}.dist-info"
    metadata = wheel.read(f"{folder}/METADATA").decode()
    assert "Requires-Python: >=3.10" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    for extra in ("mpi", "cuda12", "cuda13", "tensorboard", "train", "dev"):
        assert f"Provides-Extra: {extra}\n" in metadata
    assert "sparcomm = sparcomm.cli:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    assert f"{folder}/licenses/LICENSE" in wheel.namelist()


def test_the_constraints_are_pins() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert "torch==2.13.0" in lines
    for line in lines:
        assert re.fullmatch(r'[\w.-]+==[\w.+]+( ; python_version >= "3\.\d+")?', line), line
    names = [line.split("==")[0].lower() for line in lines]
    assert len(names) == len(set(names))
