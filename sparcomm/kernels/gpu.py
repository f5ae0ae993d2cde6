"""Whether a GPU can have kernels of its own, and what is said, once, if it cannot.

They are CUDA text that CuPy compiles on first use. Where there is no CuPy, or the GPU is too old, gradients on it are
handled by the reference in plain torch: the same results, several times slower.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import threading
import warnings

import torch

OLDEST = (7, 0)  # the first compute capability with independent thread scheduling; tested from 7.5 on
_lock = threading.RLock()


def obstacle(capability: tuple[int, int], version: str | None, cupy: str = "cupy") -> str:
    """Why kernels cannot run on a GPU of this compute capability, and what to do; "" if they can.

    Args:
        version: of the CUDA that this PyTorch was built for, such as "13.0"; None: for another vendor's GPUs.
        cupy: name of the module to look for, which is imported where it is found.
    """
    if version is None:
        return "this PyTorch is not built for CUDA, and there are kernels for no other kind of GPU"
    if capability < OLDEST:
        have, need = (".".join(map(str, c)) for c in (capability, OLDEST))
        return f"the GPU has compute capability {have}, and they need {need}"
    extra = "cuda12" if version.startswith("12.") else "cuda13"
    install = f"pip install 'sparcomm[{extra}]'"
    if importlib.util.find_spec(cupy) is None:
        return f"they need CuPy: {install}"
    try:
        importlib.import_module(cupy)
    except Exception as error:  # noqa: BLE001  a library that does not fit this machine may fail in any way
        return f"CuPy is installed but cannot be imported ({type(error).__name__}: {error}): {install}"
    return ""


def trial(device: torch.device) -> str:
    """Why a first kernel does not run on a device; "" if it does. To compile it takes a second, the first time."""
    try:
        from sparcomm.kernels import cuda

        cuda.checksum(torch.zeros(4, dtype=torch.int32, device=device))
    except Exception as error:  # noqa: BLE001  from a missing compiler library to a driver that is too old
        said = " ".join(str(error).split())
        return f"a first one could not be compiled or started ({type(error).__name__}: {said[:300]})"
    return ""


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the CUDA kernels run on a CUDA device. Warns if not, but once in a process."""
    with _lock:
        found = obstacle(torch.cuda.get_device_capability(device), torch.version.cuda) or trial(device)
        if found:
            warn_once(found)
    return not found


_said: set[str] = set()


def warn_once(why: str) -> None:
    """Warns that GPUs go without kernels of their own; later calls in a process say nothing."""
    with _lock:
        if _said:
            return
        _said.add(why)
    warnings.warn(
        f"sparcomm's GPU kernels are not used: {why}. Until then plain torch does their work, much slower",
        RuntimeWarning,
        stacklevel=2,
    )
