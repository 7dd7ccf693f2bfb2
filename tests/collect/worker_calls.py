"""Calls for the worker processes of `test_workers.py`, and a caller to kill: `python worker_calls.py FOLDER GRACE`."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from collect.workers import in_processes
from generators.commandline import run


def square(number: int, tick: Callable[..., object]) -> int:
    tick(number)
    return number**2


def until_stopped(folder: Path, tick: Callable[..., object]) -> None:
    """Steps of a millisecond until it is stopped, then half a second to save. Tells by files where it is."""
    (folder / f"{os.getpid()}.at-work").touch()
    tick("at work")
    try:
        while True:
            tick()
            time.sleep(0.001)
    finally:
        time.sleep(0.5)
        (folder / f"{os.getpid()}.saved").touch()


def deaf(folder: Path, tick: Callable[..., object]) -> None:
    """Work that never looks whether to stop."""
    (folder / f"{os.getpid()}.deaf").touch()
    time.sleep(600)


def _main() -> None:
    folder, grace = Path(sys.argv[1]), float(sys.argv[2])
    calls = [functools.partial(each, folder) for each in (until_stopped, deaf)]
    list(in_processes(calls, workers=2, on_tick=lambda *progress: None, grace=grace))


if __name__ == "__main__":
    sys.exit(run(_main))
