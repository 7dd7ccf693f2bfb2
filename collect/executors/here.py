"""In this process, one after the other."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Generator, Iterator
from typing import Any

import torch

from collect.executors.base import Executor, Result
from collect.perform import check_here
from collect.workers import Tick, stoppable


@contextlib.contextmanager
def _stop_by_signal(stop: threading.Event) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets `stop`, so that a training ends between two steps; the second acts as before."""
    before: dict[signal.Signals, Any] = {}

    def restore(*_: object) -> None:
        while before:
            signal.signal(*before.popitem())

    def on_signal(*_: object) -> None:
        stop.set()
        restore()

    if threading.current_thread() is threading.main_thread():  # no other may set signal handlers
        before.update({number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield
    finally:
        restore()


class Here(Executor):
    """No other process; the slow obvious twin of the other executors."""

    @contextlib.contextmanager
    def opened(self, *, device: str) -> Iterator[None]:
        """See `Executor.opened`: the device is one of this machine."""
        check_here(device)
        yield

    def finished(self, on_tick: Tick) -> Generator[Result, None, None]:
        """See `Executor.finished`."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker: sums in another order would be other networks under the same id
        tick = stoppable(on_tick, self.stop)
        try:
            with _stop_by_signal(self.stop):
                while self.waiting:
                    tick()
                    yield self.waiting.popleft()(tick)
        finally:
            torch.set_num_threads(threads)
            self.waiting.clear()
