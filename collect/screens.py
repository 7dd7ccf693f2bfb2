"""What the command line shows: tables of plans and of zoos, and in words where plans stand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from collect.index import numbers
from collect.plan import Task
from collect.recipe import Recipe
from collect.runs import Runs
from collect.standing import Standing

MOST_ROWS = 40  # of a table: larger sweeps are told apart by fewer columns
MOST_VALUES = 6  # of a swept field that are written out
MOST_LINES = 3  # on populations that failed


def show(title: str, *, table: Table | None = None, bad: Iterable[Exception] = (), notes: Iterable[str] = ()) -> None:
    """Print a title, a table if it has rows, one line for every file that is not usable, and notes."""
    console = Console(soft_wrap=True)
    console.print(Text(title, style="bold"))
    if table is not None and table.row_count:
        console.print(table, soft_wrap=False)
    for error in bad:
        console.print(Text(f"not usable: {error}", style="red"))
    for note in notes:
        console.print(Text(note))


def table_of(*columns: str, left: Sequence[str] = ()) -> Table:
    """An empty table; the columns in `left` hold text, the others numbers."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=name != "init", overflow="fold")
    return table


def _enough(keys: set[tuple], *, least: int) -> int:
    """With how many of their entries, at least `least`, the keys make at most `MOST_ROWS` rows."""
    length = max(map(len, keys), default=least)
    while length > least and len({key[:length] for key in keys}) > MOST_ROWS:
        length -= 1
    return length


# --- plans -------------------------------------------------------------------------------------------------------


def _values(values: Sequence[Any]) -> str:
    """Few values as they are; of many numbers the smallest and the largest."""
    if len(values) <= MOST_VALUES:
        return ", ".join(map(str, values))
    numbers = all(isinstance(value, int | float) for value in values)
    return f"{min(values):g} to {max(values):g} ({len(values)} values)" if numbers else f"{len(values)} values"


def swept(recipes: Sequence[Recipe]) -> str:
    """The fields in which the recipes differ, with their values; "" if they do not."""
    found = {each.name: list(dict.fromkeys(map(attrgetter(each.name), recipes))) for each in fields(Recipe)}
    del found["init_digest"]
    return "; ".join(f"{name} {_values(values)}" for name, values in found.items() if len(values) > 1)


def plan_table(tasks: Sequence[Task]) -> Table:
    """One row per data set and architecture, or per data set if these are many."""
    columns, key = ("data", "architecture"), attrgetter("recipe.data", "recipe.architecture")
    length = _enough(set(map(key, tasks)), least=1)
    rows: dict[tuple, list[Task]] = defaultdict(list)
    for task in tasks:
        rows[key(task)[:length]].append(task)
    table = table_of(*columns[:length], "recipes", "populations", "networks", "operations", left=columns)
    for names, each in rows.items():
        networks, cost = sum(len(task.seeds) for task in each), sum(task.cost for task in each)
        table.add_row(*names, f"{len({task.recipe for task in each})}", f"{len(each)}", f"{networks}", f"{cost:.2g}")
    return table


# --- zoos --------------------------------------------------------------------------------------------------------


def _of_populations(runs: Runs, columns: Sequence[str]) -> list[tuple]:
    """What the runs of every population have in these columns, in which they are alike."""
    first = runs.take(np.flatnonzero(np.diff(numbers(runs), prepend=-1)))
    return list(zip(*(first.column(name).tolist() for name in columns), strict=True))


def _results(runs: Runs, rows: np.ndarray, count: int) -> list[tuple[int, int, str]]:
    """Of the runs in each of `count` rows: how many there are, how many diverged, and how well the others do.

    Args:
        runs: N of them.
        rows: the row of each, int [N].
        count: of rows.
    """
    status, accuracy = runs.column("status"), runs.column("test_accuracy")
    ok = status == "ok"
    good, accuracy = rows[ok], accuracy[ok]
    number = np.bincount(good, minlength=count)
    mean = np.bincount(good, accuracy, count) / np.maximum(number, 1)
    spread = np.sqrt(np.bincount(good, (accuracy - mean[good]) ** 2, count) / np.maximum(number, 1))
    words = [f"{m:.3f} ± {s:.3f}" if n else "" for n, m, s in zip(number, mean, spread, strict=True)]
    networks, diverged = (np.bincount(each, minlength=count).tolist() for each in (rows, rows[status == "diverged"]))
    return list(zip(networks, diverged, words, strict=True))


def zoo_table(runs: Runs | None, missing: Sequence[Task]) -> Table:
    """One row per recipe, as far as it is told by the columns, with what is there and what is planned and missing.

    Args:
        runs: those of an index of the zoo; None if nothing is there.
        missing: the tasks whose populations are not there.
    """
    columns = ("data", "architecture", "init", "lr", "epochs")
    there = [] if runs is None else _of_populations(runs, columns)
    absent = [attrgetter(*columns)(task.recipe) for task in missing]
    length = _enough({*there, *absent}, least=2)
    keys = sorted({key[:length] for key in (*there, *absent)}, key=str)
    place = {key: number for number, key in enumerate(keys)}
    results = [(0, 0, "")] * len(keys)
    if runs is not None:
        results = _results(runs, np.array([place[key[:length]] for key in there])[numbers(runs)], len(keys))
    lacking = [0] * len(keys)
    for key, task in zip(absent, missing, strict=True):
        lacking[place[key[:length]]] += len(task.seeds)
    table = table_of(*columns[:length], "networks", "diverged", "test accuracy", left=columns[:3])
    for key, (networks, diverged, accuracy), more in zip(keys, results, lacking, strict=True):
        wanted = f" of {networks + more}" if more else ""
        table.add_row(*map(str, key), f"{networks}{wanted}", str(diverged), accuracy)
    return table


def first_few(lines: Sequence[str], where: str) -> list[str]:
    """Few lines as they are; of more the first ones, and where the others are."""
    more = len(lines) - MOST_LINES
    return [*lines[:MOST_LINES], *([f"and {more} more {where}"] if more > 0 else [])]


def counted(number: int, thing: str) -> str:
    """1 network, 2 networks."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def lasting(minutes: float) -> str:
    """A length of time in the unit that suits it."""
    if minutes < 1:
        return "less than a minute"
    if minutes < 2 * 60:
        return f"{minutes:.1f} minutes"
    return f"{minutes / 60:.1f} hours" if minutes < 2 * 24 * 60 else f"{minutes / (24 * 60):,.1f} days"


def in_words(standing: Standing) -> str:
    """One line on where a plan stands."""
    states = ", ".join(f"{getattr(standing, name)} {name}" for name in ("done", "running", "failed", "open"))
    words = [f"{standing.plan}: {standing.networks} networks: {states}"]
    if standing.per_minute is not None:
        rate = f"{standing.per_minute:,.0f}" if standing.per_minute >= 100 else f"{standing.per_minute:.3g}"
        words.append(f"{rate} networks per minute and process")
    if standing.done < standing.networks and standing.minutes_left is not None:
        processes = f"the {standing.processes} at work" if standing.processes > 1 else "one process"
        words.append(f"{lasting(standing.minutes_left)} left with {processes}")
    return "; ".join(words)
