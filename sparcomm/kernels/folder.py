"""Where compiled kernels are kept when nobody has said where."""

from __future__ import annotations

import functools
import os
import stat
import tempfile
from pathlib import Path


@functools.cache
def fallback_folder() -> Path:
    """A folder for compiled kernels under the temporary folder, shared by the ranks of this user on this host.

    Cached kernels are executed, so a folder that anybody else could have written to is never used.
    """
    shared = Path(tempfile.gettempdir()) / f"sparcomm-kernels-{os.getuid()}"
    return shared if is_private(shared) else Path(tempfile.mkdtemp(prefix="sparcomm-kernels-"))


def is_private(folder: Path) -> bool:
    """Whether this is a folder, perhaps just made, that nobody but this user can write to."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True, parents=True)
        found = folder.lstat()
    except OSError:  # it is a file, or a link to nowhere, or may not be made
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
