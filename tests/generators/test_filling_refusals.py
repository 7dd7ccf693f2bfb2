"""What cannot be filled or written is refused, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators.errors import (
    CollapseError,
    ConfigError,
    ModelError,
    PowerhouseError,
    ProposalError,
    UnknownNameError,
)
from generators.filling import init
from generators.initialiser import InitialiserInfo, Kind, Proposal, Request, list_initialisers
from generators.pointwise import HE


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What is done inside leaves every tensor of the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    yield
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class Proposes:
    """An initialiser that proposes what it is told, HE for the rest."""

    name = "proposes"

    def __init__(self, key: str, value: Tensor, *, kind: Kind = Kind.POINTWISE, source: bool = True) -> None:
        self.key, self.value, self.kind, self.source = key, value, kind, source

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        proposal = HE.propose(model, request)
        proposal.values[self.key] = self.value
        if self.source:
            proposal.sources[self.key] = "told"
        return proposal


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (Proposes("0.weight", torch.full((16, 12), float("nan"))), ProposalError, "0.weight"),
        (Proposes("2.weight", torch.full((3, 16), float("inf"))), ProposalError, "infinity"),
        (Proposes("0.weight", torch.zeros(12, 16)), ProposalError, r"\(16, 12\), proposed was \(12, 16\)"),
        (Proposes("nowhere", torch.zeros(1)), ProposalError, "nowhere"),
        (Proposes("extra", torch.zeros(1), source=False), ProposalError, "extra"),
        (Proposes("0.weight", torch.ones(16, 12), kind=Kind.GLOBAL), CollapseError, "0.weight"),
    ],
)
def test_bad_proposals_are_refused(bad: Proposes, error: type[Exception], words: str) -> None:
    model = mlp()
    with unchanged(model), pytest.raises(error, match=words):
        init(model, bad)


def test_overflow_in_half_precision_is_refused() -> None:
    """1e6 is finite in float32 and infinite in the model's float16."""
    model = nn.Linear(4, 4).half()
    with unchanged(model), pytest.raises(ProposalError, match="float16"):
        init(model, Proposes("weight", torch.full((4, 4), 1e6)))


def test_failure_of_a_later_step_leaves_the_model() -> None:
    model = mlp()
    with unchanged(model), pytest.raises(ConfigError, match="needs data"):
        init(model, "he+lsuv")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.ReLU(), "no parameters"),
        (nn.Linear(2, 2, device="meta"), "to_empty"),
        (nn.LazyLinear(3), "run the model once"),
        ("resnet", "torch.nn.Module"),
    ],
)
def test_models_that_cannot_be_filled(model: nn.Module, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        init(model, "he")


def _made_for_inference() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(2, 2)


def _with_bias(value: Tensor) -> nn.Module:
    model = nn.Linear(2, 2)
    model.bias = nn.Parameter(value)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_made_for_inference, r"weight, which was made in torch.inference_mode\(\)"),
        (lambda: _with_bias(torch.zeros(1).expand(2)), r"bias, which holds one number at several places"),
        (lambda: _with_bias(torch.zeros(2).to_sparse()), r"bias, which is stored as sparse_coo"),
    ],
)
def test_memory_that_cannot_be_written_is_found_before_anything_is(make: Callable[[], nn.Module], words: str) -> None:
    """The weight in front of a bias stays as it was; frozen, the parameter is kept, and the rest is filled."""
    model = make()
    before = model.weight.detach().clone()
    with pytest.raises(ModelError, match=f"cannot write into {words}.*nothing was written"):
        init(model, "he")
    assert torch.equal(model.weight, before)
    if "bias" in words:
        model.bias.requires_grad_(False)
        assert init(model, "he").generated.keys() == {"weight"}


def test_what_was_made_for_inference_is_filled_there() -> None:
    with torch.inference_mode():
        model = nn.Linear(2, 2)
        assert init(model, "he").generated.keys() == {"weight", "bias"}


# ---- what comes from outside: chains, data, losses, weights ---------------------------------------------------------


