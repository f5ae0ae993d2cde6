"""Reading hook state from a ``torch.distributed.checkpoint`` of another world size.

At the same world size ``dcp.save({"hook": state}, ...)`` and ``dcp.load({"hook": state}, ...)`` need no help. At
another one the keys of a rank are not in the checkpoint, and this reads those that are.
"""

from __future__ import annotations

import os
import re
import warnings
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from sparcomm.ddp.checkpoint import LABEL, StateDict
from sparcomm.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.storage import StorageReader


def load_distributed(
    source: str | os.PathLike[str] | StorageReader,
    key: str = "hook",
    *,
    process_group: dist.ProcessGroup | None = None,
    first: int | None = None,
) -> list[StateDict]:
    """All ranks' state_dicts out of a distributed checkpoint, for ``HookState.load_state_dict``, at any world size.

    Every rank reads for itself, and no rank waits for another. What only other ranks need is left out: the list is
    good for the rank that read it.

    Args:
        source: the folder, or a ``StorageReader`` of another kind of storage.
        key: under which the state was saved; with dots if it was nested: ``"app.hook"``.
        process_group: of the DDP module that will load it; default: the default group. Without any: rank 0 of 1.
        first: the lowest global rank of the group that saved it; default: that of ``process_group``.

    Raises:
        CheckpointError: no checkpoint, or no hook state under this key.
    """
    # Imported here, since it takes longer than all of sparcomm.
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(source) if isinstance(source, (str, os.PathLike)) else source
    try:
        known = reader.read_metadata().state_dict_metadata
    except Exception as error:  # whatever the storage and the unpickler raise
        raise CheckpointError(f"{source} cannot be read ({type(error).__name__}: {error})") from error
    rank, size, here = _place(process_group)
    suffix = f" from global rank {here if first is None else first}" if (here if first is None else first) else ""
    found = _labels(known, key)
    ours = {r: text for text, (r, _, tail) in found.items() if tail == suffix}
    if not ours:
        raise CheckpointError(_nothing(source, key, known, found, suffix))
    parts = [(text, "about") for text in ours.values()]
    parts += [(text, "owed") for r, text in ours.items() if r % size == rank]
    loaded: dict[str, Any] = {f"{key}.{text}.{part}": None for text, part in parts}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)  # that no rank waits is on purpose
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)  # fills in ``loaded``
        load(loaded, storage_reader=reader, planner=planner, no_dist=True)
    sds: dict[str, StateDict] = {text: {text: {}} for text in ours.values()}
    for text, part in parts:
        sds[text][text][part] = loaded[f"{key}.{text}.{part}"]
    return list(sds.values())


def _place(group: dist.ProcessGroup | None) -> tuple[int, int, int]:
    """(rank, size, lowest global rank) of this process in the group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1, 0
    return dist.get_rank(group), dist.get_world_size(group), min(dist.get_process_group_ranks(group))


def _labels(known: Any, key: str) -> dict[str, tuple[int, int, str]]:
    """{label: (rank, size, what names its group)} of the hook states under ``key``."""
    pattern = re.compile(rf"{re.escape(key)}\.({LABEL.pattern})\.about")
    matches = [m for m in map(pattern.fullmatch, known) if m]
    return {m[1]: (int(m[2]), int(m[3]), m[4] or "") for m in sorted(matches, key=lambda m: int(m[2]))}


def _nothing(source: Any, key: str, known: Any, found: dict[str, tuple[int, int, str]], suffix: str) -> str:
    if found:
        wanted = suffix or " from global rank 0"
        return f"{source} holds no state of a group{wanted} under {key!r}, only {', '.join(found)}: name it by first="
    pattern = re.compile(rf"(.+)\.{LABEL.pattern}\.about")
    keys = sorted({m[1] for m in map(pattern.fullmatch, known) if m})
    return f"{source} holds no HookState under {key!r}" + (f", only under {', '.join(map(repr, keys))}" if keys else "")
