"""From populations to arms: all runs of one (architecture, initialiser, learning rate), and the choice of the rate.

A population is read through the attributes of `collect.zoo`'s population view: `recipe`, `seeds`, `status`, `metrics`
[K, E, M], `metric_names`, `evaluation_steps` [E], `evaluation_epochs` [E]. Arms of one architecture must come from the
same recipe but for `init` and `lr`; otherwise a difference between them would not be due to the initialiser.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from generators.errors import ConfigError, ZooError, unknown_name
from train_generators.compare.statistics import Spread, spread

FREE_FIELDS = frozenset({"data", "architecture", "init", "init_digest", "lr", "saved"})
"""Fields of a recipe that may differ: `data` is where it lies (its digest is compared), `saved` only what is kept."""


@dataclass(frozen=True)
class Arm:
    """The runs of one (architecture, initialiser, learning rate), ordered by seed.

    Attributes:
        architecture: as in the recipe, for example "resnet-14-w8".
        init: as in the recipe: a name, a chain or the place of a checkpoint.
        label: a short unique name of `init` for tables and plots.
        lr: learning rate.
        seeds: K seeds.
        status: K words, ok | diverged | stopped.
        steps: evaluated training steps `[E]`, 0 included.
        epochs: the same in epochs `[E]`.
        metrics: metric name -> `[K, E]`; NaN after a run has diverged.
        sources: K pairs (population, index of the run in it).
    """

    architecture: str
    init: str
    label: str
    lr: float
    seeds: tuple[int, ...]
    status: tuple[str, ...]
    steps: np.ndarray
    epochs: np.ndarray
    metrics: dict[str, np.ndarray]
    sources: tuple[tuple[Any, int], ...]

    @property
    def finished(self) -> np.ndarray:
        """Which runs came to their end, boolean `[K]`."""
        return np.array([status == "ok" for status in self.status])

    @property
    def curves(self) -> np.ndarray:
        """Test accuracy `[K, E]`."""
        return self.metrics["test_accuracy"]

    @property
    def losses(self) -> np.ndarray:
        """Test loss `[K, E]`; NaN where the zoo holds none."""
        return self.metrics.get("test_loss", np.full_like(self.curves, np.nan))

    @property
    def final(self) -> np.ndarray:
        """Test accuracy at the end `[K]`, NaN for runs that did not finish."""
        return np.where(self.finished, self.curves[:, -1], np.nan)

    @property
    def final_validation(self) -> np.ndarray:
        """Validation accuracy at the end `[K]`, NaN for runs that did not finish."""
        return np.where(self.finished, self.metrics["validation_accuracy"][:, -1], np.nan)

    def for_seeds(self, seeds: Sequence[int]) -> list[int]:
        """Rows of the runs with these seeds, in their order."""
        return [self.seeds.index(seed) for seed in seeds]


@dataclass(frozen=True)
class Choice:
    """The learning rate of one (architecture, initialiser), chosen among `tried`.

    Attributes:
        arm: the chosen arm.
        tried: every arm, by learning rate.
        scores: mean validation accuracy at the end per arm of `tried`, a run that did not finish counting as chance.
    """

    arm: Arm
    tried: tuple[Arm, ...]
    scores: tuple[float, ...]

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the smallest or largest that was tried, so that a better one may lie outside."""
        return len(self.tried) > 1 and self.arm.lr in (self.tried[0].lr, self.tried[-1].lr)

    @property
    def validation(self) -> list[Spread]:
        """Validation accuracy of the finished runs at the end, per arm of `tried`."""
        return [spread(arm.final_validation) for arm in self.tried]


def short_labels(inits: Iterable[str]) -> dict[str, str]:
    """A short name per initialiser: "he+lsuv" stays, a place such as "runs/demo/noise-ghn" becomes "noise-ghn".

    Places that would share a name keep as many folders as they need to differ.
    """
    inits = list(dict.fromkeys(inits))
    parts = {init: init.rstrip("/").split("/") for init in inits}
    labels = {}
    for init in inits:
        for depth in range(1, len(parts[init]) + 1):
            label = "/".join(parts[init][-depth:])
            if not any("/".join(parts[other][-depth:]) == label for other in inits if other != init):
                break
        labels[init] = label
    return labels


def _arm(members: list[tuple[Any, int]], label: str) -> Arm:
    """One arm from (population, index) pairs of equal architecture, init and lr."""
    members = sorted(members, key=lambda member: int(member[0].seeds[member[1]]))
    first = members[0][0]
    recipe = first.recipe
    for population, _ in members:
        if not np.array_equal(population.evaluation_steps, first.evaluation_steps):
            raise ZooError(
                f"populations of {recipe.architecture} with init {recipe.init} were evaluated at different steps, so "
                "their curves cannot be averaged; collect them with the same evaluations_per_epoch and evaluation_steps"
            )
    names = [str(name) for name in first.metric_names]
    for needed in ("test_accuracy", "validation_accuracy"):
        if needed not in names:
            raise ZooError(
                f"the population of {recipe.architecture} with init {recipe.init} holds no {needed} (only "
                f"{', '.join(names)}); collect it again with this version"
            )
    stacked = np.stack([np.asarray(population.metrics[index], dtype=float) for population, index in members])
    return Arm(
        architecture=str(recipe.architecture),
        init=str(recipe.init),
        label=label,
        lr=float(recipe.lr),
        seeds=tuple(int(population.seeds[index]) for population, index in members),
        status=tuple(str(population.status[index]) for population, index in members),
        steps=np.asarray(first.evaluation_steps).astype(int),
        epochs=np.asarray(first.evaluation_epochs, dtype=float),
        metrics={name: stacked[:, :, column] for column, name in enumerate(names)},
        sources=tuple(members),
    )


