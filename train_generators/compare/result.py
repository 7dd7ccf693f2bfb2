"""What a comparison found, as plain values: rows, horizons, and the flat figures that results.json holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from train_generators.compare.config import CompareConfig
from train_generators.compare.curves import Arm, Choice
from train_generators.compare.predictions import EnsembleResult, ensemble_figures
from train_generators.compare.statistics import Paired, Spread


@dataclass(frozen=True)
class Horizon:
    """Test accuracy and loss at one evaluation; differences to the baseline and `p_holm` are None for the baseline.

    Only accuracies are tested: `p_holm` is theirs. Of zoos that hold no test loss it is NaN.
    """

    step: int
    epoch: float
    accuracy: Spread
    loss: Spread
    difference: Paired | None
    loss_difference: Paired | None
    p_holm: float | None


@dataclass(frozen=True)
class Row:
    """Everything about one (architecture, initialiser).

    Attributes:
        choice: the learning rates that were tried, and the chosen arm.
        is_baseline: whether this is what the others are compared with.
        target: the accuracy of "steps to target".
        steps_to_target: per run; infinity for runs that never got there.
        differences: paired difference of test accuracy to the baseline per evaluation `[E]`; () for the baseline.
        horizons: accuracies at the chosen steps, the first before training, the last at the end.
        story: who leads when, in words made from `differences`; "" for the baseline.
        ensembles: "before" and "after" training, where there are weights for it.
        ensemble_differences: "before" and "after" -> metric -> difference to the baseline's ensembles, paired by image.
    """

    choice: Choice
    is_baseline: bool
    target: float
    steps_to_target: tuple[float, ...]
    differences: tuple[Paired, ...]
    horizons: tuple[Horizon, ...]
    story: str
    ensembles: dict[str, EnsembleResult] = field(default_factory=dict)
    ensemble_differences: dict[str, dict[str, Paired]] = field(default_factory=dict)

    @property
    def arm(self) -> Arm:
        """The runs with the chosen learning rate."""
        return self.choice.arm

    @property
    def label(self) -> str:
        """Short name of the initialiser."""
        return self.arm.label

    @property
    def unfinished(self) -> dict[str, int]:
        """How many runs ended in another status than "ok", per status."""
        others = [status for status in self.arm.status if status != "ok"]
        return {status: others.count(status) for status in sorted(set(others))}


@dataclass(frozen=True)
class ComparisonResult:
    """What `run` found.

    Attributes:
        config: what was asked.
        folder: where the report lies.
        rows: one per (architecture, initialiser), the baseline first within its architecture.
        notes: what a reader must know: left-out runs, missing weights, rates at the edge of the sweep, ...
        figures: flat figures, name -> number ("resnet-14-w8/ghn/accuracy_end_mean", ...).
        facts: machine, versions, commit, data and recipe.
        tests: how many p-values the Holm correction counts.
    """

    config: CompareConfig
    folder: Path
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    figures: dict[str, float]
    facts: dict[str, Any]
    tests: int

    @property
    def architectures(self) -> list[str]:
        """In the order of the rows."""
        return list(dict.fromkeys(row.arm.architecture for row in self.rows))

    def of(self, architecture: str) -> list[Row]:
        """The rows of one architecture."""
        return [row for row in self.rows if row.arm.architecture == architecture]


def flat_figures(rows: Sequence[Row]) -> dict[str, float]:
    """Flat figures of all rows; NaN and infinity are left to the JSON writer."""
    figures: dict[str, float] = {}
    for row in rows:
        start, end = row.horizons[0], row.horizons[-1]
        values: dict[str, float] = {
            "lr": row.arm.lr,
            "runs": len(row.arm.seeds),
            "finished": int(row.arm.finished.sum()),
            "accuracy_start_mean": start.accuracy.mean,
            "accuracy_start_std": start.accuracy.std,
            "accuracy_end_mean": end.accuracy.mean,
            "accuracy_end_std": end.accuracy.std,
            "target": row.target,
            "steps_to_target_median": float(np.median(row.steps_to_target)),
            "steps_to_target_reached": sum(math.isfinite(steps) for steps in row.steps_to_target),
        }
        for horizon in row.horizons:
            values[f"step_{horizon.step}/accuracy_mean"] = horizon.accuracy.mean
            values[f"step_{horizon.step}/accuracy_std"] = horizon.accuracy.std
            values[f"step_{horizon.step}/loss_mean"] = horizon.loss.mean
            values[f"step_{horizon.step}/loss_std"] = horizon.loss.std
            if horizon.loss_difference is not None:
                for name in ("mean", "low", "high"):
                    values[f"step_{horizon.step}/loss_difference_{name}"] = getattr(horizon.loss_difference, name)
            if horizon.difference is not None and horizon.p_holm is not None:
                for name in ("n", "mean", "low", "high", "p"):
                    values[f"step_{horizon.step}/difference_{name}"] = getattr(horizon.difference, name)
                values[f"step_{horizon.step}/difference_p_holm"] = horizon.p_holm
        for when, found in row.ensembles.items():
            values |= {f"ensemble_{when}/{name}": value for name, value in ensemble_figures(found).items()}
        for when, by_metric in row.ensemble_differences.items():
            for metric, difference in by_metric.items():
                for name in ("mean", "low", "high"):
                    values[f"ensemble_{when}/clean/{metric}_difference_{name}"] = getattr(difference, name)
        figures |= {f"{row.arm.architecture}/{row.label}/{name}": float(value) for name, value in values.items()}
    return figures
