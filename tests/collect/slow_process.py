"""Collect a small plan in a process of its own, for `test_crash.py` to kill; it hangs where it is told to."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from collect import perform
from collect.plan import Task, plan, sweep
from collect.population import train
from collect.recipe import Recipe
from collect.runner import collect
from generators.commandline import run

PLACES = ("half", "written", "renamed")  # of a file on its way to its name


def tasks() -> list[Task]:
    """Ten populations: tiny ones; and two that take longer, in two stacks, with everything that draws numbers."""
    tiny = sweep(Recipe(architecture="mlp-1-w4", epochs=1, batch_size=256), init=["he", "xavier"])
    long = Recipe(architecture="vgg-3-w2", epochs=3, batch_size=128, augmentation="flip-crop", saved="all")
    other = Recipe(architecture="mlp-2-w8", epochs=6, batch_size=128, optimiser="adamw", lr=0.01, augmentation="shift")
    return [*plan(tiny, runs=8, together=2), *(replace(task, stack=2) for task in plan([long, other], runs=4))]


def hang_at(place: str, suffix: str, tell: Connection) -> None:
    """Make this process hang at `place` of the next file with `suffix` that gets its name."""
    rename = os.replace

    def hanging(source: Path, destination: Path) -> None:
        if not str(destination).endswith(suffix):
            rename(source, destination)
            return
        if place == "half":
            os.truncate(source, Path(source).stat().st_size // 2)
        elif place == "renamed":
            rename(source, destination)
        tell.send(place)
        time.sleep(600)

    os.replace = hanging  # type: ignore[assignment]


def collector(folder: Path, tell: Connection, *, place: str = "", suffix: str = "", save_every: float = 0.05) -> None:
    """Collect in this process, which hangs if a place is given; the exit code is that of a command line."""
    if place:
        hang_at(place, suffix, tell)
    perform.train = functools.partial(train, save_every=save_every)  # type: ignore[attr-defined]
    raise SystemExit(run(lambda: collect(tasks(), folder, workers=0)))
