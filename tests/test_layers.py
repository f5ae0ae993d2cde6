"""The shape of the source, read with ``ast``: who may import whom, where each library lives, how long things get."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "sparcomm"
MAX_FILE, MAX_FUNCTION = 400, 60

LAYERS = (
    {"errors"},  # whatever fails needs them, so they come before everything
    {"dtypes", "wire", "layout", "sparse", "clock", "density", "workspace", "seeds", "threads"},
    {"kernels", "transport"},
    {"memory", "feedback", "codecs", "collectives", "selectors"},
    {"algorithms"},
    {"ddp", "fsdp", "optim", "mpi_backend", "config", "integrations"},
    {"launch"},  # starts torch.distributed with any backend, ours included
    {"bench", "plan", "doctor"},
    {"cli"},
    {"__main__", "__init__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Third-party module -> the files or packages (paths without suffix) that may import it.
HOMES = {
    "numba": ("kernels/cpu",),
    "llvmlite": ("kernels/cpu",),
    "cupy": ("kernels/cuda",),
    "mpi4py": ("transport/mpi", "mpi_backend"),
    "torch.distributed": (
        "transport/torchdist",
        "ddp",
        "mpi_backend",
        "bench/backends",
        "launch",
        "doctor/facts",
        "doctor/selftest",
        "bench/world",
        "bench/child",
        "bench/inside",
        "bench/overlap",
        "bench/torch_hooks",
    ),
    "pydantic": ("config",),
    "typer": ("cli",),
    "rich": ("cli", "bench", "doctor"),
}


def violations(root: Path) -> list[str]:
    """Everything in the package at ``root`` that breaks a rule, as ``path: what``."""
    found: list[str] = []
    for path in sorted(root.rglob("*.py")):
        where = path.relative_to(root)
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        complaints = [*_lengths(text, tree), *_homes(where, tree), *_layers(root, where, tree)]
        found += [f"{where.as_posix()}: {complaint}" for complaint in complaints]
    return found


def _lengths(text: str, tree: ast.AST) -> Iterator[str]:
    lines = len(text.splitlines())
    if lines > MAX_FILE:
        yield f"{lines} lines, at most {MAX_FILE} are allowed"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if (length := node.end_lineno - node.lineno + 1) > MAX_FUNCTION:
                yield f"{node.name} has {length} lines, at most {MAX_FUNCTION} are allowed"


def _imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that is imported anywhere in the file, ``from a import b`` as ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are banned by ruff"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _homes(where: Path, tree: ast.AST) -> Iterator[str]:
    here = where.with_suffix("").as_posix()
    for name in sorted(set(_imports(tree))):
        for library, homes in HOMES.items():
            inside = any(here == home or here.startswith(home + "/") for home in homes)
            if (name == library or name.startswith(library + ".")) and not inside:
                yield f"imports {name}, which only {' and '.join(homes)} may do"


def _layers(root: Path, where: Path, tree: ast.AST) -> Iterator[str]:
    own = where.parts[0].removesuffix(".py")
    if own not in LEVEL:
        yield f"{own} is in no layer; add it to LAYERS"
        return
    for name in sorted(set(_imports(tree))):
        first, *rest = name.split(".")
        if first != "sparcomm" or rest == ["__version__"]:
            continue
        target = rest[0] if rest and _is_module(root, rest[0]) else "__init__"
        if target == "__init__" and LEVEL[own] >= LEVEL["cli"]:
            continue  # the command and the public surface name the whole package
        if target not in LEVEL:
            yield f"imports {name}, which is in no layer; add it to LAYERS"
        elif target == own:
            yield from _algorithms(where, name, rest)
        elif LEVEL[target] >= LEVEL[own]:
            way = "sideways" if LEVEL[target] == LEVEL[own] else "up"
            yield f"imports {name}, {way}: {own} is in layer {LEVEL[own]}, {target} in layer {LEVEL[target]}"


def _algorithms(where: Path, name: str, rest: list[str]) -> Iterator[str]:
    """Algorithm files, or packages, know their base and nothing of each other."""
    if where.parts == ("algorithms", "__init__.py"):
        return
    own = [part.removesuffix(".py") for part in where.parts[1:2]]
    if rest[0] == "algorithms" and rest[1:2] not in (["base"], own):
        yield f"imports {name}, but algorithms import no other algorithm, only algorithms.base"


def _is_module(root: Path, name: str) -> bool:
    return (root / f"{name}.py").is_file() or (root / name).is_dir()


def test_the_package_keeps_its_layers() -> None:
    assert violations(ROOT) == []


def test_every_file_says_why_it_exists() -> None:
    trees = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}
    silent = [path for path, tree in trees.items() if not ast.get_docstring(tree)]
    assert silent == []


GOOD = {
    "__init__.py": "from sparcomm.ddp import attach",
    "errors.py": "",
    "wire.py": "from sparcomm.errors import SparcommError",
    "kernels/__init__.py": "from sparcomm import wire",
    "kernels/cpu/__init__.py": "import numba\nfrom numba import njit\nfrom sparcomm.kernels import reference",
    "kernels/reference.py": "import torch",
    "transport/torchdist.py": "import torch.distributed as dist",
    "algorithms/__init__.py": "from sparcomm.algorithms.base import Algorithm",
    "algorithms/base.py": "from sparcomm.kernels import reference",
    "algorithms/dense.py": "from sparcomm.algorithms.base import Algorithm",
    "algorithms/some/__init__.py": "from sparcomm.algorithms.some.part import x",
    "algorithms/some/part.py": "from sparcomm.algorithms.base import Algorithm",
    "ddp/__init__.py": "from sparcomm.ddp.hook import hook\nfrom torch import distributed",
    "ddp/hook.py": "from sparcomm.algorithms import dense\nfrom sparcomm import __version__",
    "cli.py": "import sparcomm\nfrom sparcomm import bench",
    "bench/__init__.py": "",
}


def _tree(root: Path, changed: dict[str, str]) -> Path:
    for name, text in {**GOOD, **changed}.items():
        path = root / "sparcomm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "sparcomm"


def test_a_good_tree_has_no_violations(tmp_path: Path) -> None:
    assert violations(_tree(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("errors.py", "from sparcomm import wire", "up"),
        ("kernels/reference.py", "from sparcomm.algorithms.base import Algorithm", "up"),
        ("kernels/reference.py", "from sparcomm.transport import torchdist", "sideways"),
        ("kernels/reference.py", "def f():\n    import sparcomm.ddp.hook", "up"),
        ("kernels/reference.py", "from sparcomm import attach", "up"),
        ("kernels/reference.py", "if TYPE_CHECKING:\n    from sparcomm.ddp import hook", "up"),
        ("ddp/hook.py", "import sparcomm", "up"),
        ("algorithms/dense.py", "from sparcomm.algorithms.spardl import SparDL", "no other algorithm"),
        ("algorithms/dense.py", "from sparcomm.algorithms import spardl", "no other algorithm"),
        ("algorithms/some/part.py", "from sparcomm.algorithms.spardl import SparDL", "no other algorithm"),
        ("algorithms/some/__init__.py", "from sparcomm.algorithms import spardl", "no other algorithm"),
        ("surprise.py", "", "no layer"),
        ("algorithms/dense.py", "import numba", "only kernels/cpu"),
        ("kernels/cpurious.py", "from numba import njit", "only kernels/cpu"),
        ("kernels/reference.py", "import cupy as cp", "only kernels/cuda"),
        ("transport/torchdist.py", "from mpi4py import MPI", "only transport/mpi"),
        ("algorithms/dense.py", "import torch.distributed as dist", "only transport/torchdist"),
        ("algorithms/dense.py", "from torch import distributed", "only transport/torchdist"),
        ("algorithms/dense.py", "from torch.distributed import ReduceOp", "only transport/torchdist"),
        ("wire.py", "x = 1\n" * 401, "401 lines"),
        ("wire.py", "def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
    ],
)
def test_a_violation_is_found(tmp_path: Path, path: str, text: str, complaint: str) -> None:
    found = violations(_tree(tmp_path, {path: text}))
    assert len(found) == 1
    assert found[0].startswith(f"{path}: ")
    assert complaint in found[0]


@pytest.mark.parametrize(("path", "lines"), [("wire.py", 400)])
def test_the_longest_allowed_file(tmp_path: Path, path: str, lines: int) -> None:
    assert violations(_tree(tmp_path, {path: "x = 1\n" * lines})) == []


def test_the_longest_allowed_function(tmp_path: Path) -> None:
    assert violations(_tree(tmp_path, {"wire.py": "def f():\n" + "    x = 1\n" * 59})) == []
