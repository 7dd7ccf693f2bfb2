"""What an executor is: something that takes attempts and gives back what became of them.

All that makes a collection safe lies in the attempts and in the way files are written: an attempt that runs twice, or
is killed, does no harm. An executor only decides where they run.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Iterator

from collect.executors.attempt import Attempt, Elsewhere
from collect.perform import Outcome
from collect.workers import Tick
from generators.commandline import Interrupted
from generators.errors import ConfigError

Result = Outcome | Elsewhere


def at_least_one(workers: int | None) -> int | None:
    """`workers`, if it is None or a number that makes sense."""
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be at least 1 (0, without an executor: train in this process), got {workers}")
    return workers


class Executor(ABC):
    """Submit, iterate over what is finished, cancel.

    with executor.opened(device="cpu"):
        executor.submit(attempts)
        with closing(executor.finished(on_tick)) as results:
            for result in results: ...
    """

    def __init__(self) -> None:
        self.waiting: deque[Attempt] = deque()
        self.stop = threading.Event()

    @contextlib.contextmanager
    def opened(self, *, device: str) -> Iterator[None]:
        """What is needed for as long as there is work, such as a connection; entered before anything is written.

        Args:
            device: of torch, where the attempts train.

        Raises:
            ConfigError: no attempt could run: there is no cluster, or no such device in it.
        """
        yield

    def submit(self, attempts: Iterable[Attempt]) -> None:
        """Take on more attempts; they start with `finished`, the first ones first. `Interrupted` after `cancel`."""
        if self.stop.is_set():
            raise Interrupted("asked to stop")
        self.waiting.extend(attempts)

    @abstractmethod
    def finished(self, on_tick: Tick) -> Generator[Result, None, None]:
        """Run what was submitted.

        Closing the iterator before its end stops the attempts: their `tick` raises `Interrupted`, and after a time of
        grace those that still run are ended. When it is closed nothing is left running.

        Args:
            on_tick: called in this process with the id of a task and the fraction of it that is done.

        Yields:
            What became of each attempt, as it comes, in no order. A process that is lost is no `Outcome`: it is
            replaced, or ends the iteration.

        Raises:
            Interrupted: by `cancel`, or because processes were lost.
        """

    def cancel(self) -> None:
        """Make `finished` stop its attempts and raise `Interrupted`; from any thread or signal handler, for good."""
        self.stop.set()
