"""A GHN in deep networks without normalisation.

A decoded matrix has few directions, and a layer reads those that the layer before it writes. So activations grow there,
at 128 channels by a factor of up to 2.8 per layer: no harm behind batch norm, and elsewhere the GHN rescales.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import generators
from generators.ghn import ghn
from generators.ghn.config import GHNConfig
from generators.ghn.ghn import GHN
from generators.report import InitReport

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


def rescaled(report: InitReport) -> set[str]:
    accounts = report.generated | report.fallbacks
    return {name for name, account in accounts.items() if account.endswith("unit output spread on white noise")}


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("make", [perceptron, convnet])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_layer_keeps_its_spread(name: str, make: Callable, dtype: torch.dtype) -> None:
    """The spread before each activation is within a factor of 2 of 1, on other white noise than it was set on."""
    model, inputs = make()
    report = generators.init(model.to(dtype), GENERATORS[name](), example_inputs=inputs[:2].to(dtype))
    found = spreads(model.float(), inputs)
    assert min(found) > 0.5 and max(found) < 2, found
    assert len(rescaled(report)) >= LAYERS - 1
    (note,) = (note for note in report.notes if "in a row without normalisation" in note)
    assert f"{len(rescaled(report))} of its matrices were rescaled" in note


def test_half_precision_is_rounded_once() -> None:
    """The values are those of float32: only what is written is rounded."""
    (full, inputs), (half, _) = perceptron(), perceptron()
    generators.init(full, "noise-ghn-digits", example_inputs=inputs[:2])
    generators.init(half.bfloat16(), "noise-ghn-digits", example_inputs=inputs[:2].bfloat16())
    noise = [
        value.bfloat16().float() - other.float()
        for value, other in zip(full.parameters(), half.parameters(), strict=True)
    ]
    assert max(difference.abs().max() for difference in noise) < 0.02


@pytest.mark.parametrize("name", ["noise-ghn-digits", "core"])
@pytest.mark.parametrize("make", [perceptron, convnet])
def test_without_that_activations_grow(name: str, make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ghn, "rescale", lambda *_, **__: None)
    model, inputs = make()
    generators.init(model, GENERATORS[name](), example_inputs=inputs[:2])
    assert max(spreads(model, inputs)) > 100


def test_members_are_rescaled_one_by_one() -> None:
    """Each is what `init` gives, with data or without and whatever the batch of the example, and the model is not
    touched.
    """
    model, inputs = convnet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = generators.load("noise-ghn-digits")
    states = generator.sample(model, 3, seed=5, example_inputs=inputs[:2])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for member, data, example in ((0, None, inputs[:1]), (2, [(100 * inputs, None)], inputs)):
        report = generators.init(model, generator, seed=5, member=member, data=data, example_inputs=example)
        assert len(rescaled(report)) >= LAYERS - 1
        assert all(torch.equal(value, states[name][member]) for name, value in model.state_dict().items())


def test_frozen_layers_count_as_they_are() -> None:
    model, inputs = perceptron()
    model[4].weight.requires_grad_(False).mul_(20.0)
    kept = model[4].weight.clone()
    report = generators.init(model, "noise-ghn-digits", example_inputs=inputs[:2])
    assert torch.equal(model[4].weight, kept) and "4.weight" not in rescaled(report)
    found = spreads(model, inputs)
    assert found[2] > 5 and all(0.5 < value < 2 for value in (*found[:2], *found[3:])), found


def test_a_huge_frozen_layer_leaves_what_follows_alone() -> None:
    """No matrix is changed by more than a factor of 100, which would be taken for a collapse."""
    model, inputs = perceptron()
    model[4].weight.requires_grad_(False).mul_(1e6)
    report = generators.init(model, "noise-ghn-digits", example_inputs=inputs[:2])
    assert "2.weight" in rescaled(report) and "6.weight" not in rescaled(report)
    assert any("were not (" in note for note in report.notes)


def test_a_single_output_is_not_blown_up() -> None:
    """Of a few numbers that pooling has made nearly equal, the spread says nothing."""
    body, inputs = convnet()
    model = nn.Sequential(*list(body)[:-1], nn.Linear(body[-1].in_features, 1))
    for seed in range(4):
        generators.init(model, "noise-ghn-digits", seed=seed, example_inputs=inputs[:1])
        assert model[-1].weight.std() < 3 / math.sqrt(model[-1].in_features)


def test_hooks_of_the_user_do_not_run_and_what_cannot_be_copied_is_rescaled() -> None:
    model, inputs = perceptron()
    called: list[Tensor] = []
    for layer in model:
        layer.register_forward_hook(lambda _, __, output: called.append(output))
    model.lock = threading.Lock()
    assert len(rescaled(generators.init(model, "noise-ghn-digits", example_inputs=inputs[:2]))) >= LAYERS - 1
    assert not called


class TwoInputs(nn.Module):
    """An image-like input with a batch axis, and a vector that all inputs share."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, _ = perceptron()

    def forward(self, inputs: Tensor, shift: Tensor) -> Tensor:
        return self.layers(inputs + shift)


