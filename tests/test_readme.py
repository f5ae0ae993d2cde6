"""What the README says is there, and its example runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparcomm.algorithms import registry
from sparcomm.algorithms.s2 import S2Reducer

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")

# What the example leaves to the reader.
BEFORE = """
import torch

torch.manual_seed(0)
model = torch.nn.Linear(300, 7)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loss_function, x, y = torch.nn.functional.mse_loss, torch.randn(8, 300), torch.randn(8, 7)
"""
AFTER = """
parts = [torch.empty_like(model.weight) for _ in range(dist.get_world_size())]
dist.all_gather(parts, model.weight.detach())
assert all(torch.equal(part, parts[0]) for part in parts)
assert state.stats()["steps"] == 1
assert 0 < state.stats()["bytes_sent"] < 4 * 7 * 300
state.close()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.torchrun
def test_the_example_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "example.py").write_text(BEFORE + example + AFTER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [*torchrun, "example.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.glob("*.pt")} == {"hook-0.pt", "hook-1.pt"}


def test_it_points_at_what_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    files = re.findall(r"(?:launch|configs)/[\w.-]+\.\w+", TEXT)
    assert links
    assert files
    assert [path for path in (*links, *files) if not (ROOT / path).exists()] == []
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"setup", "demo", "test", "check", "bench", "clean"} <= targets
    assert set(re.findall(r"make (\w+)", TEXT)) <= targets


def test_its_map_is_the_tree() -> None:
    rows = re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([\w./]+)`", row)]
    lost = [n for n in named if not any((ROOT / folder / n).exists() for folder in (".", "sparcomm"))]
    assert lost == []
    packages = {p.name for p in (ROOT / "sparcomm").iterdir() if (p / "__init__.py").exists()}
    assert packages <= {part for name in named for part in name.split("/")}


def test_the_table_of_algorithms_is_that_of_the_registry() -> None:
    text = (
        (ROOT / "docs/tuning.md").read_text(encoding="utf-8").partition("## Which algorithm")[2].partition("\n## ")[0]
    )
    rows = re.findall(r"^\| `([\w-]+)` \| `(\w+)` \|[^|]*\| ([\d.]*) ?\|", text, re.MULTILINE)
    assert {name: cls for name, cls, _ in rows} == {name: cls.__name__ for name, cls in registry().items()}
    made = {**{name: registry()[name]() for name, *_ in rows}, "s2": S2Reducer(0.01, "compact")}
    for name, _, megabytes in rows:
        if name != "hierarchical":  # whose bytes are those of what is in it
            assert megabytes == f"{made[name].cost(4_194_304, torch.float32, 8).bytes_sent / 1e6:.3f}", name


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_pages_point_at_what_exists(page: Path) -> None:
    for link in re.findall(r"\]\(([^):]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert not heading or heading in [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles], link
