"""What every registered initialiser keeps to, on small models of every family and real digits."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from generators.errors import PowerhouseError
from generators.filling import init
from generators.hyperfan import MainLayer
from generators.initialiser import Initialiser, Kind, Proposal, Request, list_initialisers, needs_of, resolve
from generators.report import InitReport
from small_models import Forward

ITERATIONS = 3  # of the initialisers that search; their own tests give them what they need


# ---- models ---------------------------------------------------------------------------------------------------------


def conv_net(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * width, 10),
    )  # fmt: skip


def residual_net(width: int) -> nn.Module:
    """Without normalisation; the second block changes width and resolution."""

    def block(inputs: int, outputs: int) -> nn.Module:
        return Forward(
            lambda m, x: F.relu(m.short(x) + m.second(F.relu(m.first(x)))),
            first=nn.Conv2d(inputs, outputs, 3, outputs // inputs, 1), second=nn.Conv2d(outputs, outputs, 3, 1, 1),
            short=nn.Conv2d(inputs, outputs, 1, 2) if outputs > inputs else nn.Identity(),
        )  # fmt: skip

    blocks = block(width, width), block(width, 2 * width)
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(1, width, 3, 1, 1), nn.ReLU(), *blocks, *pool, nn.Linear(2 * width, 10))


def encoder(width: int) -> nn.Module:
    return nn.TransformerEncoderLayer(
        width, 2, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


def vision_transformer(width: int) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        patches = m.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(len(x), -1, -1), patches], dim=1) + m.table
        return m.head(m.norm(m.body(x))[:, 0])

    return Forward(
        forward, stem=nn.Conv2d(1, width, 4, 4), token=nn.Parameter(torch.zeros(1, 1, width)),
        table=nn.Parameter(torch.zeros(1, 5, width)), body=nn.Sequential(encoder(width), encoder(width)),
        norm=nn.LayerNorm(width), head=nn.Linear(width, 10),
    )  # fmt: skip


def depthwise_net(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3, groups=width), nn.GroupNorm(1, width), nn.SiLU(),
        nn.Conv2d(width, 2 * width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip


def mlp(*sizes: int) -> nn.Module:
    layers = [nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in itertools.pairwise((64, *sizes))]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], 10))


def recurrent_net(width: int) -> nn.Module:
    return Forward(
        lambda m, x: m.head(m.body(x[:, 0])[0][:, -1]),
        body=nn.LSTM(8, width, 2, batch_first=True), head=nn.Linear(width, 10),
    )  # fmt: skip


def language_model(width: int) -> nn.Module:
    """Causal, over 17 grey values; the head is the table of embeddings."""

    def forward(m: Any, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return m.head(m.norm(m.body(m.words(x) + m.places(torch.arange(x.shape[1])), mask, is_causal=True)))

    model = Forward(
        forward, words=nn.Embedding(17, width), places=nn.Embedding(12, width), body=encoder(width),
        norm=nn.LayerNorm(width), head=nn.Linear(width, 17, bias=False),
    )  # fmt: skip
    model.head.weight = model.words.weight
    return model


class Hypernetwork(nn.Module):
    """One hidden layer makes a main network of 64, 12 and 10 units, biases included."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.code, self.hidden = nn.Embedding(1, 8), nn.Linear(8, width)
        self.weights = nn.ModuleList([nn.Linear(width, 64 * 12), nn.Linear(width, 12 * 10)])
        self.biases = nn.ModuleList([nn.Linear(width, 12), nn.Linear(width, 10)])

    def main_layers(self) -> dict[str, MainLayer]:
        first, second = MainLayer(64, 12, bias="biases.0"), MainLayer(12, 10, relu=False, bias="biases.1")
        return {"weights.0": first, "weights.1": second}

    def forward(self, x: Tensor) -> Tensor:
        e = self.hidden(self.code.weight[0]).relu()
        x = F.relu(x.flatten(1) @ self.weights[0](e).unflatten(0, (64, 12)) + self.biases[0](e))
        return x @ self.weights[1](e).unflatten(0, (12, 10)) + self.biases[1](e)


@functools.cache
def digits(numbers: bool = False) -> tuple[Tensor, Tensor]:
    """Real digits `[16, 1, 8, 8]` and their classes; or 12 of their grey values in a row and the ones that follow."""
    data = load_digits()
    if numbers:
        values = torch.tensor(data.images[:16]).flatten(1)[:, 18:31].long()
        return values[:, :-1], values[:, 1:]
    images = torch.tensor(data.images[:16], dtype=torch.float32)[:, None]
    return (images - images.mean()) / images.std(), torch.tensor(data.target[:16])


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@dataclass(frozen=True)
class Case:
    """How a model and its larger relative are made, and whether it reads tokens."""

    model: Callable[[], nn.Module]
    relative: Callable[[], nn.Module]
    tokens: bool = False


MODELS = {
    "conv": Case(lambda: conv_net(4), lambda: conv_net(8)),
    "residual": Case(lambda: residual_net(4), lambda: residual_net(6)),
    "vit": Case(lambda: vision_transformer(8), lambda: vision_transformer(12)),
    "depthwise": Case(lambda: depthwise_net(4), lambda: depthwise_net(6)),
    "mlp": Case(lambda: mlp(24, 16), lambda: mlp(48, 24, 32, 16)),  # deeper, too: some layers can be fused
    "lstm": Case(lambda: recurrent_net(8), lambda: recurrent_net(12)),
    "gpt": Case(lambda: language_model(8), lambda: language_model(12), tokens=True),
    "hypernetwork": Case(lambda: Hypernetwork(16), lambda: Hypernetwork(24)),
}

