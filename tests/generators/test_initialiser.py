"""Names and chains of initialisers: what resolves, what is refused with a way out, and how third parties register."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import generators
from generators import initialiser
from generators.errors import ConfigError, UnknownNameError
from generators.filling import init
from generators.generator import Generator
from generators.initialiser import Kind, Proposal, Request, list_initialisers, needs_of, register, resolve
from generators.pointwise import HE
from generators.published import list_generators


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("hee", UnknownNameError, "did you mean 'he'"),
        ("he+orthogonal", ConfigError, "put it first"),
        ("he+", ConfigError, "empty step"),
        ("", ConfigError, "empty step"),
        (3, ConfigError, "int"),
        ("no/such/folder+lsuv", generators.PowerhouseError, "no such folder"),
    ],
)
def test_bad_chains(spec: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        resolve(spec)


def test_third_parties_register_through_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialiser, "_REGISTRY", dict(initialiser._REGISTRY))
    ones = SimpleNamespace(name="ones", kind=Kind.POINTWISE, propose=lambda model, request: Proposal(
        {info.name: torch.ones(info.shape) for info in request.inventory},
        {info.name: "ones" for info in request.inventory},
    ))  # fmt: skip
    entry = SimpleNamespace(load=lambda: register("ones", kind=Kind.POINTWISE)(lambda: ones))
    calls = iter([[entry]])
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: next(calls, []))
    model = nn.Linear(4, 3)
    init(model, "ones")
    assert all(value.eq(1).all() for value in model.parameters())


def test_names_are_registered_once() -> None:
    with pytest.raises(ConfigError, match="registered already"):
        register("he", kind=Kind.POINTWISE)(lambda: HE)
    with pytest.raises(ConfigError, match=r"'\+'"):
        register("he+he", kind=Kind.POINTWISE)(lambda: HE)


def test_a_need_that_is_not_known() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'data'"):
        register("mine", kind=Kind.REFINING, needs=("dat",))(Asking)


@pytest.mark.parametrize("info", list_initialisers(), ids=lambda info: info.name)
def test_rows_tell_what_the_initialiser_says_of_itself(info: initialiser.InitialiserInfo) -> None:
    (made,) = resolve(info.name)
    assert (made.name, made.kind.value) == (info.name, info.kind)
    assert needs_of(made) == set(info.needs) - {"checkpoint"} == set(getattr(made, "needs", ()))
    assert info.summary


def test_published_generators_are_listed_with_what_they_need() -> None:
    rows = {info.name: info for info in list_initialisers() if "checkpoint" in info.needs}
    assert list(rows) == [entry.name for entry in list_generators()]
    for entry in list_generators():
        row, generator = rows[entry.name], generators.load(entry.name)
        assert isinstance(generator, Generator) and row.needs == ("checkpoint",)
        assert (row.kind, row.paper) == (generator.kind.value, generator.card["paper"])


class Asking:
    """Keeps the request; tells a figure of a tensor and one of the step."""

    name, kind = "asking", Kind.REFINING

    def __init__(self, *needs: str) -> None:
        self.needs = needs

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        self.request = request
        value = model.get_parameter("weight").detach() * 2
        return Proposal(
            {"weight": value}, {"weight": "asking"}, statistics={"weight": {"scale": 2.0}}, figures={"steps": 3.0}
        )


@pytest.mark.parametrize("need", ["data", "loss", "relative"])
def test_what_a_step_needs_must_be_given(need: str) -> None:
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    with pytest.raises(ConfigError, match=f"asking needs {need}; pass {need}="):
        init(model, Asking(need))
    assert torch.equal(model.weight, before)


def test_the_graph_is_traced_only_for_those_who_need_it() -> None:
    plain, asking = Asking(), Asking("graph")
    init(nn.Linear(4, 3), plain)
    init(nn.Linear(4, 3), asking)
    assert plain.request.graph is None
    assert asking.request.graph is not None and asking.request.graph.by_parameter["weight"] is not None


def test_what_a_step_tells_is_in_the_report() -> None:
    report = init(nn.Linear(4, 3), Asking())
    assert report.statistics["weight"]["scale"] == 2.0 and report.statistics["weight"]["std"] > 0
    assert report.figures == {"asking": {"steps": 3.0}}
    assert f"asking: {report.seconds['asking']:.3g} s, steps 3" in str(report)


def test_a_class_is_no_initialiser() -> None:
    with pytest.raises(ConfigError, match="the class Asking; pass an instance"):
        init(nn.Linear(4, 3), Asking)  # type: ignore[arg-type]


def test_kinds_may_be_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialiser, "_REGISTRY", dict(initialiser._REGISTRY))
    worded = Asking()
    worded.kind = "refining"  # type: ignore[assignment]
    register("asking", kind="refining")(lambda: worded)  # type: ignore[arg-type]
    assert "then asking" in init(nn.Linear(4, 3), "he+asking").generated["weight"]
    with pytest.raises(UnknownNameError, match="did you mean 'refining'"):
        register("other", kind="refine")(Asking)  # type: ignore[arg-type]


def test_a_broken_package_of_a_third_party_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load() -> None:
        raise ImportError("no module named nowhere")

    entry = SimpleNamespace(name="theirs", value="nowhere:initialisers", load=load)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry] if "initialisers" in group else [])
    init(nn.Linear(4, 3), "he")
    assert "theirs (nowhere:initialisers) cannot be loaded" in caplog.text
