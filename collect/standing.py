"""How far each plan of a zoo is: done, running, failed, open; at what rate, and what time is left.

All of it is read from the folder: whole files are done, damaged files of the plan failed, and a collector at work holds
a temporary file per population that it trains (`collect.durable.claim`). Times come from the seconds that finished
populations took, in proportion to the plan's estimate of operations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from collect.durable import claimed
from collect.index import Index
from collect.plan import Task
from collect.zoo_file import SUFFIX


@dataclass(frozen=True)
class Standing:
    """Where one plan stands, in networks.

    Attributes:
        plan: name of the plan's file.
        done: stored in a file that passes the cheap check.
        running: being trained by a collector on any machine that sees this folder.
        failed: in a file that is damaged; collecting again trains them anew.
        open: nothing of the above.
        per_minute: networks that one process trained per minute; None if none is done.
        minutes_left: until all is done with as many processes as train now, or with one if none does; None if there is
            nothing to estimate it from.
        processes: how many populations are trained now.
    """

    plan: str
    done: int
    running: int
    failed: int
    open: int
    per_minute: float | None
    minutes_left: float | None
    processes: int

    @property
    def networks(self) -> int:
        return self.done + self.running + self.failed + self.open


def _seconds_left(missing: Sequence[Task], done: Sequence[tuple[Task, float]]) -> float | None:
    """Seconds of one process for the missing tasks, by cost, from finished ones of the same architecture, else any."""
    cost: dict[str, float] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)
    for task, taken in done:
        for key in (task.recipe.architecture, ""):
            cost[key] += task.cost
            seconds[key] += taken
    if not cost[""]:
        return 0.0 if not missing else None
    keys = [task.recipe.architecture if cost[task.recipe.architecture] else "" for task in missing]
    return sum(task.cost * seconds[key] / cost[key] for task, key in zip(missing, keys, strict=True))


def standings(
    folder: Path, plans: Mapping[str, Sequence[Task]], index: Index | None, bad: Collection[Path]
) -> list[Standing]:
    """Every one of `plans`, given what `collect.index.open_index` found in the zoo `folder`."""
    there = {} if index is None else index.entries("seconds")
    damaged = {path.name.removesuffix(SUFFIX) for path in bad}
    at_work = {name.removesuffix(SUFFIX) for name in claimed(folder)}
    found = []
    for name, tasks in plans.items():
        groups: dict[str, list[Task]] = defaultdict(list)
        for task in tasks:
            state = "done" if task.id in there else "running" if task.id in at_work else "open"
            groups["failed" if state == "open" and task.id in damaged else state].append(task)
        counts = {
            state: sum(len(task.seeds) for task in groups[state]) for state in ("done", "running", "failed", "open")
        }
        done = [(task, there[task.id]) for task in groups["done"]]
        minutes = sum(seconds for _, seconds in done) / 60
        left = _seconds_left(groups["running"] + groups["failed"] + groups["open"], done)
        processes = len(groups["running"])
        found.append(
            Standing(
                plan=name,
                **counts,
                per_minute=counts["done"] / minutes if minutes else None,
                minutes_left=None if left is None else left / 60 / max(processes, 1),
                processes=processes,
            )
        )
    return found
