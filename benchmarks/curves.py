"""What the training studies share: their recipe, and the curves of a zoo by architecture, start and learning rate, as
table, picture and figures. `train_generators compare` does more (tests, ensembles), and takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

from collect.recipe import Recipe
from collect.zoo import Zoo
from train_generators.compare.plots import STYLE, columns, png

RECIPE = Recipe(
    epochs=1, batch_size=128, augmentation="flip-crop", weight_decay=1e-4, evaluations_per_epoch=3,
    evaluation_steps=(50, 200), precision="bfloat16",
)  # fmt: skip
"""One epoch of CIFAR-10."""


@dataclass(frozen=True)
class Curve:
    """Test accuracies of the R networks of one start at one learning rate.

    Attributes:
        architecture: of the networks.
        start: chain of initialisers.
        lr: learning rate.
        steps: S evaluations, in training steps.
        accuracy: `[R, S]`, in [0, 1].
    """

    architecture: str
    start: str
    lr: float
    steps: tuple[int, ...]
    accuracy: np.ndarray

    @property
    def std(self) -> np.ndarray:
        """Over the networks, `[S]`; 0 for a single one."""
        return self.accuracy.std(0, ddof=min(1, len(self.accuracy) - 1))


def curves(folder: Path, recipes: Sequence[Recipe]) -> list[Curve]:
    """A curve for each of the recipes that `folder` has networks of, the best at the end first."""
    wanted = {(recipe.architecture, recipe.init, recipe.lr) for recipe in recipes}
    parts: dict[tuple[str, str, float], list[tuple[Sequence[int], np.ndarray]]] = {}
    for population in Zoo(folder).populations:
        recipe, column = population.recipe, population.metric_names.index("test_accuracy")
        key = (recipe.architecture, recipe.init, recipe.lr)
        if key in wanted:
            parts.setdefault(key, []).append((population.evaluation_steps, population.metrics[:, :, column]))
    found = [
        Curve(*key, tuple(map(int, rows[0][0])), np.concatenate([accuracy for _, accuracy in rows]))
        for key, rows in parts.items()
    ]
    return sorted(found, key=lambda curve: -curve.accuracy[:, -1].mean())


def best_rates(folders: Sequence[Path], recipes: Sequence[Recipe]) -> list[Recipe]:
    """For every architecture and start of `recipes`, in their order, the rate that ended best on validation images.

    The networks of all zoos in `folders` count alike; one that diverged is worth less than any other.
    """
    ends: dict[tuple[str, str], dict[float, list[float]]] = {}
    for population in (each for folder in folders for each in Zoo(folder).populations):
        recipe, column = population.recipe, population.metric_names.index("validation_accuracy")
        rates = ends.setdefault((recipe.architecture, recipe.init), {})
        found = [-1.0 if math.isnan(value) else float(value) for value in population.metrics[:, -1, column]]
        rates.setdefault(recipe.lr, []).extend(found)
    means = {key: {lr: sum(found) / len(found) for lr, found in rates.items()} for key, rates in ends.items()}
    named = {(recipe.architecture, recipe.init): recipe for recipe in recipes}
    return [replace(recipe, lr=max(means[key], key=means[key].__getitem__)) for key, recipe in named.items()]


def table(found: Sequence[Curve]) -> str:
    """Markdown: test accuracy in %, mean, with the standard deviation over the networks at the end."""
    heads = ["architecture", "start", "lr", *(f"step {step}" for step in found[0].steps)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for curve in found:
        means, std = 100 * curve.accuracy.mean(0), 100 * curve.std[-1]
        cells = [*(f"{mean:.1f}" for mean in means[:-1]), f"{means[-1]:.1f} ± {std:.1f}"]
        lines.append(f"| {' | '.join([curve.architecture, curve.start, f'{curve.lr:g}', *cells])} |")
    return "\n".join(lines) + "\n"


def picture(found: Sequence[Curve]) -> bytes:
    """The curves of one architecture with their ranges, as PNG."""
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 6), layout="constrained")
        axes = figure.subplots()
        names = [f"{curve.start}, lr {curve.lr:g}" for curve in found]
        for number, (curve, name) in enumerate(zip(found, names, strict=True)):
            colour, values = colormaps["tab20"](number % 20), 100 * curve.accuracy
            axes.plot(curve.steps, values.mean(0), color=colour, label=name, marker=".")
            axes.fill_between(curve.steps, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
        title = f"{found[0].architecture}: test accuracy in %, mean and range of the networks"
        axes.set(xlabel="training step", title=title, xlim=(0, None))
        figure.legend(loc="outside lower center", ncols=columns(names, 3))
        return png(figure)


def figures(found: Sequence[Curve]) -> dict[str, float]:
    """Flat: `ARCHITECTURE/START/LR/accuracy_STEP`, mean and `_std`."""
    flat = {}
    for curve in found:
        for step, mean, std in zip(curve.steps, curve.accuracy.mean(0), curve.std, strict=True):
            name = f"{curve.architecture}/{curve.start}/{curve.lr:g}/accuracy_{step}"
            flat |= {name: float(mean), f"{name}_std": float(std)}
    return flat
