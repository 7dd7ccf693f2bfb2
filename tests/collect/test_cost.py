"""The estimate of operations against counting by hand, and what cannot be trained at all."""

from __future__ import annotations

import pytest

from collect.cost import forward_operations, operations
from collect.data import load
from collect.recipe import Recipe
from generators.errors import ConfigError


def test_operations_of_an_mlp_and_a_convolution() -> None:
    """2 operations per weight and use; a 3x3 convolution with padding uses each weight once per pixel."""
    assert forward_operations("mlp-1-w16", (1, 8, 8), 10, 1) == 2 * (64 * 16 + 16 * 10)
    assert forward_operations("cnn-1-w4", (3, 6, 6), 10, 2) == 2 * (9 * 3 * 4 * 36 + 4 * 10)


def test_operations_of_a_training() -> None:
    """Three passes over 1295 training digits per epoch."""
    found = operations(Recipe(architecture="mlp-1-w16", epochs=7), load("digits"))
    assert found == 2 * (64 * 16 + 16 * 10) * 3 * 1295 * 7


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (dict(batch_size=5000), "1295 training images, too few"),
        (dict(batch_size=1295, evaluations_per_epoch=2), "2 evaluations per epoch"),
        (dict(architecture="resnet-8-w0"), "width must be at least 1"),
    ],
)
def test_recipes_that_do_not_fit(choices: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        operations(Recipe(**choices), load("digits"))


def test_batch_norm_needs_more_than_one_value() -> None:
    """4x4 images are one pixel in the last stage: enough with two of them."""
    assert forward_operations("resnet-8-w4", (1, 4, 4), 10, 2) > 0
    with pytest.raises(ConfigError, match="raise batch_size"):
        forward_operations("resnet-8-w4", (1, 4, 4), 10, 1)