class Mixed(nn.Module):
    """Words and real numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, (self.layers, _) = nn.Embedding(10, 128), perceptron()

    def forward(self, inputs: Tensor, words: Tensor) -> Tensor:
        return self.layers(inputs + self.embedding(words))


@pytest.mark.parametrize(
    ("make", "example"),
    [
        (TwoInputs, (torch.zeros(2, 128), torch.zeros(128))),
        (TwoInputs, {"inputs": torch.zeros(2, 128), "shift": torch.zeros(128)}),
        (Mixed, (torch.zeros(2, 128), torch.tensor([1, 2]))),
    ],
)
def test_several_inputs(make: Callable, example: tuple | dict) -> None:
    report = generators.init(make(), "noise-ghn-digits", example_inputs=example)
    assert len(rescaled(report)) >= LAYERS - 1


def test_tied_and_computed_layers_are_named() -> None:
    model, inputs = perceptron()
    model[4].weight = model[2].weight
    nn.utils.parametrizations.weight_norm(model[6])
    report = generators.init(model, "noise-ghn-digits", example_inputs=inputs[:2])
    (note,) = (note for note in report.notes if "in a row without normalisation" in note)
    assert "were not (2.weight, 6." in note and not rescaled(report) & {"2.weight", "4.weight"}


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
    (note,) = (note for note in report.notes if "in a row without normalisation" in note)
    assert "+lsuv" in note and ("values above 1" in note) == (make is Picky) and not rescaled(report)


def test_layers_behind_a_normalised_backbone_keep_their_spread() -> None:
    """Ten layers with batch norm and ten without: a norm helps what follows it, and not what is far behind."""
    body, inputs = convnet()
    layers = list(body)
    normalised = [
        part if isinstance(part, nn.ReLU) else nn.Sequential(part, nn.BatchNorm2d(part.out_channels))
        for part in layers[:20]
    ]
    model = nn.Sequential(*normalised, *layers[20:])
    report = generators.init(model, "noise-ghn-digits", example_inputs=inputs[:2])
    assert any("9 layers in a row" in note or "10 layers in a row" in note for note in report.notes), report.notes
    found: list[float] = []
    behind = [layer for layer in model[20:] if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer in behind:
        layer.register_forward_hook(lambda _, __, output: found.append(output.std().item()))
    with torch.no_grad():
        model.train()(inputs)
    assert len(found) == len(behind) and min(found) > 0.5 and max(found) < 2, found


def test_parallel_layers_are_not_in_a_row() -> None:
    """Twenty branches of one layer each: nothing grows, so nothing is rescaled."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.ModuleList(nn.Linear(128, 64) for _ in range(LAYERS)), nn.Linear(64, 10)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(sum(layer(inputs) for layer in self.layers) / LAYERS)

    assert not rescaled(generators.init(Branches(), "noise-ghn-digits", example_inputs=torch.zeros(2, 128)))


def test_normalised_and_shallow_networks_are_left_alone() -> None:
    """As many layers with a norm that has no weights, and few layers without any, are not rescaled."""
    deep, _ = perceptron()
    few = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    parts = [part for layer in deep for part in (layer, nn.BatchNorm1d(128, affine=False))]
    for model in (few, nn.Sequential(*parts[:-2], deep[-1])):
        report = generators.init(model, "noise-ghn-digits", example_inputs=torch.zeros(2, 128))
        assert not rescaled(report) and not any("normalisation" in note for note in report.notes)


def test_one_norm_is_hardly_any() -> None:
    body, inputs = perceptron()
    model = nn.Sequential(nn.BatchNorm1d(128), *body)
    report = generators.init(model, "noise-ghn-digits", example_inputs=inputs[:2])
    assert len(rescaled(report)) >= LAYERS - 1 and max(spreads(model.eval(), inputs)) < 2
