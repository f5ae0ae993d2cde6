"""What all ranks must have in common, as far as no ranks are needed to see it."""

from __future__ import annotations

import pytest
import torch

from sparcomm.algorithms import Algorithm
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