INPUTS, TARGETS = torch.randn(16, 12, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
GOOD: dict[str, Any] = dict(data=[(INPUTS, TARGETS)] * 2, loss=F.cross_entropy)
REFINING = [info for info in list_initialisers() if info.kind == Kind.REFINING.value]


@pytest.mark.parametrize("info", REFINING, ids=lambda info: info.name)
@pytest.mark.parametrize("first", ["he", "weight-selection", "noise-ghn-digits"])
def test_a_full_initialiser_after_a_refining_one(info: InitialiserInfo, first: str) -> None:
    """It would undo it; and an unknown last step is found before the first one runs."""
    model = mlp()
    with unchanged(model), pytest.raises(ConfigError, match=f"{first}.* fills every weight .*; put it first"):
        init(model, f"{info.name}+{first}", relative=mlp(), **GOOD)
    with unchanged(model), pytest.raises(UnknownNameError, match=f"did you mean '{info.name}'"):
        init(model, f"he+{info.name}+{info.name}x", **GOOD)


BAD_DATA: dict[str, tuple[Any, str]] = {
    "none": (None, "needs data; pass data="),
    "empty": ([], "needs data, but the data passed is empty"),
    "exhausted": (iter([]), "needs data, but the data passed is empty"),
    "no iterable": (3, "must be an iterable of batches"),
    "no values": ([(INPUTS.to("meta"), TARGETS.to("meta"))] * 2, "on the meta device, which has no values; pass real"),
    "other shape": ([(INPUTS[:, :5], TARGETS)] * 2, "cannot be run on"),
}


@pytest.mark.parametrize("bad", BAD_DATA)
@pytest.mark.parametrize("info", [info for info in REFINING if "data" in info.needs], ids=lambda info: info.name)
def test_data_that_do_not_serve(info: InitialiserInfo, bad: str) -> None:
    """Found when the second step of a chain asks for them; the first has written nothing."""
    data, words = BAD_DATA[bad]
    model = mlp()
    with unchanged(model), pytest.raises(PowerhouseError, match=words):
        init(model, f"he+{info.name}", **GOOD | {"data": data})


BAD_LOSSES: dict[str, tuple[Any, str]] = {
    "none": (None, "needs loss; pass loss="),
    "per example": (lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none"), "a scalar"),
    "a number": (lambda outputs, targets: 1.0, "a scalar"),
    "NaN": (lambda outputs, targets: F.cross_entropy(outputs, targets) * torch.nan, "loss is nan"),
    "constant": (lambda outputs, targets: torch.tensor(1.0), "not differentiable"),
    "raising": (lambda outputs, targets: F.cross_entropy(outputs, targets[:3]), "the loss cannot be taken"),
}


@pytest.mark.parametrize("bad", BAD_LOSSES)
@pytest.mark.parametrize("info", [info for info in REFINING if "loss" in info.needs], ids=lambda info: info.name)
def test_losses_that_do_not_serve(info: InitialiserInfo, bad: str) -> None:
    loss, words = BAD_LOSSES[bad]
    model = mlp()
    with unchanged(model), pytest.raises(PowerhouseError, match=words):
        init(model, f"he+{info.name}", **GOOD | {"loss": loss})


@pytest.mark.parametrize("info", REFINING, ids=lambda info: info.name)
def test_a_model_that_is_zero_is_refused(info: InitialiserInfo) -> None:
    model = mlp()
    for value in model.parameters():
        nn.init.zeros_(value)
    with unchanged(model), pytest.raises(ModelError, match=rf"nothing for {info.name} to refine.*he\+{info.name}"):
        init(model, info.name, **GOOD)


@pytest.mark.parametrize("wrong", [{"seed": "a"}, {"seed": 1.5}, {"seed": None}, {"member": "b"}])
def test_seeds_that_are_no_whole_numbers(wrong: dict[str, Any]) -> None:
    model = mlp()
    with unchanged(model), pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be a whole number"):
        init(model, "he", **wrong)
