"""Dropout: every form against `torch.nn.functional` with the same masks, and masks that are each member's own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from collect.data import ImageSet, load
from collect.dropout import MaskedLinear, Masks, mask_classifier
from collect.forms import Loop, Vmap, agree, choose, template
from collect.grouped import Grouped
from collect.population import train
from collect.recipe import Recipe
from generators.commandline import Interrupted
from generators.errors import ConfigError
from generators.seeds import stream

CPU = torch.device("cpu")
RECIPE = Recipe(architecture="mlp-2-w16", epochs=1, batch_size=640, lr=0.05, saved="all", dropout=0.4)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return load("digits")


@pytest.mark.parametrize("architecture", ["mlp-2-w16", "resnet-8-w4", "vit-1-w16", "vgg-3-w4"])
def test_forms_agree_and_use_the_masks_in_training_only(architecture: str) -> None:
    """A mask of zeros leaves the bias of the classifier; names in the state dict are those without dropout."""
    shape, members, pictures = (1, 8, 8), 3, 5
    module = template(architecture, shape=shape, classes=10, dropout=True)
    plain = template(architecture, shape=shape, classes=10)
    assert list(module.state_dict()) == list(plain.state_dict())
    assert choose(architecture, shape=shape, classes=10, dropout=True).name == "grouped"
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: torch.randn(members, *value.shape, generator=generator) for name, value in module.named_parameters()
    }
    batch = torch.randn(members, pictures, *shape, generator=generator)
    masks = Masks(module, [1, 2, 3], dropout=0.5, batch_size=pictures, device=CPU)
    (name,) = masks.neutral

    def run(kind: type, part: nn.Module, changed: dict, *, training: bool) -> torch.Tensor:
        buffers = {key: torch.ones(members, *value.shape).to(value.dtype) for key, value in part.named_buffers()}
        return kind(part)(parameters, buffers | changed, batch, training=training)

    drawn, found = masks.draw(), {}
    for kind in (Loop, Vmap, Grouped) if architecture != "vgg-3-w4" else (Loop, Grouped):
        found[kind] = run(kind, module, drawn, training=True)
        torch.testing.assert_close(found[kind], found[Loop], rtol=1e-4, atol=1e-3)
        without = run(kind, plain, {}, training=True)
        torch.testing.assert_close(run(kind, module, masks.neutral, training=True), without)
        assert not torch.allclose(found[kind], without, atol=0.1)
        torch.testing.assert_close(run(kind, module, drawn, training=False), run(kind, plain, {}, training=False))
    nothing = run(Grouped, module, {name: torch.zeros_like(drawn[name])}, training=True)
    bias = parameters[name.removesuffix("mask") + "bias"]
    torch.testing.assert_close(nothing, bias[:, None].expand_as(nothing))
    assert agree(Grouped(module), Loop(module), shape)


def test_masks_have_the_mean_of_one_and_depend_on_the_seed_alone() -> None:
    module = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 10))
    mask_classifier(module)
    assert type(module[0]) is nn.Linear and type(module[1]) is MaskedLinear
    among = Masks(module, [7, 8], dropout=0.2, batch_size=1000, device=CPU)
    alone = Masks(module, [8], dropout=0.2, batch_size=1000, device=CPU)
    expected = stream(8, "dropout")
    for _ in range(2):
        (own,) = alone.draw().values()
        (both,) = among.draw().values()
        assert torch.equal(own[0], both[1]) and not torch.equal(both[0], both[1])
        assert torch.equal(own[0], (torch.rand(1000, 40, generator=expected) >= 0.2) / 0.8)
        assert set(own.unique().tolist()) == {0.0, 1.25} and abs(float(own.mean()) - 1) < 0.01


def test_without_dropout_nothing_is_drawn_and_without_a_linear_layer_it_is_refused() -> None:
    masks = Masks(nn.Linear(2, 2), [1], dropout=0.0, batch_size=4, device=CPU)
    before = masks.state()
    assert masks.draw() == masks.neutral == {} and torch.equal(masks.state(), before)
    with pytest.raises(ConfigError, match="no"):
        mask_classifier(nn.Conv2d(1, 1, 1))


def test_trained_with_dropout(images: ImageSet, tmp_path: Path) -> None:
    """Other networks than without, the same ones alone or among others, in stacks, and after a stop."""
    found = train(RECIPE, [3, 4, 5], images)
    assert found.form == "grouped" and set(found.status) == {"ok"}
    without = train(replace(RECIPE, dropout=0.0), [3, 4, 5], images)
    assert found.layout == without.layout and found.buffer_layout == without.buffer_layout
    assert np.array_equal(found.weights[:, 0], without.weights[:, 0])
    assert np.array_equal(found.metrics[:, 0], without.metrics[:, 0])  # measured without dropout
    assert np.abs(found.weights[:, 1] - without.weights[:, 1]).max() > 1e-3
    apart = train(RECIPE, [3, 4, 5], images, stack=2)
    np.testing.assert_allclose(apart.weights, found.weights, rtol=0, atol=1e-5)

    def stop(share: float) -> None:
        if share >= 0.5:
            raise Interrupted

    path = tmp_path / "state"
    with pytest.raises(Interrupted):
        train(RECIPE, [3, 4, 5], images, tick=stop, unfinished_path=path)
    again = train(RECIPE, [3, 4, 5], images, unfinished_path=path)
    assert np.array_equal(again.weights, found.weights) and np.array_equal(again.metrics, found.metrics)
