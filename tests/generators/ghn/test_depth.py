"""A GHN in deep networks without normalisation.

A decoded matrix has few directions, and a layer reads those that the layer before it writes. So activations grow there,
at 128 channels by a factor of up to 2.8 per layer: no harm behind batch norm, and elsewhere LSUV mends it.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import generators

LAYERS = 20


def perceptron() -> tuple[nn.Module, Tensor]:
    layers = [part for _ in range(LAYERS - 1) for part in (nn.Linear(128, 128), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(128, 10)), torch.randn(256, 128, generator=torch.Generator().manual_seed(0))


def convnet() -> tuple[nn.Module, Tensor]:
    widths = (3, *(16, 32, 48, 64) * 5)[:LAYERS]
    layers = [part for i, o in itertools.pairwise(widths) for part in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU())]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    return nn.Sequential(*layers, *head), torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["ghn-digits", "noise-ghn-digits"])
@pytest.mark.parametrize("make", [perceptron, convnet])
def test_with_lsuv_every_layer_keeps_its_spread(name, make):
    """The spread before each activation is within a factor of 2 of 1, on data that LSUV has not seen."""
    model, inputs = make()
    half = len(inputs) // 2
    generators.init(model, f"{name}+lsuv", data=[(inputs[:half], None)], example_inputs=inputs[:half])
    found: list[float] = []
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda _, __, output: found.append(output.std().item()))
    with torch.no_grad():
        model(inputs[half:])
    assert len(found) == LAYERS and min(found) > 0.5 and max(found) < 2, found


def test_depth_without_normalisation_gets_a_note():
    """As many layers with a norm that has no weights, and few layers without any, get none."""
    deep, _ = perceptron()
    few = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    parts = [part for layer in deep for part in (layer, nn.BatchNorm1d(128, affine=False))]
    for model, noted in ((deep, True), (few, False), (nn.Sequential(*parts[:-2], deep[-1]), False)):
        notes = generators.init(model, "noise-ghn-digits", example_inputs=torch.zeros(2, 128)).notes
        assert any("such as +lsuv" in note for note in notes) is noted, notes
