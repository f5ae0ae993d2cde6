"""torchrun for launch/train.py: takes torchrun's options, and ends as the rank that failed first has ended.

torchrun itself answers every failure with a traceback of its own and exit code 1, below which the one line that the
rank has printed is hard to find.
"""

from __future__ import annotations

import logging
import signal
import sys
from importlib import import_module


def main(argv: list[str] | None = None) -> int:
    """Runs the ranks to their end. Returns 0, or the exit code of the rank that failed first (1 after a signal)."""
    import_module("jobs")  # ends here, with what to install, if anything is missing
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun(argv)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode  # it has said why
        name = signal.Signals(-failure.exitcode).name
        print(f"error: rank {rank} was ended by {name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
