"""One try at one task, the same wherever it runs: leave it to whoever is at it, else perform it.

Several collectors may work on one folder. Each gives way to the others' claims, so that no population is trained twice
but by the rare accident of two claims in the same instant, which does no harm.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collect import zoo_file
from collect.data import ImageSet
from collect.durable import claimed
from collect.perform import Outcome, perform
from collect.plan import Task
from collect.workers import Tick
from generators.errors import ZooError

TICK_SECONDS = 0.2  # at least so long between two messages about one population


@dataclass(frozen=True)
class Elsewhere:
    """What comes back of a task that was left to another process: `done` if it has finished, else it is at work."""

    task: Task
    done: bool


def check(task: Task, folder: str | Path, *, verify: bool = False) -> str | None:
    """None if the population of `task` is stored and whole; "" if it is not there; else what is wrong with its file.

    Args:
        task: whose population.
        folder: of the zoo.
        verify: compare every byte with its digest; otherwise only the structure of the file is looked at.

    Raises:
        NewerSchemaError: the file may be whole, but this version cannot tell.
    """
    path = zoo_file.path_of(folder, task.id)
    if not path.exists():
        return ""
    try:
        (zoo_file.verify if verify else zoo_file.read_header)(path)
    except zoo_file.NewerSchemaError:
        raise
    except ZooError as error:
        return str(error)
    return None


def free(tasks: list[Task], folder: Path) -> list[Task]:
    """Those of `tasks` that no living process has claimed."""
    taken = claimed(folder)
    return [task for task in tasks if zoo_file.path_of(folder, task.id).name not in taken]


def _throttled(tick: Tick) -> Tick:
    """`tick` for every step of a training: it looks each time whether to stop, but seldom sends; the end always."""
    sent = float("-inf")

    def seldom(*progress: Any) -> None:
        nonlocal sent
        now = time.monotonic()
        if not progress or (progress[1] < 1 and now - sent < TICK_SECONDS):
            tick()
            return
        sent = now
        tick(*progress)

    return seldom


@dataclass(frozen=True)
class Attempt:
    """A call for any process: `attempt(tick)` trains and stores the population of `task`, unless another has it.

    Attributes:
        task: what to train.
        folder: of the zoo; every process must see the same one.
        root: where data sets lie, see `collect.data.load`.
        device: of torch, where to train.
    """

    task: Task
    folder: Path
    root: Path | None
    device: str = "cpu"

    def __call__(self, tick: Tick, *, images: ImageSet | None = None) -> Outcome | Elsewhere:
        """See `collect.perform.perform`; `tick` takes no arguments, or the task's id and the fraction done."""
        try:
            if check(self.task, self.folder) is None:
                return Elsewhere(self.task, done=True)
        except ZooError as error:
            return Outcome(self.task, error=str(error), fatal=True)
        if not free([self.task], self.folder):
            return Elsewhere(self.task, done=False)
        return perform(self.task, self.folder, self.root, _throttled(tick), device=self.device, images=images)
