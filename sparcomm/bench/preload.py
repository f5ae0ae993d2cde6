"""Imported once by the process that children are forked from, so that none of them has to do it again.

Nothing here starts a thread: a child would inherit its locks, but not the thread that frees them.
"""

from __future__ import annotations

import contextlib
import os

import torch

from sparcomm.bench import overlap, reduce, training
from sparcomm.kernels import warm_up

PRELOADED = (overlap, reduce, training)

torch.set_num_threads(1)
with contextlib.suppress(Exception):  # whatever is wrong, a child will say so
    warm_up()

# Children write to a file of their own. Whoever reads what the bench prints need not wait for this process to end.
_null = os.open(os.devnull, os.O_RDWR)
for _stream in (1, 2):
    os.dup2(_null, _stream)
