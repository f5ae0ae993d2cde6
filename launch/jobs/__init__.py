"""The parts of the training jobs that launch/train.py runs, and the check that what they need is installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_NEEDED = ("sparcomm", "torch", "yaml", "sklearn", "matplotlib")

_missing = [name for name in _NEEDED if find_spec(name) is None]
if _missing:
    print(
        f"error: {sys.executable} has no {', '.join(_missing)}: run `make setup` and use .venv/bin/python, "
        "or install them with pip install -e '.[train]' (in the repository)",
        file=sys.stderr,
    )
    sys.exit(2)
