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
from generators.initialiser import Kind, Proposal, register, resolve
from generators.pointwise import HE


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
