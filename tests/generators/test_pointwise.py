"""Pointwise initialisers against the formulas of their papers and against torch.nn.init."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from generators.filling import init
from generators.initialiser import Proposal, Request
from generators.inventory import inventory
from generators.pointwise import HE, TABLE_STD, Pointwise, normal
from small_models import InputFirst, attention_block

SPREADS = (
    "he", "he-uniform", "he-truncated", "he-out", "he-out-uniform", "xavier", "xavier-uniform", "lecun",
    "lecun-uniform",
)  # fmt: skip
LAYERS = {
    "linear": nn.Linear(300, 200),
    "conv": nn.Conv2d(32, 48, 3),
    "grouped": nn.Conv2d(64, 64, 3, groups=4),
    "conv1d": nn.Conv1d(40, 60, 5),
}


def _filled(layer: nn.Module, name: str) -> Tensor:
    init(layer, name, seed=11)
    return layer.weight.detach().clone()


def _std_by_torch(layer: nn.Module, name: str) -> float:
    """Standard deviation that torch.nn.init gives the same weight, from a large sample of its own fan rules."""
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
    fan_out //= getattr(layer, "groups", 1)  # torch counts the outputs of all groups, each input feeds one
    return {
        "he": math.sqrt(2 / fan_in),
        "he-uniform": math.sqrt(2 / fan_in),
        "he-truncated": math.sqrt(2 / fan_in),
        "he-out": math.sqrt(2 / fan_out),
        "he-out-uniform": math.sqrt(2 / fan_out),
        "xavier": math.sqrt(2 / (fan_in + fan_out)),
        "xavier-uniform": math.sqrt(2 / (fan_in + fan_out)),
        "lecun": math.sqrt(1 / fan_in),
        "lecun-uniform": math.sqrt(1 / fan_in),
    }[name]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", SPREADS)
def test_spread(layer: str, name: str) -> None:
    """Mean 0 and the spread of the formula, within 4 standard errors of > 9,000 draws."""
    weight = _filled(LAYERS[layer], name)
    expected = _std_by_torch(LAYERS[layer], name)
    assert weight.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * weight.numel()))
    assert abs(weight.mean().item()) < 4 * expected / math.sqrt(weight.numel())


@pytest.mark.parametrize(("name", "square"), [("he", 6 / 300), ("he-out", 6 / 200), ("lecun", 3 / 300)])
def test_uniform_is_bounded_and_normal_is_not(name: str, square: float) -> None:
    uniform, normal = _filled(LAYERS["linear"], f"{name}-uniform"), _filled(LAYERS["linear"], name)
    bound = math.sqrt(square)
    assert 0.99 * bound < uniform.abs().max() <= bound
    assert normal.abs().max() > 1.5 * bound


def test_cut_normal_has_the_spread_of_the_whole_one() -> None:
    """Nothing beyond 2 / 0.8796 standard deviations; a million draws have the wanted one within 4 standard errors.

    0.8796 by hand: the variance of a standard normal variable cut at 2 is 1 - 4 f(2) / (2 F(2) - 1).
    """
    density, inside = math.exp(-2.0) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2.0))
    kept = math.sqrt(1 - 4 * density / inside)
    weight, std = _filled(nn.Linear(1000, 1000), "he-truncated"), math.sqrt(2 / 1000)
    assert 0.999 * 2 * std / kept < weight.abs().max() <= 2 * std / kept
    assert weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * weight.numel()))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_orthogonal(shape: tuple[int, int]) -> None:
    """The shorter side's vectors are orthogonal with length sqrt 2."""
    weight = _filled(nn.Linear(shape[1], shape[0]), "orthogonal").double()
    gram = weight @ weight.T if shape[0] < shape[1] else weight.T @ weight
    torch.testing.assert_close(gram, 2 * torch.eye(min(shape), dtype=torch.float64), atol=1e-5, rtol=0)


def test_stacked_matrices_are_drawn_one_by_one() -> None:
    """Query, key and value (and the gates of an LSTM) differ, and each has the spread of one matrix."""
    attention, lstm = nn.MultiheadAttention(64, 4), nn.LSTM(48, 96)
    init(attention, "xavier")
    init(lstm, "orthogonal")
    query, key, value = attention.in_proj_weight.detach().chunk(3)
    for block in (query, key, value):
        assert block.std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.05)
    assert not torch.equal(query, key)
    assert not torch.equal(key, value)
    for gate in lstm.weight_hh_l0.detach().double().chunk(4):
        torch.testing.assert_close(gate @ gate.T, 2 * torch.eye(96, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["orthogonal", "delta-orthogonal"])
def test_stacked_matrices_that_are_stored_input_first(name: str) -> None:
    """They stand side by side: each of query, key and value is orthogonal, and no two are alike."""
    block = attention_block(fused=True, width=16, linear=InputFirst)
    init(block, name, example_inputs=torch.zeros(2, 3, 16))
    matrices = block.qkv.weight.detach().double().chunk(3, dim=1)
    for matrix in matrices:
        torch.testing.assert_close(matrix @ matrix.T, 2 * torch.eye(16, dtype=torch.float64), atol=1e-5, rtol=0)
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(matrices, 2))


def test_everything_else() -> None:
    """Biases and shifts 0, scales 1, embeddings N(0, 1)."""
    model = nn.ModuleDict(
        {
            "norm": nn.LayerNorm(5),
            "linear": nn.Linear(5, 5),
            "embedding": nn.Embedding(500, 20),
            "conv": nn.Conv2d(1, 3, 3),
        }
    )
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(9.0)
    init(model, "he")
    for name in ("norm.bias", "linear.bias", "conv.bias"):
        assert model.get_parameter(name).eq(0).all()
    assert model["norm"].weight.eq(1).all()
    assert model["embedding"].weight.std().item() == pytest.approx(1.0, rel=0.03)


def test_truncated_normal() -> None:
    weight = _filled(LAYERS["linear"], "trunc-normal")
    assert weight.std().item() == pytest.approx(TABLE_STD, rel=0.02)


def test_what_a_rule_lacks_is_made_by_he() -> None:
    """The weights of `he`, bit by bit, under fallbacks with the reason; the rest by the initialiser itself."""
    model, same = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    narrow = Pointwise("narrow", normal(lambda info: 1.0), lacks=lambda info: "too wide" if info.fan_in > 3 else "")
    report = init(model, narrow, seed=2)
    init(same, "he", seed=2)
    assert report.fallbacks == {"0.weight": "he (narrow: too wide)"}
    assert report.generated["1.weight"] == "narrow"
    assert torch.equal(model[0].weight, same[0].weight)


def test_as_a_named_fallback() -> None:
    """`fill(because=...)` books the tensor under fallbacks, with the reason, and gives the same value."""
    model = nn.Linear(3, 2)
    request = Request(inventory(model), seed=4)
    own, fallback = HE.propose(model, request), Proposal()
    HE.fill(fallback, request.inventory["weight"], request, because="kernel size never seen")
    assert torch.equal(own.values["weight"], fallback.values["weight"])
    assert fallback.fallbacks == {"weight": "he (kernel size never seen)"}
    assert not fallback.sources
