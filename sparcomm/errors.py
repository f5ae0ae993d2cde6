"""Every exception that sparcomm raises on purpose, in one tree.

    SparcommError
    ├── ConfigError(ValueError)         a setting is wrong: density, algorithm, unknown key, ...
    │   └── ConfigMismatch              ranks were started with different settings
    ├── GradientError(TypeError)        a gradient that cannot be taken: integer, complex, scattered elements
    ├── NotInitializedError             torch.distributed (or the hook's module) is not there yet
    ├── CheckpointError                 a state_dict does not fit
    └── CommunicationError(RuntimeError)
        ├── PeerError                   a wait on another rank failed or ran out of time
        ├── DisagreementError           ranks called different things
        ├── DamagedBag                  bytes that arrived are not what was sent
        └── HookError                   a step of the DDP hook failed
            └── RemoteError             ... because another rank failed first

Messages name the offending value and what is allowed.
"""

from __future__ import annotations


class SparcommError(Exception):
    """Base of all errors raised by sparcomm."""


class ConfigError(SparcommError, ValueError):
    """A setting is outside what is allowed; the message lists what is."""


class ConfigMismatch(ConfigError):
    """Ranks of one job were configured differently; the message lists the fields that differ."""


class GradientError(SparcommError, TypeError):
    """A gradient's dtype or layout cannot be compressed; the message says what to do instead."""


class NotInitializedError(SparcommError, RuntimeError):
    """Something that must exist first does not: the process group, or the module a state is bound to."""


class CheckpointError(SparcommError, ValueError):
    """A ``state_dict`` does not belong to this module or algorithm."""


class CommunicationError(SparcommError, RuntimeError):
    """Base of everything that can go wrong between ranks."""


class PeerError(CommunicationError):
    """Waiting on another rank failed; the message names step, peer and tag.

    Attributes:
        ranks: those that are known to be the cause: dead, stopped, gone or late; () where that cannot be told.
    """

    def __init__(self, text: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(text)
        self.ranks = ranks


class DisagreementError(CommunicationError):
    """Ranks of one group called different operations, or sizes that do not match."""


class DamagedBag(CommunicationError):
    """A message's header, length, checksum or coded content is impossible."""


class HookError(CommunicationError):
    """A synchronisation step of the DDP hook failed; nothing of that step was committed."""


class RemoteError(HookError):
    """Another rank failed first.

    Attributes:
        rank: the rank that failed.
        type: the name of its exception's type.
        text: its exception's message.
    """

    def __init__(self, rank: int, type: str, text: str) -> None:
        super().__init__(f"rank {rank} failed first with {type}: {text}")
        self.rank, self.type, self.text = rank, type, text
