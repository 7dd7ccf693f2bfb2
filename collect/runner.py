"""Carrying out a plan with any executor; what is done stays done.

The valid files in the zoo's folder are the only truth about what is done: collecting is the plan minus those files. All
that follows from it: run the same call again after a kill and it goes on; run it twice and the second does nothing; run
it on two machines that see the folder and each does a part.

Valid is a file of the size and time of change that the index knows (`collect.index`), or one whose structure is in
order when it is opened; with `verify`, one whose every byte matches its digests.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collect import beside, durable, failures, index, unfinished, zoo_file
from collect.executors import Executor, make
from collect.executors.attempt import Attempt, Elsewhere, check, free
from collect.executors.base import Result
from collect.index import Index
from collect.perform import Outcome, known_device
from collect.plan import Task, digest, save
from generators.commandline import Interrupted
from generators.errors import ConfigError, PowerhouseError, ZooError

__all__ = ["CollectError", "Collected", "check", "collect"]

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0  # between looks at what other collectors are at, once nothing else is left


class CollectError(PowerhouseError):
    """Some populations could not be trained; the others are stored."""


@dataclass(frozen=True)
class Collected:
    """What `collect` did.

    Attributes:
        trained: ids of the populations trained now.
        found: ids of those that were there, or were finished by another collector meanwhile.
        moved_aside: damaged files of the plan, under their new names.
        diverged: how many of the networks trained now diverged.
    """

    trained: tuple[str, ...]
    found: tuple[str, ...]
    moved_aside: tuple[Path, ...]
    diverged: int


@dataclass
class _Progress:
    """What is done so far; passes on, in networks, how much that is more than before."""

    advance: Callable[[float], object]
    sizes: dict[str, int]
    fractions: dict[str, float]
    found: list[str] = field(default_factory=list)
    trained: list[Outcome] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)

    def tick(self, task: str, fraction: float) -> None:
        """`fraction` of a population is done; one that is tried again says less than before, which changes nothing."""
        gained = fraction - self.fractions[task]
        if gained > 0:
            self.fractions[task] = fraction
            self.advance(gained * self.sizes[task])

    def take(self, result: Result) -> Task | None:
        """Count what became of one attempt; the task, if another collector is at it."""
        if isinstance(result, Elsewhere):
            if not result.done:
                return result.task
            self.found.append(result.task.id)
        elif result.fatal:
            raise ZooError(result.error)
        elif result.error:
            self.failed.append(result)
            log.error("population %s failed: %s%s", result.task, result.error, result.detail)
            return None
        else:
            self.trained.append(result)
            flag = f", {result.diverged} diverged" if result.diverged else ""
            log.debug("population %s stored after %.1f s%s", result.task, result.seconds, flag)
        self.tick(result.task.id, 1.0)
        return None


def _faults(tasks: Sequence[Task], folder: Path, *, verify: bool) -> tuple[dict[str, str | None], Index | None]:
    """What `check` says of every task, and the index of the folder if it is to be kept; nothing is written."""
    if verify or not folder.is_dir():
        return {task.id: check(task, folder, verify=verify) for task in tasks}, None
    found, bad, new = index.look(folder)
    faults: dict[str, str | None] = dict.fromkeys(() if found is None else found.entries("id"))
    broken = {path.name.removesuffix(zoo_file.SUFFIX): error for path, error in bad.items()}
    for task in tasks:
        error = broken.get(task.id, "")
        if isinstance(error, zoo_file.NewerSchemaError):
            raise error
        faults.setdefault(task.id, str(error))
    return faults, found if new else None


def _describe(tasks: Sequence[Task], folder: Path, config: Mapping[str, Any] | None) -> None:
    """Write the plan, and beside it who began it and how, unless that is there."""
    save(tasks, folder)
    place = folder / f"config-{digest(tasks)}.json"
    if config is not None and not place.exists():
        with durable.durable(place) as temporary:
            temporary.write_text(json.dumps(config, indent=1, sort_keys=True, default=str))


def _make_room(tasks: Sequence[Task], faults: Mapping[str, str | None], folder: Path) -> tuple[Path, ...]:
    """Rename the damaged files of tasks to names that no reader looks at and no earlier one has."""
    moved = []
    for task in tasks:
        if fault := faults[task.id]:
            path, number = zoo_file.path_of(folder, task.id), 0
            while (aside := path.with_name(f"{path.name}.bad{number or ''}")).exists():
                number += 1
            moved.append(path.rename(aside))
            log.warning("%s; moved aside to %s, its networks are trained again", fault, aside.name)
    return tuple(moved)


def _sweep(folder: Path) -> None:
    """Delete what killed collectors left and nobody needs."""
    durable.sweep(folder)
    for place in (unfinished.FOLDER, failures.FOLDER):
        beside.sweep(folder / place, stored=lambda population: zoo_file.path_of(folder, population).exists())


def _carry_out(
    tasks: list[Task], executor: Executor, attempt: Callable[[Task], Attempt], folder: Path, progress: _Progress
) -> None:
    """Everything that no other collector is at; then, as they end or die, what the others were at."""
    while tasks:
        ready = free(tasks, folder)
        executor.submit(map(attempt, ready))
        with contextlib.closing(executor.finished(progress.tick)) as results:
            given_back = list(filter(None, map(progress.take, results)))
        mine = {task.id for task in ready} - {task.id for task in given_back}
        left = [task for task in tasks if task.id not in mine]
        if len(left) == len(tasks):
            log.debug("waiting for other collectors, who are at %d populations", len(left))
            time.sleep(LOOK_SECONDS)
        tasks = left


def collect(
    tasks: Sequence[Task],
    folder: str | Path,
    *,
    executor: Executor | None = None,
    workers: int | None = None,
    root: str | Path | None = None,
    device: str = "cpu",
    verify: bool = False,
    config: Mapping[str, Any] | None = None,
    on_progress: Callable[[float], object] | None = None,
) -> Collected:
    """Train and store every task whose population is not in `folder` yet.

    Args:
        tasks: of one or several recipes, from `collect.plan.plan`.
        folder: the zoo; made if it is not there. Several collectors may work on it at once.
        executor: where to train, from `collect.executors.make`; None for worker processes of this machine.
        workers: without an executor: worker processes, None for one per usable core; 0 trains in this process.
        root: where data sets lie, see `collect.data.load`.
        device: of torch, where every process trains; several may share a GPU. A Ray cluster has to grant it.
        verify: compare every byte of what is there with its digests; otherwise files that the index of the zoo knows
            are believed, and of others the structure is checked.
        config: how this was called, JSON; kept in the zoo beside the plan, as it was the first time.
        on_progress: called with numbers of networks (and parts of networks) done since the last call; they add up to
            the number of networks in `tasks`, those that were there included.

    Returns:
        What was done. Networks that diverged are stored and flagged, they are no failure.

    Raises:
        Interrupted: by SIGINT, SIGTERM or the loss of a worker; the workers have ended and what is finished is stored.
        CollectError: some populations could not be trained; all others are stored.
        ZooError: the folder cannot be written, or holds a population of the plan that a newer version wrote; or the
            device is not there.
        ConfigError: a negative number of workers, or one beside an executor; no such kind of device; no cluster that
            the executor needs, or none with such a device. Nothing has been written then.
    """
    # Resolved, for other processes may have another working folder.
    folder, root = Path(folder).resolve(), None if root is None else Path(root).resolve()
    if workers is not None and (workers < 0 or executor is not None):
        raise ConfigError(
            f"workers must be at least 0 (0: train in this process), got {workers}" if executor is None
            else "workers are a setting of the executor, where there is one"
        )  # fmt: skip
    known_device(device)
    executor = executor or (make("here") if workers == 0 else make("processes", workers=workers))
    attempt = functools.partial(Attempt, folder=folder, root=root, device=device)
    tasks = list({task.id: task for task in tasks}.values())
    progress = _Progress(
        on_progress or (lambda amount: None),
        sizes={task.id: len(task.seeds) for task in tasks},
        fractions=dict.fromkeys((task.id for task in tasks), 0.0),
    )
    faults, found = _faults(tasks, folder, verify=verify)
    open_tasks = [task for task in tasks if faults[task.id] is not None]
    open_tasks.sort(key=lambda task: -task.cost)  # the longest first, so that no worker ends long after the others
    with executor.opened(device=device) if open_tasks else contextlib.nullcontext():
        _describe(tasks, folder, config)
        if found is not None:
            index.keep(found, folder)
        _sweep(folder)
        moved_aside = _make_room(open_tasks, faults, folder)
        for task in tasks:
            if faults[task.id] is None:
                progress.take(Elsewhere(task, done=True))
        if progress.found:
            log.info("%d of %d populations are there, %d to train", len(progress.found), len(tasks), len(open_tasks))
        try:
            _carry_out(open_tasks, executor, attempt, folder, progress)
        except (KeyboardInterrupt, Interrupted) as reason:
            done = sum(zoo_file.path_of(folder, task.id).exists() for task in tasks)
            raise Interrupted(
                f"{str(reason) or 'interrupted'}: {done} of {len(tasks)} populations are stored in {folder}"
            ) from reason
        finally:
            _sweep(folder)
    if progress.failed:
        first = progress.failed[0]
        raise CollectError(
            f"{len(progress.failed)} of {len(tasks)} populations could not be trained, the others are stored in "
            f"{folder}; first: {first.task}: {first.error}"
        )
    return Collected(
        tuple(outcome.task.id for outcome in progress.trained),
        tuple(progress.found),
        moved_aside,
        sum(outcome.diverged for outcome in progress.trained),
    )
