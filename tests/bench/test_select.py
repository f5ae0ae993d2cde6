"""The selection benchmark runs, checks what it times, and refuses nonsense."""

from __future__ import annotations

import pytest
import torch

from sparcomm.bench.select import main, right
from sparcomm.layout import dealt


def test_every_selection_is_reported_identical(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    main(["--numel", "30000", "--density", "0.02", "--repeat", "1"])
    printed = capsys.readouterr().out
    assert printed.count("yes") == 4  # one block, dealt blocks, two gradient dtypes
    assert "NO" not in printed
    assert torch.get_num_threads() == threads


def test_a_wrong_selection_is_noticed() -> None:
    x, layout = torch.arange(1.0, 65.0), dealt(64, 2)
    last = torch.arange(layout.length - 3, layout.length)
    assert right(x, [last, last], layout)
    assert not right(x, [last, last - 1], layout)


@pytest.mark.parametrize("wrong", [["--numel", "0"], ["--density", "0"], ["--density", "1.5"], ["--repeat", "0"]])
def test_nonsense_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(wrong)
    assert "--density in (0, 1]" in capsys.readouterr().err
