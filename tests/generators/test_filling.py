"""The contract of `init`, for every pointwise initialiser and every kind of model: see the words of each test."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from generators.checkpoint import load
from generators.filling import init
from generators.initialiser import Kind, list_initialisers
from generators.pointwise import HE

# ---- models: small, and each with something that is easily got wrong


class ConvNet(nn.Module):
    """Convolutions (grouped, depthwise, transposed), batch norm with statistics that are not the start values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.PReLU(),
            nn.Conv2d(8, 16, 1, groups=2), nn.GroupNorm(2, 16), nn.ConvTranspose2d(16, 6, 2),
        )  # fmt: skip
        self.head = nn.Linear(6, 10)
        with torch.no_grad():
            self.body[1].running_mean.fill_(3.0)
            self.body[1].num_batches_tracked.fill_(7)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((2, 3)))


class Tied(nn.Module):
    """The output layer shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 6)
        self.output = nn.Linear(6, 11, bias=False)
        self.output.weight = self.embedding.weight


class Padded(nn.Module):
    """Word 3 is none; the table is that of the head, which comes first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head, self.words = nn.Linear(width, 9, bias=False), nn.Embedding(9, width, padding_idx=3)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x))


class Loose(nn.Module):
    """Free parameters, buffers of several types, a layer without bias, a frozen and a single-value parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 5, 4))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.linear = nn.Linear(4, 4, bias=False)
        self.still = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("mask", torch.ones(4, dtype=torch.bool))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def _frozen_body() -> nn.Module:
    model = ConvNet()
    model.body.requires_grad_(False)
    return model


MODELS = {
    "conv": ConvNet,
    "mlp": lambda: nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)),
    "lstm": lambda: nn.LSTM(5, 7, num_layers=2, bidirectional=True),
    "gru": lambda: nn.GRU(5, 7),
    "transformer": lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
    "attention": lambda: nn.MultiheadAttention(12, 3, kdim=5, vdim=7),
    "tied": Tied,
    "frozen": _frozen_body,
    "half": lambda: ConvNet().half(),
    "bfloat16": lambda: nn.TransformerEncoderLayer(16, 4, 32).bfloat16(),
    "loose": Loose,
}
POINTWISE = [  # hyperfan is for hypernetworks
    info.name for info in list_initialisers()
    if info.kind == Kind.POINTWISE.value and not info.needs and not info.name.startswith("hyperfan")
]  # fmt: skip
WITHOUT_DRAWS = ("dirac",)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def fingerprints() -> dict[str, str]:
    """Model and initialiser -> hash of the bytes of all initialised tensors. Also run in a second process."""
    found = {}
    for model_name, build in MODELS.items():
        for name in POINTWISE:
            torch.manual_seed(0)  # for what the initialiser keeps of the constructor
            model = build()
            init(model, name, seed=5, member=2)
            digest = hashlib.sha256()
            for key, value in model.state_dict().items():
                digest.update(
                    key.encode() + value.contiguous().view(torch.uint8 if value.ndim else value.dtype).numpy().tobytes()
                )
            found[f"{model_name} {name}"] = digest.hexdigest()
    return found


# ---- the contract


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("model_name", MODELS)
def test_contract(model_name: str, name: str) -> None:
    """Finite; identical from two different starts; every tensor in the report once; frozen and objects kept."""
    first, second = MODELS[model_name](), MODELS[model_name]()
    with torch.no_grad():
        for value in second.parameters():
            if value.requires_grad:
                value.add_(1.0)  # another start: what is generated must not depend on it
    before, objects = _state(first), {key: id(value) for key, value in first.named_parameters()}

    report = init(first, name, seed=3)
    other = init(second, name, seed=3)

    after = first.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    accounted = [*report.generated, *report.fallbacks, *report.kept]
    assert sorted(accounted) == sorted(after)
    assert report.generated == other.generated
    for key in report.generated:
        assert torch.equal(after[key], second.state_dict()[key])
    tied = {key for key, reason in report.kept.items() if "tied to" in reason}
    for key in report.kept.keys() - tied:
        assert torch.equal(after[key], before[key]), key
    assert {key: id(value) for key, value in first.named_parameters()} == objects
    assert {key: value.dtype for key, value in after.items()} == {key: value.dtype for key, value in before.items()}
    assert all(value.grad is None for value in first.parameters())


def test_same_bits_in_another_process() -> None:
    """All models x initialisers give the same bytes here and in a fresh interpreter."""
    load_and_print = (
        "import importlib.util as u, json, sys; s = u.spec_from_file_location('contract', sys.argv[1]); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(json.dumps(m.fingerprints()))"
    )
    root = Path(__file__).parents[2]
    answer = subprocess.run(
        [sys.executable, "-c", load_and_print, __file__], capture_output=True, text=True, check=True, cwd=root
    )
    here = fingerprints()
    assert here == json.loads(answer.stdout)
    assert len({here[f"conv {name}"] for name in POINTWISE}) == len(POINTWISE)


@pytest.mark.parametrize("name", POINTWISE)
def test_global_random_state_is_untouched(name: str) -> None:
    model = ConvNet()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    init(model, name)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tobytes() == states[2]


@pytest.mark.parametrize("name", [name for name in POINTWISE if name not in WITHOUT_DRAWS])
def test_members_and_seeds_differ(name: str) -> None:
    """Another member or seed gives other weights in every matrix; member 3 asked for directly is the same."""
    weights = {}
    for seed, member in ((0, 0), (0, 3), (1, 0)):
        model = MODELS["mlp"]()
        init(model, name, seed=seed, member=member)
        weights[seed, member] = model[0].weight.detach().clone()
    assert not torch.equal(weights[0, 0], weights[0, 3])
    assert not torch.equal(weights[0, 0], weights[1, 0])


def test_adding_a_layer_does_not_move_the_other_draws() -> None:
    short, long = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    init(short, "he")
    init(long, "he")
    assert torch.equal(short[0].weight, long[0].weight)
    assert not torch.equal(long[0].weight, long[1].weight)


# ---- what is kept


def test_frozen_parameters_and_their_statistics_are_kept() -> None:
    """A frozen backbone computes the same function afterwards; with frozen=True it is filled like the rest."""
    model = _frozen_body().eval()
    images = torch.ones(2, 3, 8, 8)
    before = model.body(images)
    report = init(model, "he")
    assert torch.equal(model.body(images), before)
    assert "frozen" in report.kept["body.0.weight"]
    assert "frozen" in report.kept["body.1.running_mean"]
    report = init(model, "he", frozen=True)
    assert not torch.equal(model.body(images), before)
    assert {"body.0.weight", "body.1.running_mean"} <= report.generated.keys()


def test_running_statistics_are_reset() -> None:
    model = ConvNet()
    init(model, "he")
    assert model.body[1].running_mean.eq(0).all()
    assert model.body[1].running_var.eq(1).all()
    assert model.body[1].num_batches_tracked == 0


def test_tied_weights_stay_tied() -> None:
    model = Tied()
    report = init(model, "xavier")
    assert model.output.weight is model.embedding.weight
    assert report.kept["output.weight"] == "tied to embedding.weight"


@pytest.mark.parametrize("spec", ["he", "torch", "orthogonal", "noise-ghn-digits", "weight-selection"])
def test_padding_stays_empty(spec: str) -> None:
    """The vector that stands for no word is 0, in members too, and where the table is tied to the head before it."""
    model, tokens = Padded(4), torch.zeros(2, 5, dtype=torch.long)
    for value in model.parameters():
        nn.init.ones_(value)
    init(model, spec, relative=Padded(8), example_inputs=tokens)
    assert model.words.weight[3].eq(0).all() and model.words.weight.ne(0).any(1).sum() == 8
    if spec == "noise-ghn-digits":
        states = load(spec).sample(model, 2, example_inputs=tokens)
        assert states["words.weight"][:, 3].eq(0).all() and states["words.weight"].ne(0).any(2).sum() == 16


def test_parameters_in_the_same_memory_are_filled_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[0].weight.data)
    alone = nn.Sequential(nn.Linear(4, 4))
    report = init(model, "he")
    init(alone, "he")
    assert report.kept == {"1.weight": "tied to 0.weight"}
    assert torch.equal(model[0].weight, alone[0].weight) and torch.equal(model[1].weight, alone[0].weight)


def _facts(model: nn.Module) -> list:
    """All of a model but the numbers in it."""
    called = [(name, module.training, sorted(vars(module)), list(module._forward_hooks), list(module._backward_hooks))
              for name, module in model.named_modules()]  # fmt: skip
    values = [(name, id(v), v.data_ptr(), v.dtype, v.stride(), v.requires_grad, id(v.grad), v.is_leaf)
              for name, v in model.state_dict(keep_vars=True).items()]  # fmt: skip
    return [called, values]


@pytest.mark.parametrize("spec", ["he", "noise-ghn-digits"])
def test_nothing_but_numbers_changes(spec: str) -> None:
    """Objects, memory, types, gradients, modes, hooks and random states are as before, and no hook has run."""
    model = _frozen_body()
    images = torch.ones(2, 3, 8, 8)
    model(images).sum().backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.body[0].eval()
    runs: list = []
    model.body.register_forward_hook(lambda *_: runs.append(1))
    model.body.register_full_backward_hook(lambda *_: runs.append(1))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    facts, before = _facts(model), _state(model)
    init(model, spec, example_inputs=images)
    assert _facts(model) == facts and runs == []
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert gradients and _same(found, gradients)
    assert not _same(_state(model), before), "the numbers did change"
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tobytes() == states[2]


@pytest.mark.parametrize("spec", ["he", "he+lsuv", "he+nio", "he+fixup", "noise-ghn-digits"])
def test_compiled_models_are_filled_as_what_they_were_made_from(spec: str) -> None:
    """The same bits under other names. Nothing is compiled for it, for the compiler of this test refuses."""

    def refuse(*_: object) -> None:
        raise AssertionError("it was compiled")

    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    given = dict(data=[(torch.randn(32, 1, 8, 8), torch.arange(32) % 10)], loss=nn.functional.cross_entropy)
    wrapped = torch.compile(copy.deepcopy(model), backend=refuse)
    first, second = init(model, spec, **given), init(wrapped, spec, **given)
    assert [f"_orig_mod.{name}" for name in first.generated] == list(second.generated)
    assert list(first.generated.values()) == list(second.generated.values())
    assert set(wrapped.state_dict()) == {*second.generated, *second.fallbacks, *second.kept}
    assert _same(_state(model), _state(wrapped._orig_mod))


# ---- chains and the report


def test_chain_applies_in_order() -> None:
    """`he+lsuv` writes what lsuv makes of a model that he has filled."""
    batch = [(torch.linspace(-1, 1, 96).reshape(8, 12), None)]
    chained, stepwise = MODELS["mlp"](), MODELS["mlp"]()
    report = init(chained, "he+lsuv", seed=1, data=batch)
    init(stepwise, "he", seed=1)
    init(stepwise, "lsuv", seed=1, data=batch)
    assert _same(_state(chained), _state(stepwise))
    assert report.generated["0.weight"].startswith("he, then lsuv")


def test_an_object_is_an_initialiser() -> None:
    by_name, by_object = MODELS["mlp"](), MODELS["mlp"]()
    init(by_name, "he")
    init(by_object, HE)
    assert _same(_state(by_name), _state(by_object))


def test_report_measures_every_generated_matrix() -> None:
    """The report's figures equal those of the written weights."""
    model = copy.deepcopy(MODELS["conv"]())
    report = init(model, "he")
    state = model.state_dict()
    matrices = {name for name, value in state.items() if value.ndim > 1}
    assert report.statistics.keys() == matrices
    for name in matrices:
        assert report.statistics[name]["std"] == pytest.approx(state[name].std().item(), rel=1e-6)


def test_figures_of_tensors_that_a_fallback_made() -> None:
    """The generator leaves the output layer to He; what the next step did to it is in the report all the same."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))
    report = init(model, "conv-vae-digits+lsuv", data=[torch.randn(8, 1, 8, 8, generator=torch.manual_seed(0))])
    assert "2.weight" in report.fallbacks
    assert report.statistics["2.weight"].keys() >= {"scale", "std_before", "std_after"}


@pytest.mark.parametrize("spec", ["he+lsuv", "he+nio", "he+emergence"])
def test_frozen_parameters_are_refined_if_asked(spec: str) -> None:
    """With `frozen=True`, what `requires_grad` says makes no difference to any step of a chain."""
    draw = torch.Generator().manual_seed(0)
    batch = torch.randn(16, 6, generator=draw), torch.arange(16) % 3
    free, stuck = (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
    stuck.requires_grad_(False)
    for model in (free, stuck):
        init(model, spec, data=[batch], loss=nn.functional.cross_entropy, frozen=True)
    assert not any(value.requires_grad for value in stuck.parameters())
    for name, value in free.named_parameters():
        assert torch.equal(stuck.get_parameter(name), value), name
