"""Carrying out a plan: worker processes, one thread each; what is done stays done.

The valid files in the zoo's folder are the only truth about what is done: collecting is the plan minus those files. All
that follows from it: run the same call again after a kill and it goes on; run it twice and the second does nothing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from collect import zoo_file
from collect.durable import sweep
from collect.perform import Outcome, perform
from collect.plan import Task, save
from collect.workers import Tick, in_processes, usable_cores
from generators.commandline import Interrupted
from generators.errors import ConfigError, PowerhouseError, ZooError

log = logging.getLogger(__name__)


class CollectError(PowerhouseError):
    """Some populations could not be trained; the others are stored."""


@dataclass(frozen=True)
class Collected:
    """What `collect` did.

    Attributes:
        trained: ids of the populations trained now.
        found: ids of those that were there.
        moved_aside: damaged files of the plan, under their new names.
        diverged: how many of the networks trained now diverged.
    """

    trained: tuple[str, ...]
    found: tuple[str, ...]
    moved_aside: tuple[Path, ...]
    diverged: int


# --- what is there -----------------------------------------------------------------------------------------------


def check(task: Task, folder: str | Path) -> str | None:
    """None if the population of `task` is stored and whole; "" if it is not there; else what is wrong with its file.

    Raises:
        NewerSchemaError: the file may be whole, but this version cannot tell.
    """
    path = zoo_file.path_of(folder, task.id)
    if not path.exists():
        return ""
    try:
        zoo_file.verify(path)
    except zoo_file.NewerSchemaError:
        raise
    except ZooError as error:
        return str(error)
    return None


def _move_aside(path: Path) -> Path:
    """Rename a damaged file to a name that no reader looks at and no earlier one has."""
    number = 0
    while (aside := path.with_name(f"{path.name}.bad{number or ''}")).exists():
        number += 1
    return path.rename(aside)


def _in_this_process(calls: Sequence[Callable[[Tick], Outcome]], *, on_tick: Tick) -> Generator[Outcome, None, None]:
    """`collect.workers.in_processes` without processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker: sums in another order would be other networks under the same id
    try:
        for call in calls:
            yield call(on_tick)
    finally:
        torch.set_num_threads(threads)


def collect(
    tasks: Sequence[Task],
    folder: str | Path,
    *,
    workers: int | None = None,
    root: str | Path | None = None,
    on_progress: Callable[[float], object] | None = None,
) -> Collected:
    """Train and store every task whose population is not in `folder` yet.

    Args:
        tasks: of one or several recipes, from `collect.plan.plan`.
        folder: the zoo; made if it is not there.
        workers: worker processes, None for one per usable core; 0 trains in this process.
        root: where data sets lie, see `collect.data.load`.
        on_progress: called with numbers of networks (and parts of networks) done since the last call; they add up to
            the number of networks in `tasks`, those that were there included.

    Returns:
        What was done. Networks that diverged are stored and flagged, they are no failure.

    Raises:
        Interrupted: by SIGINT, SIGTERM or the loss of a worker; the workers have ended and what is finished is stored.
        CollectError: some populations could not be trained; all others are stored.
        ZooError: the folder cannot be written, or holds a population of the plan that a newer version wrote.
        ConfigError: a negative number of workers.
    """
    folder, root = Path(folder), None if root is None else Path(root)
    if workers is not None and workers < 0:
        raise ConfigError(f"workers must be at least 0 (0: train in this process), got {workers}")
    tasks = list({task.id: task for task in tasks}.values())
    advance = on_progress or (lambda amount: None)
    faults = {task.id: check(task, folder) for task in tasks}
    save(tasks, folder)
    sweep(folder)
    found, moved_aside, open_tasks = [], [], []
    for task in tasks:
        fault = faults[task.id]
        if fault is None:
            found.append(task.id)
            advance(len(task.seeds))
            continue
        if fault:
            moved_aside.append(_move_aside(zoo_file.path_of(folder, task.id)))
            log.warning("%s; moved aside to %s, its networks are trained again", fault, moved_aside[-1].name)
        open_tasks.append(task)
    open_tasks.sort(key=lambda task: -task.cost)  # the longest first, so that no worker ends long after the others
    if found:
        log.info("%d of %d populations are there, %d to train", len(found), len(tasks), len(open_tasks))

    sizes, fractions = {task.id: len(task.seeds) for task in tasks}, dict.fromkeys((t.id for t in open_tasks), 0.0)

    def on_fraction(task: str, fraction: float) -> None:
        gained, fractions[task] = fraction - fractions[task], max(fraction, fractions[task])
        if gained > 0:
            advance(gained * sizes[task])

    calls = [functools.partial(perform, task, folder, root) for task in open_tasks]
    way: Callable[..., Generator[Outcome, None, None]] = _in_this_process
    if workers != 0 and calls:
        way = functools.partial(in_processes, workers=min(workers or usable_cores(), len(calls)))
    trained, failed, diverged = [], [], 0
    try:
        with closing(way(calls, on_tick=on_fraction)) as outcomes:
            for outcome in outcomes:
                if outcome.fatal:
                    raise ZooError(outcome.error)
                if outcome.error:
                    failed.append(outcome)
                    log.error("population %s failed: %s%s", outcome.task, outcome.error, outcome.detail)
                    continue
                on_fraction(outcome.task.id, 1.0)
                trained.append(outcome.task.id)
                diverged += outcome.diverged
                flag = f", {outcome.diverged} diverged" if outcome.diverged else ""
                log.debug("population %s stored after %.1f s%s", outcome.task, outcome.seconds, flag)
    except (KeyboardInterrupt, Interrupted) as reason:
        done = len(found) + len(trained)
        raise Interrupted(
            f"{str(reason) or 'interrupted'}: {done} of {len(tasks)} populations are stored in {folder}"
        ) from reason
    finally:
        sweep(folder)
    if failed:
        raise CollectError(
            f"{len(failed)} of {len(tasks)} populations could not be trained, the others are stored in {folder}; "
            f"first: {failed[0].task}: {failed[0].error}"
        )
    return Collected(tuple(trained), tuple(found), tuple(moved_aside), diverged)
