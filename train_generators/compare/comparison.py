"""The comparison itself: read populations, choose rates, test, predict, and hand everything to plots and report.

Choices are made on validation images, everything reported is measured on test images. See `curves` for what may be
compared, `statistics` for the tests, `ensembles` for the definitions, `shifts` for the shifted images.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from collect import data
from collect.zoo import Zoo
from generators.commandline import progress
from generators.errors import ConfigError, DataError
from train_generators.compare import report, table
from train_generators.compare.config import CompareConfig
from train_generators.compare.curves import Choice, choose_rates, horizon_indices, read_arms
from train_generators.compare.predictions import WHEN, evaluate
from train_generators.compare.result import ComparisonResult, Horizon, Row, flat_figures
from train_generators.compare.shifts import shifted_sets
from train_generators.compare.statistics import holm, paired, spread, steps_to, story


def _compare_architecture(choices: Sequence[Choice], config: CompareConfig) -> list[Row]:
    """The rows of one architecture, the baseline first; p-values are corrected later, over all architectures."""
    choices = sorted(choices, key=lambda choice: (choice.arm.init != config.baseline, choice.arm.label))
    base = choices[0].arm
    target = config.target if config.target is not None else config.target_share * spread(base.final).mean
    rows = []
    for choice in choices:
        arm = choice.arm
        is_baseline = arm is base
        common = [seed for seed in arm.seeds if seed in base.seeds]
        mine, theirs = arm.curves[arm.for_seeds(common)], base.curves[base.for_seeds(common)]
        if not np.array_equal(arm.steps, base.steps):
            raise ConfigError(
                f"{arm.architecture}: {arm.label} was evaluated at other steps than {base.label}; collect both with "
                "the same recipe"
            )
        differences = () if is_baseline else tuple(paired(one, two) for one, two in zip(mine.T, theirs.T, strict=True))
        horizons = [
            Horizon(
                step=int(arm.steps[index]),
                epoch=float(arm.epochs[index]),
                accuracy=spread(arm.curves[:, index]),
                loss=spread(arm.losses[:, index]),
                difference=None if is_baseline else differences[index],
                loss_difference=None
                if is_baseline
                else paired(arm.losses[arm.for_seeds(common), index], base.losses[base.for_seeds(common), index]),
                p_holm=None,
            )
            for index in horizon_indices(arm.steps, config.horizons)
        ]
        told = "" if is_baseline else story(arm.label, base.label, arm.steps, differences)
        rows.append(
            Row(
                choice=choice,
                is_baseline=is_baseline,
                target=target,
                steps_to_target=tuple(steps_to(curve, arm.steps, target) for curve in arm.curves),
                differences=differences,
                horizons=tuple(horizons),
                story=told,
            )
        )
    return rows


def _with_holm(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """The rows with their horizons' p-values corrected over all architectures, initialisers and horizons."""
    places = [
        (number, index)
        for number, row in enumerate(rows)
        for index, horizon in enumerate(row.horizons)
        if horizon.difference is not None
    ]
    raw = [rows[number].horizons[index].difference.p for number, index in places]  # type: ignore[union-attr]
    adjusted = dict(zip(places, holm(raw), strict=True))
    corrected = [
        dataclasses.replace(
            row,
            horizons=tuple(
                dataclasses.replace(horizon, p_holm=adjusted.get((number, index)))
                for index, horizon in enumerate(row.horizons)
            ),
        )
        for number, row in enumerate(rows)
    ]
    return corrected, sum(math.isfinite(p) for p in raw)


def _with_ensembles(rows: Sequence[Row], images: Any, config: CompareConfig) -> tuple[list[Row], list[str]]:
    """The rows with their ensembles before and after training, and notes on what could not be done."""
    sets = list(shifted_sets(images, config.shifts, most=config.shift_images, seed=config.seed))
    done: list[Row] = []
    notes: list[str] = []
    with progress("ensembles", total=len(rows) * len(WHEN)) as bar:
        for row in rows:
            ensembles = {}
            for when in WHEN:
                found = evaluate(
                    row.arm, when, sets, images,
                    size=config.ensemble_size, most_sets=config.ensemble_sets, seed=config.seed,
                )  # fmt: skip
                if found is not None:
                    ensembles[when] = found
                bar.advance()
            done.append(dataclasses.replace(row, ensembles=ensembles))
            notes += _ensemble_notes(done[-1], config)
    baselines = {row.arm.architecture: row for row in done if row.is_baseline}
    with_differences = []
    for row in done:
        base = baselines[row.arm.architecture]
        differences = {
            when: {
                metric: paired(scores, base.ensembles[when].clean_scores[metric])
                for metric, scores in found.clean_scores.items()
            }
            for when, found in row.ensembles.items()
            if when in base.ensembles and not row.is_baseline
        }
        with_differences.append(dataclasses.replace(row, ensemble_differences=differences))
    return with_differences, notes