def _check_recipes(populations: Sequence[Any]) -> None:
    """Raise `ConfigError` if populations of one architecture differ in more than initialiser and learning rate."""
    first: dict[str, Any] = {}
    digests: dict[str, str] = {}
    for population in populations:
        recipe = population.recipe
        if digests.setdefault(str(recipe.init), recipe.init_digest) != recipe.init_digest:
            raise ConfigError(
                f"the zoo holds networks from two versions of the checkpoint {recipe.init}, which was fitted again "
                "between; keep them in folders of their own"
            )
        reference = first.setdefault(str(recipe.architecture), recipe)
        for field in dataclasses.fields(recipe):
            mine, other = getattr(recipe, field.name), getattr(reference, field.name)
            if field.name not in FREE_FIELDS and mine != other:
                raise ConfigError(
                    f"populations of {recipe.architecture} differ in {field.name} ({other!r} with init "
                    f"{reference.init}, {mine!r} with init {recipe.init}), so their difference would not be due to "
                    "the initialiser; keep them in folders of their own, or choose with --architectures and --inits"
                )


def read_arms(
    populations: Iterable[Any], *, baseline: str, architectures: Sequence[str] = (), inits: Sequence[str] = ()
) -> tuple[list[Arm], list[str]]:
    """All arms of the wanted architectures and initialisers, and notes on what was left out.

    A run that appears twice (the same architecture, initialiser, rate and seed) is taken once. Architectures that lack
    the baseline or have nothing but the baseline are left out, with a note.

    Raises:
        UnknownNameError: an architecture or initialiser is asked for that no population has.
        ConfigError: recipes differ in more than initialiser and rate, or nothing is left to compare.
        ZooError: populations without the needed metrics, or evaluated at different steps.
    """
    populations = list(populations)
    for kind, wanted, have in (
        ("architecture in the zoo", architectures, {str(p.recipe.architecture) for p in populations}),
        ("initialiser in the zoo", (baseline, *inits), {str(p.recipe.init) for p in populations}),
    ):
        for name in wanted:
            if name not in have:
                raise unknown_name(
                    kind, name, have, way_out="`python -m collect run --init ...` trains what is missing."
                )
    chosen = [
        population
        for population in populations
        if (not architectures or str(population.recipe.architecture) in architectures)
        and (not inits or str(population.recipe.init) in (baseline, *inits))
    ]
    _check_recipes(chosen)
    labels = short_labels(sorted({str(population.recipe.init) for population in chosen}))
    groups: dict[tuple[str, str, float], dict[int, tuple[Any, int]]] = {}
    for population in chosen:
        recipe = population.recipe
        group = groups.setdefault((str(recipe.architecture), str(recipe.init), float(recipe.lr)), {})
        for index, seed in enumerate(population.seeds):
            group.setdefault(int(seed), (population, index))
    arms = [_arm(list(group.values()), labels[init]) for (_, init, _), group in sorted(groups.items())]
    notes, kept = [], []
    for architecture in dict.fromkeys(arm.architecture for arm in arms):
        mine = [arm for arm in arms if arm.architecture == architecture]
        names = {arm.init for arm in mine}
        if baseline not in names or len(names) == 1:
            reason = f"nothing but {baseline}" if baseline in names else f"no run with the baseline {baseline}"
            notes.append(f"{architecture} is left out: the zoo holds {reason} for it.")
        else:
            kept += mine
    if not kept:
        raise ConfigError(
            f"nothing to compare: no architecture has runs with {baseline} and with another initialiser. "
            f"{' '.join(notes)} `python -m collect run --init ...` trains what is missing."
        )
    return kept, notes


def choose_rates(arms: Sequence[Arm], *, classes: int) -> list[Choice]:
    """Per (architecture, initialiser) the learning rate with the best mean validation accuracy at the end.

    A run that did not finish counts as chance (1 / `classes`); the smaller rate wins a tie.
    """
    choices = []
    for key in dict.fromkeys((arm.architecture, arm.init) for arm in arms):
        tried = sorted((arm for arm in arms if (arm.architecture, arm.init) == key), key=lambda arm: arm.lr)
        scores = [float(np.nan_to_num(arm.final_validation, nan=1 / classes).mean()) for arm in tried]
        best = max(range(len(tried)), key=lambda index: (scores[index], -index))
        choices.append(Choice(tried[best], tuple(tried), tuple(scores)))
    return choices


def horizon_indices(steps: np.ndarray, horizons: Sequence[int]) -> list[int]:
    """Indices of the evaluations to report: step 0, the first after it, those nearest to `horizons`, and the last.

    A horizon beyond the last step is left out; on a tie the earlier evaluation is taken.
    """
    last = len(steps) - 1
    nearest = [int(np.abs(steps - step).argmin()) for step in horizons if step <= steps[-1]]
    return sorted({0, min(1, last), *nearest, last})


def format_steps(values: Sequence[float]) -> str:
    """Median steps with the count of runs that got there: "120 (5/5)"; a median run that never does: "never (2/5)"."""
    finite = [value for value in values if math.isfinite(value)]
    median = float(np.median(values)) if len(values) else math.nan
    return (
        f"{median:.0f} ({len(finite)}/{len(values)})"
        if math.isfinite(median)
        else f"never ({len(finite)}/{len(values)})"
    )
