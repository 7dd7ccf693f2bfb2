"""What every command line of the project shares: logging, progress bars and exit codes.

Exit codes: 0 done; 2 wrong usage or input (one line on stderr says what, why and what to do); 3 interrupted, and
running the same command again goes on from there. Standard output carries results only, all else goes to stderr.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from generators.errors import PowerhouseError

EXIT_DONE, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 0, 2, 3


class Interrupted(Exception):
    """Raised by long work that was asked to stop and can be resumed; no error, the work done so far is safe."""


def _on_terminate(number: int, frame: Any) -> None:
    raise Interrupted("asked to terminate")


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM, which batch systems send before they kill, ends the program like Ctrl-C: clean and resumable."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return
    before = signal.signal(signal.SIGTERM, _on_terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _log_to_stderr() -> None:
    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False, markup=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    for chatty in ("httpx", "urllib3", "matplotlib", "h5py"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def run(main: Callable[[], object]) -> int:
    """Run a command and give its exit code: `sys.exit(run(main))` is the last line of every `__main__.py`.

    Args:
        main: parses the command line and does the work. `PowerhouseError` and `OSError` about a named file become one
            line on stderr; faults of this package keep their traceback.

    Returns:
        0 done, 2 wrong usage or input, 3 interrupted but resumable.
    """
    from rich.console import Console
    from rich.text import Text

    _log_to_stderr()

    def say(text: str, style: str) -> None:
        Console(stderr=True, soft_wrap=True).print(Text(text, style=style))

    try:
        with _terminate_as_interrupt():
            main()
    except PowerhouseError as error:
        say(f"error: {error}", "bold red")
        return EXIT_WRONG_INPUT
    except (Interrupted, KeyboardInterrupt) as interruption:
        reason = str(interruption) or "interrupted"
        say(f"{reason}; run the same command again to go on", "yellow")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough, as in `... list | head`
        with contextlib.suppress(OSError):
            import os
            import sys

            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None:
            raise
        reason = error.strerror or type(error).__name__
        say(f"error: {error.filename}: {reason}; make room there, or name a place that can be used", "bold red")
        return EXIT_WRONG_INPUT
    return EXIT_DONE


class Progress:
    """One bar: `advance(amount)` moves it, `describe(text)` changes its label. Given by `progress`."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def advance(self, amount: float = 1.0) -> None:
        """Move the bar by `amount` units of the total."""
        self._bar.advance(self._task, amount)

    def describe(self, text: str) -> None:
        """Replace the label."""
        self._bar.update(self._task, description=text)

    __call__ = advance  # so that a bar can be handed on as a plain callback


@contextlib.contextmanager
def progress(description: str, total: float | None) -> Iterator[Progress]:
    """A progress bar on stderr with the time left; quiet, but for its last state, where stderr is not a terminal.

    Args:
        description: what is being done, for the user.
        total: how many units there are, None if nobody knows.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with RichProgress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield Progress(bar, task)
        if total is not None and abs(bar.tasks[0].completed - total) < 1e-6 * total:
            bar.update(task, completed=total)  # a sum of fractions falls short by rounding
