"""In worker processes of this machine, one thread each."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator

from collect.executors.attempt import Attempt
from collect.executors.base import Executor, Result, at_least_one
from collect.perform import check_here
from collect.workers import GRACE_SECONDS, Tick, in_processes, usable_cores


class Processes(Executor):
    """See `collect.workers.in_processes`.

    Args:
        workers: how many, None for one per usable core.
        grace: seconds they have to save what they need when they are stopped.
    """

    def __init__(self, *, workers: int | None = None, grace: float = GRACE_SECONDS) -> None:
        super().__init__()
        self._workers, self._grace = at_least_one(workers), grace

    @contextlib.contextmanager
    def opened(self, *, device: str) -> Iterator[None]:
        """See `Executor.opened`: the device is one of this machine."""
        check_here(device)
        yield

    def _next(self) -> Iterator[Attempt]:
        while self.waiting:
            yield self.waiting.popleft()

    def finished(self, on_tick: Tick) -> Generator[Result, None, None]:
        """See `Executor.finished`. A worker that is lost ends the iteration with `Interrupted`."""
        if not self.waiting:
            return
        workers = min(self._workers or usable_cores(), len(self.waiting))
        try:
            yield from in_processes(self._next(), workers=workers, on_tick=on_tick, stop=self.stop, grace=self._grace)
        finally:
            self.waiting.clear()
