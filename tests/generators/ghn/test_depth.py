"""A GHN in deep networks without normalisation.

A decoded matrix has few directions, and a layer reads those that the layer before it writes. So activations grow there,
at 128 channels by a factor of up to 2.8 per layer: no harm behind batch norm, and elsewhere the GHN rescales.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import generators
from generators.ghn import ghn
from generators.ghn.config import GHNConfig
from generators.ghn.ghn import GHN

LAYERS = 20


def perceptron() -> tuple[nn.Module, Tensor]:
    layers = [part for _ in range(LAYERS - 1) for part in (nn.Linear(128, 128), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(128, 10)), torch.randn(256, 128, generator=torch.Generator().manual_seed(0))


def convnet() -> tuple[nn.Module, Tensor]:
    widths = (3, *(16, 32, 48, 64) * 5)[:LAYERS]
    layers = [part for i, o in itertools.pairwise(widths) for part in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU())]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    return nn.Sequential(*layers, *head), torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def spreads(model: nn.Module, inputs: Tensor) -> list[float]:
    """Of the output of every layer, before its activation."""
    found: list[float] = []
    layers = [layer for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(lambda _, __, output: found.append(output.std().item())) for layer in layers]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    assert len(found) == LAYERS
    return found


def untrained(decoder: str) -> GHN:
    return GHN(GHNConfig(decoder=decoder, anchor=0.7, code=8), name=f"untrained-{decoder}")


GENERATORS: dict[str, Callable[[], GHN]] = {
    **{name: partial(generators.load, name) for name in ("ghn-digits", "noise-ghn-digits")},
    **{decoder: partial(untrained, decoder) for decoder in ("core", "coordinate", "block")},
}


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("make", [perceptron, convnet])
@pytest.mark.parametrize("with_data", [False, True])
def test_every_layer_keeps_its_spread(name: str, make: Callable, with_data: bool) -> None:
    """The spread before each activation is within a factor of 2 of 1, on inputs that it was not set on.

    Without data it is set on white noise, with them on their first batch, here of another spread.
    """
    model, inputs = make()
    half, scale = len(inputs) // 2, 3.0 if with_data else 1.0
    data = [(scale * inputs[:half], None)] if with_data else None
    report = generators.init(model, GENERATORS[name](), data=data, example_inputs=inputs[:2])
    found = spreads(model, scale * inputs[half:])
    assert min(found) > 0.5 and max(found) < 2, found
    what = "the first batch of the data" if with_data else "white noise"
    assert any(note.endswith(f"so that of each layer was set to 1 on {what}") for note in report.notes)
    accounts = report.generated | report.fallbacks
    assert sum(account.endswith(f"unit output spread on {what}") for account in accounts.values()) >= LAYERS - 2


@pytest.mark.parametrize("name", ["noise-ghn-digits", "core"])
@pytest.mark.parametrize("make", [perceptron, convnet])
def test_without_that_activations_grow(name: str, make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ghn, "rescaled", lambda *_: None)
    model, inputs = make()
    generators.init(model, GENERATORS[name](), example_inputs=inputs[:2])
    assert max(spreads(model, inputs)) > 100


def test_members_are_rescaled_one_by_one() -> None:
    """Each is what `init` gives, the model is not touched, and the same seed gives the same bits."""
    model, inputs = convnet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = generators.load("noise-ghn-digits")
    states = generator.sample(model, 3, seed=5, example_inputs=inputs[:2])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for member in (0, 2):
        generators.init(model, generator, seed=5, member=member, example_inputs=inputs[:2])
        assert all(torch.equal(value, states[name][member]) for name, value in model.state_dict().items())


def test_frozen_layers_count_as_they_are() -> None:
    model, inputs = perceptron()
    model[4].weight.requires_grad_(False).mul_(100.0)
    kept = model[4].weight.clone()
    generators.init(model, "noise-ghn-digits", example_inputs=inputs[:2])
    assert torch.equal(model[4].weight, kept)
    found = spreads(model, inputs)
    assert found[2] > 10 and all(0.5 < value < 2 for value in (*found[:2], *found[3:])), found


class Picky(nn.Module):
    """Can be traced, and not be run on noise."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, _ = perceptron()

    def forward(self, inputs: Tensor) -> Tensor:
        if not inputs.is_meta and inputs.abs().max() > 1:
            raise ValueError("values above 1")
        return self.layers(inputs)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, (self.layers, _) = nn.Embedding(10, 128), perceptron()

    def forward(self, words: Tensor) -> Tensor:
        return self.layers(self.embedding(words))


@pytest.mark.parametrize(
    ("make", "example"), [(Picky, torch.eye(2, 128)), (Words, torch.zeros(2, 5, dtype=torch.long))]
)
def test_what_cannot_be_rescaled_gets_a_note_with_the_way_out(make: Callable, example: Tensor) -> None:
    report = generators.init(make(), "noise-ghn-digits", example_inputs=example)
    (note,) = (note for note in report.notes if "no normalisation" in note)
    assert "+lsuv" in note and ("values above 1" in note) == (make is Picky)
    assert not any("rescaled" in account for account in report.generated.values())
    report = generators.init(make(), "noise-ghn-digits", data=[(example, None)], example_inputs=example)
    assert any("rescaled" in account for account in report.generated.values())


def test_normalised_and_shallow_networks_are_left_alone() -> None:
    """As many layers with a norm that has no weights, and few layers without any, are not rescaled."""
    deep, _ = perceptron()
    few = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    parts = [part for layer in deep for part in (layer, nn.BatchNorm1d(128, affine=False))]
    for model in (few, nn.Sequential(*parts[:-2], deep[-1])):
        report = generators.init(model, "noise-ghn-digits", example_inputs=torch.zeros(2, 128))
        assert not any("rescaled" in account for account in report.generated.values())
        assert not any("normalisation" in note for note in report.notes)
