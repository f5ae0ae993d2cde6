"""The data are split for good and dealt without loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs import data
from sparcomm.errors import ConfigError


def test_digits_are_split_into_all_of_them() -> None:
    split = data.digits()
    assert (len(split.train), len(split.test)) == (1198, 599)
    x, y = split.train.take(torch.arange(len(split.train)))
    assert (x.shape, x.dtype, y.dtype) == ((1198, 1, 8, 8), torch.float32, torch.int64)
    assert set(y.tolist()) == set(range(10))
    torch.testing.assert_close(torch.stack([x.mean(), x.std()]), torch.tensor([0.0, 1.0]))
    rows = {tuple(row) for row in x.flatten(1).tolist()}
    held = {tuple(row) for row in split.test.take(torch.arange(599))[0].flatten(1).tolist()}
    assert not rows & held


def test_digits_are_the_same_each_time() -> None:
    first, again = data.digits(), data.digits()
    index = torch.tensor([0, 7, 1197])
    assert torch.equal(first.train.take(index)[0], again.train.take(index)[0])


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """40 files that each consist of one letter, among things that do not count."""
    for i in range(40):
        folder = tmp_path / f"package{i % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"module{i}.py").write_text(chr(ord("A") + i) * 50)
    for skipped in ("test", "site-packages/x", "package0/__pycache__"):
        (tmp_path / skipped).mkdir(parents=True)
        (tmp_path / skipped / "skipped.py").write_text("~" * 1000)
    (tmp_path / "readme.txt").write_text("~" * 1000)
    return tmp_path


def symbols(windows: data.Samples) -> set[int]:
    x, y = windows.take(torch.arange(len(windows)))
    return set(x.flatten().tolist()) | set(y.flatten().tolist())


def test_charlm_is_split_by_file(library: Path) -> None:
    files = data.source_files(library)
    held = [path for path in files if data.is_held_out(path.relative_to(library))]
    assert len(files) == 40
    assert 0 < len(held) < 20
    split = data.charlm(context=10, validation_windows=1000, root=library)
    train, test = symbols(split.train), symbols(split.test)
    assert not train & test
    letters = {path: data.encode(path.read_bytes())[0].item() for path in files}
    assert test == {letters[path] for path in held}
    assert train == set(letters.values()) - test


def test_the_split_depends_on_the_path_alone(library: Path) -> None:
    before = {p: data.is_held_out(p.relative_to(library)) for p in data.source_files(library)}
    (library / "aaa_new.py").write_text("new")
    after = {p: data.is_held_out(p.relative_to(library)) for p in data.source_files(library)}
    assert before.items() <= after.items()


TEXT = "import os\n\nx = os.path.join(1, 23)\nif x:\n    print(x)\n"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """20 files of one text, with a name of its own in each."""
    for i in range(20):
        (tmp_path / f"module{i}.py").write_text(TEXT + f"name{i}\n")
    return tmp_path


def test_tokens_are_told_from_those_in_front_of_them(sources: Path) -> None:
    split = data.tokens(context=3, rows=1 << 40, classes=5, validation_samples=1000, root=sources)
    for samples in split:
        x, y = samples.take(torch.arange(len(samples)))
        assert x.shape == (len(samples), 5)
        assert (x.dtype, y.dtype) == (torch.int64, torch.int64)
        assert int(x.min()) >= 0
        assert set(y.tolist()) == set(range(5))
    # A class and an n-gram have the same number in both parts.
    parts = [samples.take(torch.arange(len(samples))) for samples in split]
    train, test = ({tuple(row) for row in torch.cat([x, y[:, None]], 1).tolist()} for x, y in parts)
    assert train & test
    everything = len(split.train) + len(split.test)
    fewer = data.tokens(context=3, rows=100, classes=2, validation_samples=7, root=sources)
    assert len(fewer.test) == 7
    assert len(fewer.train) + 7 < everything
    assert int(fewer.train.take(torch.arange(len(fewer.train)))[0].max()) < 100


def test_ngrams_are_hashed_by_what_they_hold() -> None:
    tokens = torch.tensor([1, 2, 3, 1, 2, 3, 9, 2, 3, 7, 3, 2])
    classes = torch.full((12,), -1)
    classes[torch.tensor([3, 6, 9, 11])] = torch.tensor([0, 1, 2, 3])
    x, y = data.Grams(tokens, classes, 3, 1 << 40).take(torch.arange(4))
    assert y.tolist() == [0, 1, 2, 3]
    assert torch.equal(x[0], x[1])  # 1 2 3 and 1 2 3
    assert (x[1] == x[2]).tolist() == [True, True, False, True, False]  # 1 2 3 and 9 2 3
    assert (x[2] == x[3]).tolist() == [True, False, False, False, False]  # 9 2 3 and 3 7 3
    assert len(set(x.flatten().tolist())) == 10  # 1 2 3 7 9, 23 73, 123 923 373
    assert len(data.Grams(tokens, classes, 4, 10)) == 3


def test_the_standard_library_is_there() -> None:
    split = data.charlm(context=128, validation_windows=64)
    assert len(split.train) > 10_000
    assert len(split.test) == 64
    x, y = split.train.take(torch.tensor([0, len(split.train) - 1]))
    assert x.shape == y.shape == (2, 128)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert int(x.max()) <= data.UNKNOWN
    grams = data.tokens(context=6, rows=24576, classes=255, validation_samples=64)
    assert len(grams.train) > 100_000
    x, y = grams.train.take(torch.arange(0, len(grams.train), len(grams.train) // 64))
    assert 0.01 < len(x.unique()) / 24576 < 0.02  # a small batch touches few of the rows
    assert int(y.max()) < 255


def test_a_folder_without_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too few"):
        data.charlm(8, 8, tmp_path)


def test_encoding_names_every_byte() -> None:
    assert data.encode(b"\n\t ~").tolist() == [0, 1, 2, data.UNKNOWN - 1]
    assert data.encode(bytes([0, 13, 127, 200, 255])).tolist() == [data.UNKNOWN] * 5
    assert data.encode(b"").dtype == np.uint8


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 9))
def test_windows_do_not_overlap_and_stay_inside(length: int, context: int, limit: int) -> None:
    text = torch.arange(length, dtype=torch.uint8)
    whole = data.Windows(text, context)
    assert len(whole) == max(0, (length - 1) // context)
    if len(whole):
        x, y = whole.take(torch.arange(len(whole)))
        assert x.flatten().tolist() == list(range(len(whole) * context))
        assert torch.equal(y, x + 1)
        part = data.Windows(text, context, limit)
        assert len(part) == min(limit, len(whole))
        assert torch.equal(torch.diff(part.take(torch.arange(len(part)))[0], dim=1), torch.ones(len(part), context - 1))


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
def test_the_sampler_deals_every_sample_once(length: int, share: int, size: int, seed: int, epoch: int) -> None:
    batch = share * size
    if length < batch:
        with pytest.raises(ConfigError, match="larger than"):
            data.Sampler(length, batch, 0, size, seed)
        return
    ranks = [list(data.Sampler(length, batch, rank, size, seed).indices(epoch)) for rank in range(size)]
    dealt = torch.cat([index for batches in ranks for index in batches]).tolist()
    assert len(dealt) == len(set(dealt)) == length // batch * batch
    assert set(dealt) <= set(range(length))
    assert {len(index) for batches in ranks for index in batches} == {share}


@given(st.integers(4, 100), st.integers(0, 3), st.integers(0, 3), st.data())
def test_the_sampler_resumes_anywhere(length: int, seed: int, epoch: int, draw: st.DataObject) -> None:
    sampler = data.Sampler(length, 4, 1, 2, seed)
    whole = list(sampler.indices(epoch))
    start = draw.draw(st.integers(0, len(sampler)))
    rest = list(sampler.indices(epoch, start))
    assert len(whole) == len(sampler)
    assert [x.tolist() for x in rest] == [x.tolist() for x in whole[start:]]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(torch.cat(list(data.Sampler(64, 8, 0, 1, seed).indices(epoch))).tolist())

    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(sorted(o) == list(range(64)) for o in orders)


def test_a_batch_that_ranks_cannot_share_is_an_error() -> None:
    with pytest.raises(ConfigError, match="batch=6 must be a multiple of the 4 ranks"):
        data.Sampler(100, 6, 0, 4, 0)