def _ensemble_notes(row: Row, config: CompareConfig) -> list[str]:
    """What is missing or odd about the ensembles of one row."""
    name = f"{row.arm.architecture}, {row.label}"
    notes = []
    for when in WHEN:
        found = row.ensembles.get(when)
        if found is None:
            finished = int(row.arm.finished.sum())
            reason = (
                "their weights were not saved (`collect run --saved all` keeps them)"
                if finished >= 2
                else f"only {finished} of its runs finished"
            )
            notes.append(f"{name}: no ensemble {when} training, because {reason}.")
        elif found.members < config.ensemble_size:
            notes.append(
                f"{name}: ensembles {when} training have {found.members} members instead of {config.ensemble_size}, "
                "because no more runs finished."
            )
    after = row.ensembles.get("after")
    if after is not None:
        gap = np.nanmax(np.abs(after.member_accuracies - row.arm.final))
        if gap > 0.005:
            notes.append(
                f"{name}: accuracies predicted from the stored weights differ from those recorded in training by up "
                f"to {100 * gap:.1f} points; the ensembles and the curves may not describe the same networks."
            )
    return notes


def _row_notes(row: Row, most_rates: int) -> list[str]:
    """What is missing or odd about one row, apart from ensembles."""
    name = f"{row.arm.architecture}, {row.label}"
    notes = [
        f"{name}: {count} of {len(row.arm.seeds)} runs {status}; means and tests are over the rest (before a run "
        "ended it counts in the curve), which flatters an initialiser that diverges."
        for status, count in row.unfinished.items()
    ]
    if len(row.choice.tried) < most_rates:
        notes.append(
            f"{name}: {len(row.choice.tried)} learning rates were tried, {most_rates} for others of this architecture: "
            "the search was not equally long."
        )
    return notes


def _load_images(populations: Sequence[Any], config: CompareConfig) -> Any:
    """The image set of all populations.

    Raises:
        ConfigError: they were trained on different images.
        DataError: the images at hand are not those that they were trained on.
    """
    by_digest = {
        str(population.header.attributes["data_digest"]): str(population.recipe.data) for population in populations
    }
    if len(by_digest) > 1:
        raise ConfigError(
            f"the populations were trained on {len(by_digest)} different data sets ({', '.join(by_digest.values())}); "
            "compare those of one data set at a time"
        )
    digest, name = next(iter(by_digest.items()))
    images = data.load(config.data or name, root=config.data_root)
    if images.digest != digest:
        raise DataError(
            f"the images of {config.data or name} have digest {images.digest}, but the populations were trained on "
            f"{digest}; name the right set with --data"
        )
    return images


def compare(populations: Sequence[Any], images: Any, config: CompareConfig) -> tuple[list[Row], list[str], int]:
    """Rows, notes and the number of tests, from population views and their images; nothing is written."""
    arms, notes = read_arms(
        populations, baseline=config.baseline, architectures=config.architectures, inits=config.inits
    )  # fmt: skip
    rows: list[Row] = []
    for architecture in dict.fromkeys(arm.architecture for arm in arms):
        mine = [arm for arm in arms if arm.architecture == architecture]
        rows += _compare_architecture(choose_rates(mine, classes=len(images.classes)), config)
    rows, tests = _with_holm(rows)
    for row in rows:
        most_rates = max(len(other.choice.tried) for other in rows if other.arm.architecture == row.arm.architecture)
        notes += _row_notes(row, most_rates)
    at_edge = [f"{row.arm.architecture} {row.label}" for row in rows if row.choice.at_edge]
    if at_edge:
        notes.append(
            "The chosen learning rate is the smallest or largest of those tried, so a better one may lie outside, for: "
            f"{', '.join(at_edge)}."
        )
    rows, more = _with_ensembles(rows, images, config)
    return rows, notes + more, tests


def run(config: CompareConfig, *, console: Any = None) -> ComparisonResult:
    """Compare, print the table on `console` (a `rich.console.Console`; by default standard output), write the report.

    Raises:
        ConfigError: the populations cannot be compared, or there is nothing to compare.
        UnknownNameError: an initialiser or architecture was asked for that the zoo does not hold.
        ZooError: a folder is not there, or holds no valid population.
        DataError: the images are not those that the populations were trained on.
    """
    started = time.perf_counter()
    zoos = [Zoo(folder) for folder in config.zoo]
    populations = [population for zoo in zoos for population in zoo.populations]
    if not populations:
        raise ConfigError(
            f"no valid population in {', '.join(map(str, config.zoo))}; `python -m collect run` trains some"
        )
    arms_populations = [
        population
        for population in populations
        if not config.architectures or population.recipe.architecture in config.architectures
    ]
    images = _load_images(arms_populations or populations, config)
    rows, notes, tests = compare(populations, images, config)
    for zoo in zoos:
        notes += [f"not used: {reason}" for reason in zoo.bad.values()]
    result = ComparisonResult(
        config=config,
        folder=Path(config.out),
        rows=tuple(rows),
        notes=tuple(notes),
        figures=flat_figures(rows),
        facts=report.facts(rows, images),
        tests=tests,
    )
    report.write(result, seconds=time.perf_counter() - started)
    table.show(result, console=console)
    return result
