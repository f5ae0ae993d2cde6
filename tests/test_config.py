"""Configurations are taken as they are meant or refused with what is valid."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparcomm.algorithms import registry
from sparcomm.algorithms.dense import Dense
from sparcomm.algorithms.hierarchical import Hierarchical
from sparcomm.algorithms.majority_vote import MajorityVote
from sparcomm.algorithms.s2 import S2Reducer
from sparcomm.algorithms.spardl import SparDL
from sparcomm.algorithms.topk import TopKAllGather
from sparcomm.config import Setting, _checked, algorithm_from_config, algorithm_from_text, settings
from sparcomm.errors import ConfigError
from sparcomm.selectors import Selector
from sparcomm.selectors.gaussiank import GaussianK
from sparcomm.selectors.topk import TopK


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"name": "dense"}, Dense()),
        ({"name": "dense", "native": True}, Dense(native=True)),
        ({"name": "topk", "density": 0.05}, TopKAllGather(density=0.05)),
        ({"name": "topk", "density": 1}, TopKAllGather(density=1.0)),
        ({"name": "spardl"}, SparDL()),
        (
            {"name": "spardl", "density": 0.1, "schedule": "direct", "layout": "contiguous", "values": "bfloat16"},
            SparDL(density=0.1, schedule="direct", layout="contiguous", values="bfloat16"),
        ),
        ({"name": "spardl", "residuals": "local"}, SparDL(residuals="local")),
        ({"name": "hierarchical"}, Hierarchical(Dense(), SparDL())),
        (
            {"name": "hierarchical", "inner": {"name": "dense"}, "outer": {"name": "topk", "density": 0.5}},
            Hierarchical(outer=TopKAllGather(density=0.5)),
        ),
        (
            {"name": "hierarchical", "outer": "spardl(density=0.02, schedule='direct')", "local_size": 2},
            Hierarchical(outer=SparDL(density=0.02, schedule="direct"), local_size=2),
        ),
        ({"name": "hierarchical", "outer": "majority-vote"}, Hierarchical(outer=MajorityVote())),
        (
            {"name": "hierarchical", "outer": "hierarchical(outer=majority-vote(momentum=0.9, mask=true))"},
            Hierarchical(outer=Hierarchical(outer=MajorityVote(momentum=0.9, mask=True))),
        ),
        (
            {"name": "hierarchical", "outer": "s2(density=none, decoder=peel, latency=null)"},
            Hierarchical(outer=S2Reducer(decoder="peel")),
        ),
        ({"name": "s2", "density": None}, S2Reducer()),
        ({"name": "s2", "density": "none", "ratio": "None"}, S2Reducer()),
        ({"name": "hierarchical", "groups": [[0, 2], [1, 3]]}, Hierarchical(groups=((0, 2), (1, 3)))),
        (
            {"name": "hierarchical", "outer": "hierarchical(inner=topk(density=0.5), outer=dense(), local_size=2)"},
            Hierarchical(outer=Hierarchical(TopKAllGather(density=0.5), Dense(), 2)),
        ),
    ],
)
def test_valid(config: dict[str, Any], wanted: Any) -> None:
    assert algorithm_from_config(config) == wanted


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("name", sorted(registry()))
def test_every_case_survives_the_round_trip(name: str, size: int) -> None:
    for case in registry()[name].cases(size):
        assert algorithm_from_config({"name": name, **case.fields()}) == case


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, ["mapping", "None"]),
        (["dense"], ["mapping"]),
        ("dense", ["mapping", "'dense'"]),
        ({}, ["'name' is missing", "'dense'", "'spardl'", "'topk'"]),
        ({"name": 3}, ["3", "'spardl'"]),
        ({"name": "spardll"}, ["'spardll'", "did you mean 'spardl'?", "'dense'", "'topk'"]),
        ({"name": "S2Reducer"}, ["'S2Reducer'", "did you mean 's2'?"]),
        ({"name": "TopKAllGather"}, ["did you mean 'topk'?"]),
        ({"name": "majority_vote"}, ["did you mean 'majority-vote'?"]),
        ({"name": "s2", "density": "all"}, ["density='all'", "float | None"]),
        ({"name": "s2", "density": 2}, ["density=2.0", "at most 1", "or None for all that is not zero"]),
        ({"name": "spardl", "density": "none"}, ["density='none'", "such as 0.01"]),
        ({"name": "powersgd"}, ["'powersgd'", "'dense'", "'spardl'", "'topk'"]),
        ({"name": "spardl", "densty": 0.1}, ["'densty'", "did you mean 'density'?", "'schedule'", "'layout'"]),
        ({"name": "dense", "density": 0.1}, ["'density'", "'dense'", "'native'"]),
        ({"name": "spardl", 3: 0.1}, ["3", "text"]),
        ({"name": "spardl", "density": "0.1"}, ["density='0.1'", "float", "such as 0.01"]),
        ({"name": "spardl", "density": True}, ["density=True", "float"]),
        ({"name": "spardl", "density": None}, ["density=None", "float"]),
        ({"name": "spardl", "density": 0}, ["0", "1"]),
        ({"name": "spardl", "density": 1.5}, ["1.5"]),
        ({"name": "spardl", "density": float("nan")}, ["nan"]),
        ({"name": "spardl", "schedule": "logg"}, ["'logg'", "did you mean 'log'?", "'direct'"]),
        ({"name": "spardl", "layout": 3}, ["layout=3"]),
        ({"name": "spardl", "values": "float8"}, ["'float8'", "'bfloat16'"]),
        ({"name": "dense", "native": 1}, ["native=1", "True"]),
        ({"name": "dense", "native": "yes"}, ["native='yes'", "True"]),
        ({"name": "hierarchical", "inner": 3}, ["inner=3", "mapping", "spardl(density=0.01)"]),
        ({"name": "hierarchical", "outer": {}}, ["hierarchical.outer: ", "'name' is missing"]),
        ({"name": "hierarchical", "outer": {"name": "spardl", "densty": 1}}, ["hierarchical.outer: ", "'density'?"]),
        (
            {"name": "hierarchical", "outer": "hierarchical(inner=topk(density=2.0))"},
            ["hierarchical.outer: hierarchical.inner: density=2.0"],
        ),
        ({"name": "hierarchical", "local_size": 2.0}, ["local_size=2.0", "int"]),
        ({"name": "hierarchical", "local_size": 0}, ["local_size=0"]),
        ({"name": "hierarchical", "groups": [[0, 1], [2]]}, ["3 ranks make nodes of 2, 1"]),
        ({"name": "hierarchical", "groups": [[0, 1], [1, 2]]}, ["names a rank twice"]),
        ({"name": "hierarchical", "groups": [[0, -1]]}, ["groups=((0, -1),)"]),
        ({"name": "hierarchical", "groups": []}, ["groups=()"]),
        ({"name": "hierarchical", "groups": [[0, 1]], "local_size": 2}, ["give one of them"]),
    ],
)
def test_invalid(config: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        algorithm_from_config(config)
    for word in words:
        assert word in str(caught.value)


@given(
    st.dictionaries(st.text(max_size=9), st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9))
)
def test_anything_else_is_a_config_error(config: dict[str, Any]) -> None:
    known = {s.name for s in settings(SparDL)}
    if not set(config) - known:
        config["density_"] = 1
    with pytest.raises(ConfigError):
        algorithm_from_config({**config, "name": "spardl"})


def test_the_mapping_is_not_modified() -> None:
    config = {"name": "topk", "density": 0.5}
    algorithm_from_config(config)
    assert config == {"name": "topk", "density": 0.5}


@pytest.mark.parametrize("name", sorted(registry()))
def test_settings_describe_every_field(name: str) -> None:
    cls = registry()[name]
    found = {s.name: s for s in settings(cls)}
    assert list(found) == [field.name for field in dataclasses.fields(cls)]
    assert all(s.doc for s in found.values())
    for s in found.values():
        assert s.required or s.default == getattr(cls(), s.name)


def test_settings_list_the_choices() -> None:
    allowed = {s.name: s.allowed for s in settings(SparDL)}
    assert (allowed["schedule"], allowed["density"]) == (("log", "direct"), ())
    assert {s.name: s.allowed for s in settings(Dense)}["native"] == (False, True)


@pytest.mark.parametrize("text", [
    "", "(", "3", "'spardl'", "spardl(0.1)", "spardl(**{'density': 0.1})", "spardl(density=x)", "spardl.density", "a b",
    "spardl(name='dense')", "spardl(density=[0.1][0])", "spardl(density=0.1, density=0.2)", "os.system(x=1)", "\0",
    "spardl(density=__import__('os'))", "majority-vote(momentum=0.5)-x(mask=true)", "majority-3", "spardl()-topk",
    "x" * 300, "(" * 300 + ")" * 300,
])  # fmt: skip
def test_text_that_is_no_algorithm(text: str) -> None:
    with pytest.raises(ConfigError):
        algorithm_from_text(text)


SELECTOR = Setting("selector", "Selector", TopK(), required=False, allowed=(), doc="")


@pytest.mark.parametrize("hint", [Selector, Selector | None])
@pytest.mark.parametrize("value", ["gaussiank(adjust=1)", {"name": "gaussiank", "adjust": 1}, GaussianK(adjust=1)])
def test_a_selector_is_made_of_text_or_a_mapping(hint: Any, value: Any) -> None:
    assert _checked("some", SELECTOR, hint, value) == GaussianK(adjust=1)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("topkk", ["'topkk'", "did you mean 'topk'?"]),
        ({"name": "topk", "k": 1}, ["'k'", "'topk'"]),
        (3, ["selector=3", "'some'", "of type Selector, such as TopK()"]),
        (None, ["selector=None"]),
    ],
)
def test_what_is_no_selector(value: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        _checked("some", SELECTOR, Selector, value)
    for word in words:
        assert word in str(caught.value)
