"""Collect a tiny plan with a pause before every rename, for `test_killed.py` to kill.

`python slow_collector.py FOLDER PAUSE WORKERS`. Workers that are stopped in a pause have no time of grace.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from collect.executors import make
from collect.plan import Task, plan, sweep
from collect.recipe import Recipe
from collect.runner import collect
from generators.commandline import run

_replace = os.replace


def _slow_replace(source: str, destination: str) -> None:
    if str(destination).endswith(".h5"):
        time.sleep(float(sys.argv[2]))
    _replace(source, destination)


os.replace = _slow_replace  # in the worker processes too: they import this file


def tasks() -> list[Task]:
    """Six populations of two networks, of two recipes."""
    base = Recipe(epochs=2, batch_size=256)
    return plan(sweep(base, architecture=["mlp-1-w4", "resnet-8-w2"]), runs=6, together=2)


if __name__ == "__main__":
    processes = make("processes", workers=int(sys.argv[3]), grace=0.0)
    sys.exit(run(lambda: collect(tasks(), Path(sys.argv[1]), executor=processes)))
