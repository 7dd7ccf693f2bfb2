"""Computed weights: after filling, a layer computes the weight that was drawn, whatever it held before."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import generators
from generators.parametrised import singular_vectors

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")

WRAPS = {
    "weight norm": parametrizations.weight_norm,
    "weight norm by columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "weight norm as a whole": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "old weight norm": nn.utils.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "old spectral norm": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "orthogonal without base": lambda layer: parametrizations.orthogonal(layer, use_trivialization=False),
}


def made(wrap: str, layer: nn.Module, old: float) -> nn.Module:
    """A model whose weights were trained, or spoilt, by a factor."""
    model = nn.Sequential(WRAPS[wrap](layer), nn.Flatten(), nn.LazyLinear(10))
    model(torch.zeros(2, 6, 8, 8) if isinstance(layer, nn.Conv2d) else torch.zeros(2, 48))
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(old)
    return model.eval()


def example(layer: nn.Module) -> Tensor:
    return torch.zeros(2, 6, 8, 8) if isinstance(layer, nn.Conv2d) else torch.zeros(2, 48)


@pytest.mark.parametrize(
    ("wrap", "make"),
    [(wrap, partial(nn.Linear, 48, 40)) for wrap in WRAPS]
    + [(wrap, partial(nn.Conv2d, 6, 40, 3)) for wrap in WRAPS if "orthogonal" not in wrap],  # it takes single kernels
)
@pytest.mark.parametrize("name", ["he", "noise-ghn-digits", "torch"])
def test_the_layer_computes_what_was_drawn(name: str, wrap: str, make) -> None:
    """Up to what the parametrisation is there for: spectral norm 1, orthogonal rows. The weights before do not show."""
    layers = [make() for _ in range(2)]
    for layer, old in zip(layers, (1.0, 7.0), strict=True):
        model = made(wrap, layer, old)
        report = generators.init(model, name, example_inputs=example(layer))
        model(example(layer))  # the hooks of old compute the weight then
    weight, other = (layer.weight.detach().flatten(1) for layer in layers)
    assert torch.equal(weight, other), "what it held before does not show"
    accounts = " ".join((report.generated | report.fallbacks).values())
    assert ("follows" in accounts) == (wrap != "orthogonal without base")
    values = torch.linalg.svdvals(weight)
    if "orthogonal" in wrap:
        torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-4, atol=1e-4)
        return
    (drawn,) = (
        value.detach().flatten(1)
        for key, value in model.state_dict().items()
        if (key.startswith("0.") and key.endswith(("original1", "original", "weight_orig")))
        or (key == "0.weight_v" and wrap == "old weight norm")
    )  # fmt: skip
    if "spectral" in wrap:
        drawn = drawn / torch.linalg.svdvals(drawn)[0]
        torch.testing.assert_close(weight, drawn, rtol=0.02, atol=0)
    else:
        torch.testing.assert_close(weight, drawn)
        fan_in, reset = layer.weight[0].numel(), name == "torch" and wrap != "old weight norm"
        target = 1 / math.sqrt(3 * fan_in) if reset else math.sqrt(2 / fan_in)
        assert weight.std().item() == pytest.approx(target, rel=0.1)


@pytest.mark.parametrize("wrap", WRAPS)
def test_members_are_those_of_init(wrap: str) -> None:
    layer = nn.Linear(48, 40)
    model = made(wrap, layer, 3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = generators.load("noise-ghn-digits").sample(model, 3, seed=5, example_inputs=example(layer))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for member in range(3):
        generators.init(model, "noise-ghn-digits", seed=5, member=member, example_inputs=example(layer))
        for name, value in model.state_dict().items():
            assert torch.equal(value, states[name][member]), name


@pytest.mark.parametrize("wrap", ["weight norm", "old weight norm"])
def test_a_frozen_part_is_kept(wrap: str) -> None:
    layer = nn.Linear(48, 40)
    model = made(wrap, layer, 3.0)
    (gain,) = (value for name, value in model.named_parameters() if name.endswith(("original0", "_g")))
    kept = gain.requires_grad_(False).clone()
    report = generators.init(model, "he")
    assert torch.equal(gain, kept) and not any("follows" in source for source in report.generated.values())
    generators.init(model, "he", frozen=True)
    assert not torch.equal(gain, kept)


class Exponential(nn.Module):
    """Positive weights: most drawn ones have no logarithm."""

    def forward(self, value: Tensor) -> Tensor:
        return value.exp()

    def right_inverse(self, value: Tensor) -> Tensor:
        return value.log()


class OneWay(nn.Module):
    """Cannot be taken apart."""

    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


@pytest.mark.parametrize("part", [Exponential, OneWay])
def test_what_cannot_be_taken_apart_is_written_as_it_is_drawn(part: type[nn.Module]) -> None:
    layer = nn.Linear(48, 40)
    parametrize.register_parametrization(layer, "weight", part(), unsafe=part is Exponential)
    report = generators.init(nn.Sequential(layer), "he")
    assert report.generated["0.parametrizations.weight.original"] == "he"
    assert layer.parametrizations.weight.original.std().item() == pytest.approx(math.sqrt(2 / 48), rel=0.05)


def test_singular_vectors() -> None:
    """Against the decomposition, for a matrix whose first two singular values differ by a tenth."""
    left, values, right = torch.linalg.svd(torch.randn(30, 20, generator=torch.Generator().manual_seed(0)))
    values[0] = 1.1 * values[1]
    matrix = left[:, :20] * values @ right
    u, v = singular_vectors(matrix)
    assert (u @ matrix @ v).item() == pytest.approx(values[0].item(), rel=1e-3)
    assert abs(u @ left[:, 0]) > 0.99 and abs(v @ right[0]) > 0.99
