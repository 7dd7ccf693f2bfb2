"""What training costs, in floating-point operations: an estimate, to balance work and to foresee it."""

from __future__ import annotations

import functools

import torch

from collect.architectures import build
from collect.data import ImageSet
from collect.recipe import Recipe
from generators.errors import ConfigError


@functools.cache
def forward_operations(architecture: str, shape: tuple[int, int, int], classes: int) -> int:
    """Operations for one image `(C, H, W)`; the model runs on the meta device, so a misfit of shapes shows here."""
    from torch.utils.flop_counter import FlopCounterMode  # imports much

    with torch.device("meta"):
        model = build(architecture, shape=shape, classes=classes).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops()


def operations(recipe: Recipe, images: ImageSet) -> int:
    """Operations to train one network.

    Raises:
        ConfigError: the architecture, or the batch size, does not fit the images.
    """
    if len(images.train) // recipe.batch_size < recipe.evaluations_per_epoch:
        raise ConfigError(
            f"{recipe.data} has {len(images.train)} training images, too few for {recipe.evaluations_per_epoch} "
            f"evaluations per epoch with batches of {recipe.batch_size}; lower one of the two"
        )
    forward = forward_operations(recipe.architecture, images.shape, len(images.classes))
    return forward * 3 * recipe.epochs * len(images.train)  # a backward pass costs two forward passes
