"""In this process, one after the other."""

from __future__ import annotations

from collections.abc import Generator

import torch

from collect.executors.base import Executor, Result
from collect.workers import Tick, stoppable


class Here(Executor):
    """No other process; the slow obvious twin of the other executors."""

    def finished(self, on_tick: Tick) -> Generator[Result, None, None]:
        """See `Executor.finished`."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker: sums in another order would be other networks under the same id
        tick = stoppable(on_tick, self.stop)
        try:
            while self.waiting:
                tick()
                yield self.waiting.popleft()(tick)
        finally:
            torch.set_num_threads(threads)
            self.waiting.clear()
