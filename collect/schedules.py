"""Learning rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from collect.recipe import Recipe

STEP_DROPS = (0.5, 0.75)  # of training, each by a factor of 10, as for the CIFAR ResNets of He et al. 2016

_FACTORS: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),  # Loshchilov and Hutter, 2017, arXiv 1608.03983
    "linear": lambda done: 1 - done,
    "step": lambda done: 0.1 ** sum(done >= drop for drop in STEP_DROPS),
    "constant": lambda done: 1.0,
}


def learning_rate(recipe: Recipe, step: int, *, steps_per_epoch: int) -> float:
    """The learning rate of `step`, counted from 0.

    It rises linearly to `recipe.lr` over the warm-up, whose last step already has the full rate, then follows the
    schedule from 1 (first step after the warm-up) towards its end, which the step after the last would reach.
    """
    warmup = round(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    total = recipe.epochs * steps_per_epoch
    return recipe.lr * _FACTORS[recipe.schedule]((step - warmup) / (total - warmup))
