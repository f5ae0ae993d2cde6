"""What all ranks must have in common, as far as no ranks are needed to see it."""

from __future__ import annotations

import pytest
import torch

from sparcomm.algorithms import Algorithm
from sparcomm.algorithms.hierarchical import Hierarchical
from sparcomm.algorithms.s2 import S2Reducer
from sparcomm.algorithms.spardl import SparDL
from sparcomm.algorithms.topk import TopKAllGather
from sparcomm.ddp import agreement
from sparcomm.errors import ConfigError

VARYING = [SparDL(indices="rice"), TopKAllGather(indices="rice"), TopKAllGather(selector="gaussiank")]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize("algorithm", VARYING)
def test_messages_of_varying_length_are_refused_on_nccl(algorithm: Algorithm) -> None:
    with pytest.raises(ConfigError, match=r"depends on the data, which NCCL cannot: choose indices='elias-fano'"):
        agreement.check_backend(algorithm, "cpu:gloo,cuda:nccl", [CPU, CUDA])
    agreement.check_backend(algorithm, "cpu:gloo,cuda:nccl", [CPU])
    agreement.check_backend(algorithm, "cpu:gloo,cuda:gloo", [CUDA])


def test_messages_of_fixed_length_go_anywhere() -> None:
    for algorithm in (SparDL(), SparDL(teams=2, sag="b-sag", selector="gaussiank"), TopKAllGather(values="int8")):
        agreement.check_backend(algorithm, "cpu:gloo,cuda:nccl", [CUDA])


def test_sizes_that_follow_the_data_go_over_nccl_only_where_the_host_may_wait() -> None:
    for fields in ({"decoder": "peel"}, {"decoder": "compact"}, {"decoder": "projection"}, {}):
        waits = S2Reducer(**fields)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"which NCCL cannot: choose allow_sync=True, which makes the host wait"):
            agreement.check_backend(waits, "cpu:gloo,cuda:nccl", [CUDA])
        agreement.check_backend(waits, "cpu:gloo,cuda:gloo", [CUDA])
        with pytest.raises(ConfigError, match="depends on the data"):
            agreement.check_backend(Hierarchical(outer=waits, local_size=1), "cuda:nccl", [CUDA])
        agreement.check_backend(S2Reducer(allow_sync=True, **fields), "cpu:gloo,cuda:nccl", [CUDA])  # type: ignore[arg-type]
    agreement.check_backend(S2Reducer(0.1, "projection", adaptive=False), "cpu:gloo,cuda:nccl", [CUDA])