REGISTERED = [info.name for info in list_initialisers() if "checkpoint" not in info.needs]
GENERATORS = ("conv-vae-digits", "ghn-digits", "noise-ghn-digits")
NO_HYPERNETWORK = (MODELS.keys() - {"hypernetwork"}, "is for hypernetworks, .*; give it a method main_layers")
REFUSED: dict[str, tuple[set[str], str]] = {
    "hyperfan": NO_HYPERNETWORK,
    "hyperfan-out": NO_HYPERNETWORK,
    "hyperfan-harmonic": NO_HYPERNETWORK,
    "layer-fusion": (MODELS.keys() - {"mlp"}, "layer-fusion cannot work with .*; it takes nn.Sequential of"),
}
"""Initialiser -> the models that it cannot serve, and what it says to them: the reason and the way out."""


# ---- the contract ---------------------------------------------------------------------------------------------------


def make(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def named(name: str) -> Initialiser:
    """The initialiser, with few iterations if it is one that iterates."""
    made: Any = resolve(name)[0]
    return dataclasses.replace(made, iterations=ITERATIONS) if hasattr(made, "iterations") else made


def fill(step: Initialiser, model: nn.Module, case: Case, *, seed: int = 0, member: int = 0) -> InitReport:
    batch = digits(case.tokens)
    relative = make(case.relative, 1) if "relative" in needs_of(step) else None
    return init(
        model, step, seed=seed, member=member, data=[batch, batch], loss=cross_entropy, relative=relative,
        example_inputs=batch[0],
    )  # fmt: skip


def states() -> list[Any]:
    """Of the global random number generators, comparable."""
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]


def flags(model: nn.Module) -> list[Any]:
    """What an initialiser has no business with: identity and memory of tensors, modes, gradients, hooks."""
    tensors = [(name, id(value), value.data_ptr(), value.requires_grad, value.dtype, value.shape, value.grad)
               for name, value in model.state_dict(keep_vars=True).items()]  # fmt: skip
    modules = [(id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [tensors, modules]


def equal(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def keeps_contract(step: Initialiser, case: Case, words: str = "") -> None:
    """Assert it of one initialiser and one model; with `words`, that the model is refused and stays as it was."""
    model = make(case.model)
    next(model.children()).eval()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    start, before = copy.deepcopy(model), (states(), flags(model))
    if words:
        with pytest.raises(PowerhouseError, match=re.compile(words, re.DOTALL)):
            fill(step, model, case)
        assert equal(model, start) and (states(), flags(model)) == before
        return

    report = fill(step, model, case)
    assert states() == before[0], "the global random states are as they were"
    assert flags(model) == before[1], "identity, modes and gradients are as they were"
    tensors = model.state_dict()
    assert sorted([*report.generated, *report.fallbacks, *report.kept]) == sorted(tensors), "together 100 %, each once"
    assert all(torch.isfinite(value).all() for value in tensors.values()), "finite"
    for key, reason in report.kept.items():
        assert reason.startswith("tied to") or torch.equal(tensors[key], start.state_dict()[key]), f"{key} is kept"
    batch = digits(case.tokens)
    assert torch.isfinite(cross_entropy(copy.deepcopy(model).train()(batch[0]), batch[1])), "a finite forward"

    again, other, frozen = make(case.model), make(case.model), make(case.model)
    fill(step, again, case)
    assert equal(again, model), "the same seed gives the same bits"
    fill(step, other, case, member=1)
    if equal(other, model):
        fill(step, again := make(case.model), case, seed=1)
        assert equal(again, model), "the seed matters, so the member must"

    name, weight = max(frozen.named_parameters(), key=lambda pair: pair[1].numel())
    value = weight.requires_grad_(False).clone()
    report = fill(step, frozen, case)
    assert torch.equal(weight, value) and name in report.kept and not weight.requires_grad, "frozen ones are kept"


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("name", [*REGISTERED, *GENERATORS])
def test_contract(name: str, model_name: str) -> None:
    models, words = REFUSED.get(name, (set(), ""))
    keeps_contract(named(name), MODELS[model_name], words if model_name in models else "")


class Careless:
    """Breaks the contract in the way that it is told."""

    name, kind = "careless", Kind.REFINING

    def __init__(self, fault: str) -> None:
        self.fault, self.calls = fault, 0

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        name, weight = next(iter(model.named_parameters()))
        value = weight.detach().clone()
        self.calls += 1
        if self.fault == "global":
            value += torch.rand(())
        elif self.fault == "mode":
            model.eval()
        elif self.fault == "writes":
            weight.data.add_(1)
            return Proposal()
        elif self.fault == "calls":
            value += self.calls
        elif self.fault == "member":
            value += request.seed
        elif self.fault == "infinite":
            value += torch.finfo(value.dtype).max
        return Proposal({name: value}, {name: self.name})


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("global", "the global random states"), ("mode", "identity, modes"), ("writes", "0.weight is kept"),
        ("calls", "the same bits"), ("member", "so the member must"), ("infinite", "a finite forward"),
    ],
)  # fmt: skip
def test_the_contract_can_fail(fault: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        keeps_contract(Careless(fault), MODELS["conv"])
    keeps_contract(Careless(""), MODELS["conv"])
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        keeps_contract(Careless(""), MODELS["conv"], "cannot be served")


def test_the_table_of_refusals_names_what_exists() -> None:
    assert REFUSED.keys() <= set(REGISTERED)
    assert all(models <= MODELS.keys() for models, _ in REFUSED.values())
