"""``python -m sparcomm`` is the ``sparcomm`` command."""

from __future__ import annotations

from sparcomm.cli import main

if __name__ == "__main__":
    main()
