"""Work in other processes that leaves no orphans: one thread each, spawned, ended with whoever started them.

`in_processes` runs calls and yields their results as they come. Each call may report progress through `tick`. When the
caller stops listening (an error, Ctrl-C, a kill), the workers end at once: they hold one end of a pipe whose other end
is the caller's, and its death closes that as well.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from generators.commandline import Interrupted

Result = TypeVar("Result")
Tick = Callable[..., object]

_POLL_SECONDS = 0.2
_ticks: Any = None  # the queue to the caller; set in worker processes only


def usable_cores() -> int:
    """Cores that this process may use."""
    import joblib  # type: ignore[import-untyped]  # comes with scikit-learn; respects affinity and container limits

    return joblib.cpu_count()


def _leave_with(caller: Connection) -> None:
    """End this process when the caller closes its end of the pipe, which its death does as well."""
    with suppress(EOFError):
        caller.recv()
    os._exit(1)


def _begin(caller: Connection, ticks: Any) -> None:
    """Start of a worker process."""
    global _ticks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the caller ends its workers
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with, args=(caller,), daemon=True).start()
    _ticks = ticks


def _perform(call: Callable[[Tick], Result]) -> Result:
    return call(lambda *progress: _ticks.put(progress))


def in_processes(
    calls: Iterable[Callable[[Tick], Result]], *, workers: int, on_tick: Tick
) -> Generator[Result, None, None]:
    """Run `calls` in `workers` processes.

    Args:
        calls: picklable functions of one argument `tick`, which sends its arguments to the caller.
        workers: processes, at least 1.
        on_tick: called in this process with what the calls sent.

    Yields:
        The results as they come, in no order.

    Raises:
        Interrupted: a worker process ended on its own.
        Exception: what a call raised.
    """
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    alive, caller = context.Pipe(duplex=False)
    ticks = context.SimpleQueue()
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(alive, ticks))

    def drain() -> None:
        while not ticks.empty():
            on_tick(*ticks.get())

    try:
        waiting = {executor.submit(_perform, call) for call in calls}
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
        caller.close()  # workers that are still busy end at once; what they were writing is swept
        executor.shutdown(wait=True, cancel_futures=True)
        alive.close()
        ticks.close()
