"""The benchmark of votes runs, torch agrees, and nonsense is refused."""

from __future__ import annotations

import json

import pytest
import torch

from sparcomm.bench.votes import main, parse, torch_pack, torch_vote
from sparcomm.errors import ConfigError

SHORT = ["--numel", "40001", "--repeat", "1"]


def test_every_row_is_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    main([*SHORT, "--ranks", "1,2,8", "--json"])
    assert torch.get_num_threads() == threads
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    wanted = [("pack", None), ("vote", 1), ("vote", 2), ("vote", 8)]
    assert [(row["kernel"], row["ranks"], row["zeros"]) for row in rows] == [
        (*kind, zeros) for kind in wanted for zeros in (False, True)
    ]
    for row in rows:
        n, packs = 40_032, row["kernel"] == "pack"
        assert row["identical"]
        assert row["numel"] == n
        assert row["ratio"] > 0
        rates = row["gradient_bytes_per_second"], row["votes_per_second"]
        done = (4 * n / row["seconds"], None) if packs else (None, row["ranks"] * n / row["seconds"])
        assert rates == pytest.approx(done)


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main([*SHORT, "--ranks", "3"])
    printed = capsys.readouterr().out
    assert "40,032 elements" in printed
    assert printed.count("apart") == 2
    assert "NO" not in printed


def test_torch_does_what_is_compared_with() -> None:
    mask = torch.zeros(64, dtype=torch.bool)
    mask[[0, 9, 31, 33]] = True
    words = torch_pack(mask)
    assert words.tolist() == [1 + (1 << 9) - (1 << 31), 2]
    rows = torch.tensor([[0b0011], [0b0101]], dtype=torch.int32)
    assert torch_vote(rows, None)[0].tolist() == [0b0001]
    verdict, voted = torch_vote(rows, torch.tensor([[0b0010], [0b0101]], dtype=torch.int32))
    assert (verdict.tolist(), voted.tolist()) == ([0b0111], [0b0111])


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--numel", "0"], ["--numel", "at least 1"]),
        (["--ranks", "3,0"], ["--ranks", "at least 1"]),
        (["--ranks", "3,128"], ["--ranks", "127"]),
        (["--ranks", ""], ["--ranks"]),
        (["--repeat", "0"], ["--repeat"]),
    ],
)
def test_nonsense_is_refused(typed: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(typed)
    for word in words:
        assert word in str(caught.value)
