"""What training costs, in floating-point operations: an estimate, to balance work and to foresee it."""

from __future__ import annotations

import functools

import torch

from collect.architectures import build
from collect.data import ImageSet
from collect.recipe import Recipe
from generators.errors import ConfigError


@functools.cache
def forward_operations(architecture: str, shape: tuple[int, int, int], classes: int, batch: int) -> int:
    """Operations for one of `batch` images `(C, H, W)`, in training.

    The model runs on the meta device, so that a misfit of shapes shows here and not hours later.

    Raises:
        ConfigError: the network cannot be built for such images, or not be trained on so few at once.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports much

    with torch.device("meta"):
        model = build(architecture, shape=shape, classes=classes)
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            model(torch.empty(batch, *shape, device="meta"))
    except ValueError as error:  # batch norm over a single value
        raise ConfigError(
            f"{architecture} cannot be trained on batches of {batch} images of {shape[1]}x{shape[2]} ({error}); raise "
            "batch_size, or use larger images"
        ) from error
    return counter.get_total_flops() // batch


def operations(recipe: Recipe, images: ImageSet) -> int:
    """Operations to train one network.

    Raises:
        ConfigError: the architecture, or the batch size, does not fit the images.
    """
    recipe.evaluations(len(images.train))
    forward = forward_operations(recipe.architecture, images.shape, len(images.classes), min(recipe.batch_size, 2))
    return forward * 3 * recipe.epochs * len(images.train)  # a backward pass costs two forward passes
