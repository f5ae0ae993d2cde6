"""How one hook cuts buckets into units: what reduces each, and which parameters travel apart from the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparcomm.algorithms.base import Algorithm
from sparcomm.algorithms.dense import Dense
from sparcomm.ddp.options import Options
from sparcomm.ddp.storage import Storage
from sparcomm.ddp.units import Carried, Partition


class Cutter:
    """Makes partitions and their units.

    Args:
        size: number of ranks.
        skipped: ids of the parameters that always travel dense.
    """

    def __init__(self, algorithm: Algorithm, size: int, options: Options, storage: Storage, skipped: set[int]) -> None:
        self._algorithm, self._size, self._storage, self._skipped = algorithm, size, storage, skipped
        correction = options.correction
        self._wants_sent = correction is not None and correction.masking

    def partition(self, final: bool = False) -> Partition:
        """An empty one."""
        return Partition(final, self._storage)

    def add_bucket(
        self, partition: Partition, params: Sequence[Tensor], dtype: torch.dtype, device: torch.device, carried: Carried
    ) -> None:
        """Appends the units of a bucket: itself, or its skipped and its other parameters by themselves."""
        apart = [p for p in params if id(p) in self._skipped]
        rest = [p for p in params if id(p) not in self._skipped]
        for some in (rest, apart) if apart else (params,):
            if some or not params:
                self.add_unit(partition, some, dtype, device, carried)

    def add_unit(
        self, partition: Partition, params: Sequence[Tensor], dtype: torch.dtype, device: torch.device, carried: Carried
    ) -> None:
        """Appends a unit of these parameters, all skipped or none; it starts from ``carried``."""
        skipped = bool(params) and id(params[0]) in self._skipped
        algorithm = Dense() if skipped else self._algorithm
        partition.add(
            params, dtype, device, algorithm, self._size, carried, skipped=skipped, wants_sent=self._wants_sent
        )
