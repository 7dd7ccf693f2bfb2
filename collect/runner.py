"""Carrying out a plan: worker processes, one thread each; what is done stays done.

The valid files in the zoo's folder are the only truth about what is done: collecting is the plan minus those files. All
that follows from it: run the same call again after a kill and it goes on; run it twice and the second does nothing.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from collect import data, zoo_file
from collect.durable import sweep
from collect.plan import Task, save
from collect.population import train
from generators.commandline import Interrupted
from generators.errors import ConfigError, DataError, PowerhouseError, ZooError

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.2


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


@dataclass(frozen=True)
class _Outcome:
    """What a worker sends back: ids and a summary, never weights."""

    task: Task
    diverged: int = 0
    seconds: float = 0.0
    error: str = ""  # one line; empty if the population is stored
    detail: str = ""  # the traceback of what is nobody's wrong input
    fatal: bool = False  # the folder cannot be written: no task would fare better


# --- what is there -----------------------------------------------------------------------------------------------


def check(task: Task, folder: str | Path) -> str | None:
    """None if the population of `task` is stored and whole; "" if it is not there; else what is wrong with its file."""
    path = zoo_file.path_of(folder, task.id)
    if not path.exists():
        return ""
    try:
        zoo_file.verify(path)
    except ZooError as error:
        return str(error)
    return None


def _move_aside(path: Path) -> Path:
    """Rename a damaged file to a name that no reader looks at and no earlier one has."""
    number = 0
    while (aside := path.with_name(f"{path.name}.bad{number or ''}")).exists():
        number += 1
    return path.rename(aside)


# --- in a worker -------------------------------------------------------------------------------------------------


_load = functools.lru_cache(maxsize=2)(data.load)


def perform(task: Task, folder: Path, root: Path | None, on_fraction: Callable[[str, float], None]) -> _Outcome:
    """Train and store one population. Its own failures come back as text, so that any exception crosses processes."""
    try:
        images = _load(task.recipe.data, root=root)
        if images.digest != task.data_digest:
            raise DataError(f"data set {task.recipe.data!r} has changed since the plan was made; plan again")
        epochs = task.recipe.epochs
        population = train(
            task.recipe, task.seeds, images, on_epoch=lambda epoch: on_fraction(task.id, min(epoch / epochs, 1.0))
        )
        zoo_file.write(population, folder)
    except Interrupted:
        raise
    except PowerhouseError as error:
        return _Outcome(task, error=str(error), fatal=isinstance(error, ZooError))
    except Exception as error:  # a fault of the engine or of a third party's initialiser
        return _Outcome(task, error=f"{type(error).__name__}: {error}", detail=f"\n{traceback.format_exc()}")
    return _Outcome(task, diverged=population.status.count("diverged"), seconds=population.seconds)


_ticks: Any = None  # the queue to the collector; set in worker processes only


def _leave_with(collector: Connection) -> None:
    """End this process when the collector closes its end of the pipe, which its death does as well."""
    with suppress(EOFError):
        collector.recv()
    os._exit(1)


def _begin(collector: Connection, ticks: Any) -> None:
    """Start of a worker process."""
    global _ticks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the collector ends its workers
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with, args=(collector,), daemon=True).start()
    _ticks = ticks


def _perform_in_worker(task: Task, folder: Path, root: Path | None) -> _Outcome:
    return perform(task, folder, root, lambda *progress: _ticks.put(progress))


# --- the two ways to work ----------------------------------------------------------------------------------------


def _in_this_process(
    tasks: Sequence[Task], folder: Path, root: Path | None, on_fraction: Callable[[str, float], None]
) -> Generator[_Outcome, None, None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker: sums in another order would be other networks under the same id
    try:
        for task in tasks:
            yield perform(task, folder, root, on_fraction)
    finally:
        torch.set_num_threads(threads)


def _in_processes(
    tasks: Sequence[Task], folder: Path, root: Path | None, on_fraction: Callable[[str, float], None], workers: int
) -> Generator[_Outcome, None, None]:
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    alive, collector = context.Pipe(duplex=False)
    ticks = context.SimpleQueue()
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(alive, ticks))

    def drain() -> None:
        while not ticks.empty():
            on_fraction(*ticks.get())

    try:
        waiting = {executor.submit(_perform_in_worker, task, folder, root) for task in tasks}
        while waiting:
            finished, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            drain()
            for future in finished:
                yield future.result()
    except BrokenProcessPool as error:
        raise Interrupted(
            "a worker process ended on its own (killed for want of memory? then use fewer workers; started from a "
            "script? then call it under `if __name__ == '__main__':`)"
        ) from error
    finally:
        collector.close()  # workers that are still busy end at once; what they were writing is swept
        executor.shutdown(wait=True, cancel_futures=True)
        alive.close()
        ticks.close()


def _usable_cores() -> int:
    import joblib  # type: ignore[import-untyped]  # comes with scikit-learn; respects affinity and container limits

    return joblib.cpu_count()


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
        ZooError: the folder cannot be written.
        ConfigError: a negative number of workers.
    """
    folder, root = Path(folder), None if root is None else Path(root)
    if workers is not None and workers < 0:
        raise ConfigError(f"workers must be at least 0 (0: train in this process), got {workers}")
    tasks = list({task.id: task for task in tasks}.values())
    advance = on_progress or (lambda amount: None)
    save(tasks, folder)
    sweep(folder)
    found, moved_aside, open_tasks = [], [], []
    for task in tasks:
        fault = check(task, folder)
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

    way = _in_this_process
    if workers != 0 and open_tasks:
        way = functools.partial(_in_processes, workers=min(workers or _usable_cores(), len(open_tasks)))
    trained, failed, diverged = [], [], 0
    try:
        with closing(way(open_tasks, folder, root, on_fraction)) as outcomes:
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
                log.info("population %s stored after %.1f s%s", outcome.task, outcome.seconds, flag)
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
