"""How selectors are named: every text and mapping is taken as it is meant, or refused with what is valid."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sparcomm
from sparcomm.config import settings
from sparcomm.errors import ConfigError
from sparcomm.selectors import Memo, Selector, make_selector, registry
from sparcomm.selectors.gaussiank import GaussianK
from sparcomm.selectors.topk import TopK


def test_the_registry_finds_what_is_there() -> None:
    assert registry() == {"gaussiank": sparcomm.GaussianK, "topk": sparcomm.TopK}


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("topk", TopK()),
        ("topk()", TopK()),
        (" gaussiank ( ) ", GaussianK()),
        ("gaussiank(guard=False, reestimate_every=4)", GaussianK(guard=False, reestimate_every=4)),
        ({"name": "topk"}, TopK()),
        ({"name": "gaussiank", "guard": False, "adjust": 0}, GaussianK(guard=False, adjust=0)),
        (GaussianK(adjust=5), GaussianK(adjust=5)),
    ],
)
def test_valid(value: Any, wanted: Selector) -> None:
    assert make_selector(value) == wanted


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("topkk", ["'topkk'", "did you mean 'topk'?", "'gaussiank'"]),
        ("", ["''", "'topk'"]),
        ("topk(", ["'topk('", "literals"]),
        ("topk\0", ["literals"]),
        ("topk(3)", ["'topk(3)'", "literals"]),
        ("topk(**{})", ["literals"]),
        ("topk(k=3)", ["'k'", "'topk'", "nothing"]),
        ("gaussiank(gard=True)", ["'gard'", "did you mean 'guard'?", "'adjust'", "'reestimate_every'"]),
        ("gaussiank(guard=guard)", ["literals"]),
        ("gaussiank(guard=bool(1))", ["literals"]),
        ("gaussiank(adjust=1, adjust=2)", ["literals"]),
        ("gaussiank(name='topk')", ["the name stands before"]),
        ("sparcomm.topk", ["literals"]),
        ("__import__('os').getcwd()", ["literals"]),
        ("topk; topk", ["literals"]),
        ("gaussiank(guard=1)", ["guard=1", "True or False"]),
        ("gaussiank(guard=None)", ["guard=None"]),
        ("gaussiank(adjust=-1)", ["adjust=-1", "from 0 to 100"]),
        ("gaussiank(adjust=101)", ["adjust=101"]),
        ("gaussiank(adjust=2.0)", ["adjust=2.0", "whole number"]),
        ("gaussiank(adjust=True)", ["adjust=True"]),
        ("gaussiank(reestimate_every=0)", ["reestimate_every=0", "at least 1"]),
        ("gaussiank(reestimate_every='4')", ["reestimate_every='4'"]),
        ("x" * 5000, ["literals"]),
        ("gaussiank(adjust=" + "-" * 900 + "1)", ["literals"]),
        ("(" * 900, ["literals"]),
        (None, ["None", "'topk'"]),
        (3, ["3", "mapping"]),
        (TopK, ["mapping"]),
        (["topk"], ["mapping"]),
        ({}, ["'name' is missing", "'gaussiank', 'topk'"]),
        ({"name": 3}, ["'name' is 3"]),
        ({"name": "top"}, ["'top'", "did you mean 'topk'?"]),
        ({"name": "topk", 3: 4}, ["text"]),
        ({"name": "gaussiank", "guard": "no"}, ["guard='no'"]),
    ],
)
def test_invalid(value: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make_selector(value)
    for word in words:
        assert word in str(caught.value)


@given(st.text(max_size=40) | st.dictionaries(st.text(max_size=9), st.integers()) | st.floats() | st.binary(max_size=9))
def test_anything_else_is_a_config_error(value: Any) -> None:
    if isinstance(value, str) and value.strip() in registry():
        return
    with pytest.raises(ConfigError):
        make_selector(value)


@given(st.booleans(), st.integers(0, 100), st.integers(1, 10**9))
def test_the_text_of_a_selector_makes_it_again(guard: bool, adjust: int, every: int) -> None:
    selector = GaussianK(guard, adjust, every)
    assert make_selector(str(selector)) == selector
    assert (
        make_selector({"name": selector.name, "guard": guard, "adjust": adjust, "reestimate_every": every}) == selector
    )


def test_texts_say_what_differs() -> None:
    assert [str(s) for s in (TopK(), GaussianK(), GaussianK(guard=False))] == [
        "topk",
        "gaussiank",
        "gaussiank(guard=False)",
    ]


def test_a_mapping_is_not_modified() -> None:
    value = {"name": "gaussiank", "adjust": 1}
    make_selector(value)
    assert value == {"name": "gaussiank", "adjust": 1}


@pytest.mark.parametrize("name", sorted(registry()))
def test_every_setting_is_described(name: str) -> None:
    assert all(s.doc and not s.required for s in settings(registry()[name]))


@pytest.mark.parametrize("k", [0, 1, 2, 3, 10, 100])
def test_most(k: int) -> None:
    assert TopK().most(k, 100) == k
    assert GaussianK().most(k, 100) == min(100, 4 * k // 3) >= k
    assert GaussianK(guard=False).most(k, 100) == 100
    assert (TopK().fixed, GaussianK().fixed, GaussianK(guard=False).fixed) == (True, False, False)


@pytest.mark.parametrize("state", [{}, {"age": 1}, {**Memo().state(), "more": 1}, {**Memo().state(), "age": "1"}])
def test_a_state_that_is_no_memos(state: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        Memo.from_state(state)
