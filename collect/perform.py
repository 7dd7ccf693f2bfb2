"""The unit of work: train one population and store it. What every executor runs, wherever it runs it.

Running a task twice does no harm: the second time finds the file of the first. A training that fails is recorded in
the zoo (`collect.failures`) until it succeeds.
"""

from __future__ import annotations

import functools
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from collect import beside, data, failures, unfinished, zoo_file
from collect.durable import claim
from collect.memory import keep_freed_memory
from collect.plan import Task, init_digest
from collect.population import train
from collect.workers import Tick
from generators.commandline import Interrupted
from generators.errors import ConfigError, DataError, PowerhouseError, ZooError


@dataclass(frozen=True)
class Outcome:
    """What a worker sends back: ids and a summary, never weights."""

    task: Task
    diverged: int = 0
    seconds: float = 0.0
    error: str = ""  # one line; empty if the population is stored
    detail: str = ""  # the traceback of what is nobody's wrong input
    fatal: bool = False  # the folder cannot be written, the device is not there: no task would fare better


@functools.lru_cache(maxsize=2)
def _images(name: str, root: Path | None, digest: str) -> data.ImageSet:
    """The data set, which must be the one that the plan was made for."""
    images = data.load(name, root=root)
    if images.digest != digest:
        raise DataError(f"data set {name!r} has changed since the plan was made; plan again")
    return images


class DeviceError(ConfigError):
    """A device that torch does not know, or that is not there."""


def known_device(device: str) -> torch.device:
    """The device, if there is such a kind; whether it is there is for the process to find out that trains on it."""
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise DeviceError(
            f"cannot train on device {device!r}: torch knows no such device, but cpu, cuda, cuda:1, ...; leave it "
            "out to train on the CPU"
        ) from error


def check_here(device: str) -> None:
    """Whether this machine has a GPU of that name, without setting one up: a process that only waits needs none.

    Raises:
        DeviceError: it has not.
    """
    found = known_device(device)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"cannot train on device {device!r}: torch finds {torch.cuda.device_count()} GPUs here; leave it out to "
            "train on the CPU"
        )


def _usable(device: str) -> torch.device:
    """The device, if torch knows it and it is there."""
    try:
        return torch.empty(0, device=known_device(device)).device
    except (RuntimeError, AssertionError) as error:  # how torch says so differs from device to device
        reason = str(error).splitlines()[0]
        raise DeviceError(f"cannot train on device {device!r}: {reason}; leave it out to train on the CPU") from error


def _failed(outcome: Outcome, folder: Path) -> Outcome:
    failures.record(folder, outcome.task, outcome.error, detail=outcome.detail)
    return outcome


def perform(
    task: Task, folder: Path, root: Path | None, tick: Tick, *, device: str = "cpu", images: data.ImageSet | None = None
) -> Outcome:
    """Train and store one population. Its own failures come back as text, so that any exception crosses processes.

    Args:
        task: what to train.
        folder: of the zoo.
        root: where data sets lie, see `collect.data.load`.
        tick: called before every step with the task's id and the fraction that is done. If it raises `Interrupted`,
            the training state is saved, and the same task goes on from there another time.
        device: where to train.
        images: the data set of the plan where the executor has it at hand; otherwise it is loaded.
    """
    keep_freed_memory()
    state = unfinished.path_of(folder, task.id)
    try:
        with claim(zoo_file.path_of(folder, task.id)) as mine:  # before anything that takes time
            where = _usable(device)
            images = images or _images(task.recipe.data, root, task.data_digest)
            if init_digest(task.recipe.init) != task.recipe.init_digest:
                raise ConfigError(
                    f"the checkpoint in {task.recipe.init!r} has changed since the plan was made; plan again"
                )

            def told(fraction: float) -> None:
                mine.tell(fraction)
                tick(task.id, fraction)

            population = train(
                task.recipe, task.seeds, images, stack=task.stack, tick=told, unfinished_path=state, device=where
            )
            zoo_file.write(population, folder)
            for done_with in (state, failures.path_of(folder, task.id)):
                beside.discard(done_with)
    except Interrupted:
        raise
    except (ZooError, DeviceError) as error:  # of the folder or the machine, not of the task
        return Outcome(task, error=str(error), fatal=True)
    except PowerhouseError as error:
        return _failed(Outcome(task, error=str(error)), folder)
    except Exception as error:  # a fault of the engine or of a third party's initialiser
        detail = f"\n{traceback.format_exc()}"
        return _failed(Outcome(task, error=f"{type(error).__name__}: {error}", detail=detail), folder)
    return Outcome(task, diverged=population.status.count("diverged"), seconds=population.seconds)
