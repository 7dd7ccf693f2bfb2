"""Worker processes: what they give back, how they are asked to stop, that they never stay."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest

from collect import workers
from collect.durable import _is_running
from collect.workers import in_processes, stoppable
from generators.commandline import EXIT_INTERRUPTED, Interrupted

HERE = Path(__file__).parent


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The functions of `worker_calls.py`, by a name that worker processes can import as well."""
    monkeypatch.syspath_prepend(HERE)
    import worker_calls  # type: ignore[import-not-found]

    return worker_calls


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_results_and_ticks_of_more_calls_than_fit_in_the_window(calls: ModuleType) -> None:
    ticks, taken = [], []

    def numbered() -> Iterator[Callable[..., int]]:
        for number in range(20):
            taken.append(number)
            yield functools.partial(calls.square, number)

    with closing(in_processes(numbered(), workers=1, on_tick=ticks.append)) as results:
        first = next(results)
        assert len(taken) <= 4, "calls are to be taken as workers become free"
        assert sorted([first, *results]) == [number**2 for number in range(20)]
    assert sorted(ticks) == list(range(20))


@pytest.mark.parametrize("how", ["by the event", "by an error of the caller", "by a signal to the worker"])
def test_stopped_calls_may_save_before_they_end(calls: ModuleType, tmp_path: Path, how: str) -> None:
    stop = threading.Event()

    def on_tick(word: str) -> None:
        if how == "by an error of the caller":
            raise ArithmeticError(word)
        if how == "by the event":
            stop.set()
        else:
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid or 0, signal.SIGTERM)

    results = in_processes(
        [functools.partial(calls.until_stopped, tmp_path)], workers=1, on_tick=on_tick, stop=stop, grace=30
    )
    with pytest.raises((Interrupted, ArithmeticError), match="at work|asked to stop"):
        list(results)
    assert list(tmp_path.glob("*.saved"))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_caller_goes_so_do_the_workers(tmp_path: Path, number: signal.Signals) -> None:
    """One worker looks at its tick and saves at once, the other is ended after the time of grace.

    SIGKILL hits the caller alone; SIGTERM all three, as batch systems send it.
    """
    environment = os.environ | {"PYTHONPATH": str(Path(workers.__file__).parents[1])}
    command = [sys.executable, str(HERE / "worker_calls.py"), str(tmp_path), "2"]
    caller = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: list(tmp_path.glob("*.at-work")) and list(tmp_path.glob("*.deaf")))
    (polite,), (deaf,) = ([int(path.stem) for path in tmp_path.glob(f"*.{kind}")] for kind in ("at-work", "deaf"))
    start = time.monotonic()
    (os.killpg if number == signal.SIGTERM else os.kill)(caller.pid, number)
    wait_for(lambda: not _is_running(polite))
    assert list(tmp_path.glob("*.saved"))
    assert time.monotonic() - start < 2 or not _is_running(deaf)
    wait_for(lambda: not _is_running(deaf))
    assert time.monotonic() - start < 20
    assert caller.wait(timeout=60) == (-number if number == signal.SIGKILL else EXIT_INTERRUPTED)


def test_a_tick_without_news_sends_nothing() -> None:
    """It is called at every training step, of about a millisecond."""
    sent: list[tuple] = []
    stop = threading.Event()
    tick = stoppable(lambda *progress: sent.append(progress), stop)
    for _ in range(100):
        tick()
    assert not sent
    tick("task", 0.5)
    stop.set()
    with pytest.raises(Interrupted):
        tick("task", 0.6)
    assert sent == [("task", 0.5)]
