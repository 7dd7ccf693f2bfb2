"""How far each plan of a zoo is: done, running, failed, open; at what rate, and what time is left.

All of it is read from the folder: whole files are done; damaged files and trainings that ended in an error failed
(`collect.failures`); and a collector at work holds a temporary file per population that it trains, in which it says how
far it is (`collect.durable.claim`). Times come from the seconds that finished populations, and what is done of those at
work, took, in proportion to the plan's estimate of operations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from collect.durable import claimed, progress
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
        failed: in a file that is damaged, or of a training that ended in an error; collecting again tries them again.
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


def _seconds_left(missing: Sequence[tuple[Task, float]], done: Sequence[tuple[Task, float, float]]) -> float | None:
    """Seconds of one process for what is missing, by cost, from what is done of the same architecture, else of any.

    Args:
        missing: tasks, and what share of each.
        done: tasks, what share of each, and the seconds that it took.
    """
    cost: dict[str, float] = defaultdict(float)
    seconds: dict[str, float] = defaultdict(float)
    for task, share, taken in done:
        for key in (task.recipe.architecture, ""):
            cost[key] += task.cost * share
            seconds[key] += taken
    if not cost[""]:
        return 0.0 if not missing else None
    keys = [task.recipe.architecture if cost[task.recipe.architecture] else "" for task, _ in missing]
    return sum(task.cost * share * seconds[key] / cost[key] for (task, share), key in zip(missing, keys, strict=True))


def standings(
    folder: Path, plans: Mapping[str, Sequence[Task]], index: Index | None, failed: Collection[str]
) -> list[Standing]:
    """Where every one of `plans` stands.

    Args:
        folder: the zoo.
        plans: name -> tasks.
        index: of what is there, from `collect.index.open_index`.
        failed: ids of populations whose file is damaged or whose training ended in an error.
    """
    there = {} if index is None else index.entries("seconds")
    at_work = {name.removesuffix(SUFFIX): progress(path) for name, path in claimed(folder).items()}
    found = []
    for name, tasks in plans.items():
        groups: dict[str, list[Task]] = defaultdict(list)
        for task in tasks:
            state = "done" if task.id in there else "running" if task.id in at_work else "open"
            groups["failed" if state == "open" and task.id in failed else state].append(task)
        counts = {
            state: sum(len(task.seeds) for task in groups[state]) for state in ("done", "running", "failed", "open")
        }
        running = [(task, at_work[task.id]) for task in groups["running"]]
        minutes = sum(there[task.id] for task in groups["done"]) / 60
        left = _seconds_left(
            [(task, 1 - each.fraction) for task, each in running]
            + [(task, 1.0) for task in groups["failed"] + groups["open"]],
            [(task, 1.0, there[task.id]) for task in groups["done"]]
            + [(task, each.gained, each.seconds) for task, each in running if each.gained],
        )
        processes = len(running)
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
