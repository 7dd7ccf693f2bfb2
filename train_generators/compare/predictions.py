"""What the members of an arm predict on clean and shifted images, before and after training, as ensembles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collect.stacked import CALIBRATION_IMAGES, predict
from train_generators.compare.curves import Arm
from train_generators.compare.ensembles import METRICS, Quality, image_scores, member_sets, quality
from train_generators.compare.shifts import SEVERITIES, ShiftedSet

IMAGES_PER_CALL = 20_000
BATCH = 1024  # images at a time; small networks spend their time between calls, not in them
WHEN = ("before", "after")
CLEAN = ("", 0)


@dataclass(frozen=True)
class EnsembleResult:
    """The ensembles of one arm, before or after training.

    Attributes:
        members: runs per ensemble.
        sets: how many ensembles were drawn.
        cells: (shift, severity) -> one `Quality` per ensemble; `("", 0)` are the clean test images.
        clean_scores: accuracy, NLL and Brier on clean images, image by image `[N]`, averaged over the ensembles.
        member_accuracies: accuracy of every run on the clean test images `[K]`, NaN for runs that did not finish.
    """

    members: int
    sets: int
    cells: dict[tuple[str, int], list[Quality]]
    clean_scores: dict[str, np.ndarray] = field(repr=False)
    member_accuracies: np.ndarray = field(repr=False)

    def mean(self, metric: str, cell: tuple[str, int] = CLEAN) -> float:
        """Mean of `metric` over the ensembles in one cell."""
        return float(np.mean([getattr(one, metric) for one in self.cells[cell]]))

    def by_severity(self, metric: str) -> dict[int, float]:
        """Severity -> `metric` averaged over ensembles and kinds of shift; severity 0 is clean."""
        values: dict[int, list[float]] = {}
        for (shift, severity), _ in self.cells.items():
            values.setdefault(severity, []).append(self.mean(metric, (shift, severity)))
        return {severity: float(np.mean(values[severity])) for severity in SEVERITIES if severity in values}


def _calls(sets: Sequence[ShiftedSet]) -> list[list[ShiftedSet]]:
    """The test sets in groups of at most `IMAGES_PER_CALL` images, so that one prediction serves many."""
    groups: list[list[ShiftedSet]] = [[]]
    for one in sets:
        if groups[-1] and sum(len(other.images) for other in groups[-1]) + len(one.images) > IMAGES_PER_CALL:
            groups.append([])
        groups[-1].append(one)
    return groups


def checkpoint_index(population: Any, when: str) -> int | None:
    """Where the weights before or after training lie among the checkpoints; None if they were not saved."""
    epochs = [float(epoch) for epoch in population.checkpoint_epochs]
    if when == "after":
        return len(epochs) - 1
    return epochs.index(0.0) if 0.0 in epochs else None


@torch.inference_mode()
def _logits(population: Any, rows: list[int], checkpoint: int, sets: Sequence[ShiftedSet], images: Any) -> list[Tensor]:
    """Logits `[len(rows), N, C]` per test set of the given runs of one population."""
    states = {name: tensor[rows] for name, tensor in population.states(checkpoint=checkpoint).items()}
    calibrated = population.recipe.statistics == "train"
    calibration = images.train.images[:CALIBRATION_IMAGES] if calibrated else None
    found: list[Tensor] = []
    for group in _calls(sets):
        together = predict(
            population.recipe.architecture, states, torch.cat([one.images for one in group]),
            shape=images.shape, classes=len(images.classes), calibration=calibration, batch=BATCH,
        )  # fmt: skip
        found += together.float().split([len(one.images) for one in group], dim=1)
    return found


def evaluate(
    arm: Arm,
    when: str,
    sets: Sequence[ShiftedSet],
    images: Any,
    *,
    size: int,
    most_sets: int,
    seed: int,
    on_call: Callable[[], object] = lambda: None,
) -> EnsembleResult | None:
    """Ensembles of the finished runs of `arm`; None if the weights were not saved or fewer than two runs finished.

    Args:
        arm: K runs.
        when: "before" or "after" training.
        sets: test sets, the clean one first.
        images: the `collect.data.ImageSet` that the arm was trained on.
        size: members per ensemble (all runs, if there are fewer).
        most_sets: ensembles to draw, if there are enough runs.
        seed: of the draw.
        on_call: called after each population that was read.
    """
    finished = np.flatnonzero(arm.finished).tolist()
    chosen = member_sets(len(finished), size, most_sets, seed=seed)
    if not chosen:
        return None
    logits: list[list[Tensor]] = [[torch.empty(0)] * len(sets) for _ in arm.seeds]
    populations = {id(population): population for population, _ in (arm.sources[row] for row in finished)}
    for population in populations.values():
        checkpoint = checkpoint_index(population, when)
        if checkpoint is None:
            return None
        mine = [row for row in finished if arm.sources[row][0] is population]
        for number, cell in enumerate(
            _logits(population, [arm.sources[row][1] for row in mine], checkpoint, sets, images)
        ):
            for place, row in enumerate(mine):
                logits[row][number] = cell[place]
        on_call()
    cells: dict[tuple[str, int], list[Quality]] = {}
    for number, one in enumerate(sets):
        stacked = torch.stack([logits[row][number] for row in finished])
        cells[one.shift, one.severity] = [quality(stacked[list(members)], one.labels) for members in chosen]
    clean = torch.stack([logits[row][0] for row in finished])
    scores = [image_scores(clean[list(members)], sets[0].labels) for members in chosen]
    accuracies = np.full(len(arm.seeds), np.nan)
    accuracies[finished] = (clean.argmax(-1) == sets[0].labels).double().mean(dim=1).numpy()
    return EnsembleResult(
        members=len(chosen[0]),
        sets=len(chosen),
        cells=cells,
        clean_scores={name: torch.stack([one[name] for one in scores]).mean(0).numpy() for name in scores[0]},
        member_accuracies=accuracies,
    )


def ensemble_figures(result: EnsembleResult) -> dict[str, float]:
    """Flat figures: "clean/nll", "severity_3/nll" (mean over the kinds of shift), ..."""
    figures: dict[str, float] = {"members": result.members, "sets": result.sets}
    for metric in METRICS:
        for severity, value in result.by_severity(metric).items():
            figures[f"{f'severity_{severity}' if severity else 'clean'}/{metric}"] = value
    figures["clean/member_accuracy"] = result.mean("member_accuracy")
    return figures
