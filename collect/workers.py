"""Work in other processes that leaves no orphans: one thread each, spawned, ended with whoever started them.

`in_processes` runs calls and yields their results as they come. Each call may report progress through `tick`, which
raises `Interrupted` once the work should stop. That is so when the caller stops listening (an error, Ctrl-C, a kill):
the workers hold one end of a pipe whose other end is the caller's, and its death closes that as well. They then have a
time of grace to save what they need; after it they are ended wherever they are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from generators.commandline import Interrupted

Result = TypeVar("Result")
Tick = Callable[..., object]

GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.2
_ticks: Any = None  # the queue to the caller; set in worker processes only
_stop, _idle = threading.Event(), threading.Event()  # of this worker: it should end; it has nothing to save


def usable_cores() -> int:
    """Cores that this process may use."""
    import joblib  # type: ignore[import-untyped]  # comes with scikit-learn; respects affinity and container limits

    return joblib.cpu_count()


def stoppable(send: Callable[..., object], stop: threading.Event) -> Tick:
    """A `tick` that hands its arguments to `send`, and raises `Interrupted` once `stop` is set.

    Without arguments it only looks whether to stop, which costs next to nothing.
    """

    def tick(*progress: object) -> None:
        if stop.is_set():
            raise Interrupted("asked to stop")
        if progress:
            send(*progress)

    return tick


def _leave_with(caller: Connection, grace: float) -> None:
    """End this process after its caller closes its end of the pipe, which the caller's death does as well."""
    with suppress(EOFError):
        caller.recv()
    _stop.set()
    _idle.wait(grace)
    os._exit(1)


def _begin(caller: Connection, ticks: Any, grace: float) -> None:
    """Start of a worker process."""
    global _ticks
    # Signals of a whole group are for the caller, who ends its workers: Ctrl-C, and SLURM's notice of a time-out.
    for ignored in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: _stop.set())
    torch.set_num_threads(1)
    _ticks = ticks
    _idle.set()
    threading.Thread(target=_leave_with, args=(caller, grace), daemon=True).start()


def _perform(call: Callable[[Tick], Result]) -> Result:
    _idle.clear()
    try:
        tick = stoppable(lambda *progress: _ticks.put(progress), _stop)
        tick()
        return call(tick)
    finally:
        _idle.set()


def in_processes(
    calls: Iterable[Callable[[Tick], Result]],
    *,
    workers: int,
    on_tick: Tick,
    stop: threading.Event | None = None,
    grace: float = GRACE_SECONDS,
) -> Generator[Result, None, None]:
    """Run `calls` in `workers` processes.

    Args:
        calls: picklable functions of one argument `tick`, which sends its arguments to the caller; taken from the
            iterable as workers become free.
        workers: processes, at least 1.
        on_tick: called in this process with what the calls sent.
        stop: set it, in any thread, to end the work as if the caller had stopped listening.
        grace: seconds that calls have to end after their `tick` began to raise `Interrupted`.

    Yields:
        The results as they come, in no order.

    Raises:
        Interrupted: by `stop`, or because a worker process ended on its own.
        Exception: what a call raised.
    """
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    alive, caller = context.Pipe(duplex=False)
    ticks = context.SimpleQueue()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(alive, ticks, grace))
    calls = iter(calls)
    waiting: set[Future[Result]] = set()

    def drain() -> None:
        while not ticks.empty():
            on_tick(*ticks.get())

    try:
        while True:
            # A window, for plans may be long: one call for each worker, and one that it finds when it is done.
            waiting |= {pool.submit(_perform, call) for call in islice(calls, 2 * workers - len(waiting))}
            if not waiting:
                return
            finished, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            drain()
            for future in finished:
                yield future.result()
            if stop is not None and stop.is_set():
                raise Interrupted("asked to stop")
    except BrokenProcessPool as error:
        raise Interrupted(
            "a worker process ended on its own (killed for want of memory? then use fewer workers; started from a "
            "script? then call it under `if __name__ == '__main__':`)"
        ) from error
    finally:
        caller.close()  # idle workers end at once, the others within the time of grace
        pool.shutdown(wait=True, cancel_futures=True)
        alive.close()
        ticks.close()
