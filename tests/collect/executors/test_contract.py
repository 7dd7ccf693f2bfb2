"""What every executor promises, against the one that works in this process."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from collect import executors, unfinished
from collect.executors import EXECUTORS, Executor, make
from collect.plan import Task, plan, sweep
from collect.recipe import Recipe
from collect.runner import CollectError, collect
from collect.zoo_file import verify
from generators.commandline import Interrupted
from generators.errors import ConfigError, UnknownNameError

TINY = Recipe(architecture="mlp-1-w4", epochs=1, batch_size=256)
Maker = Callable[[], Executor]


def digests(folder: Path) -> dict[str, str]:
    return {path.stem: verify(path).digest for path in folder.glob("*.h5")}


@pytest.fixture(params=list(EXECUTORS))
def executor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Executor:
    """Two tasks at once, where progress comes with whole populations only."""
    settings: dict[str, Any] = {
        "here": {},
        "processes": {"workers": 1},
        "ray": {"workers": 2},
        "submitit": {"workers": 2, "cluster": "local", "poll": 0.2},
    }[request.param]
    if request.param == "ray":
        settings["address"] = request.getfixturevalue("cluster").address
    if request.param == "submitit":
        pytest.importorskip("submitit", reason="submitit is not installed: pip install 'powerhouse-init[slurm]'")
        monkeypatch.setattr(executors.submitit, "SLICES", 1)  # two jobs: a job on a single core has one worker
    return make(request.param, **settings)


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    """Four populations of two networks each."""
    return plan(sweep(TINY, lr=[0.1, 0.05]), runs=4, together=2)


@pytest.fixture(scope="module")
def reference(tasks: list[Task], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reference")
    collect(tasks, folder, workers=0)
    return digests(folder)


def test_the_same_zoo_but_for_the_task_that_fails(
    executor: Executor, tasks: list[Task], reference: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = replace(tasks[0], data_digest="0" * 32)
    steps: list[float] = []
    on_terminate = signal.getsignal(signal.SIGTERM)
    with pytest.raises(CollectError, match=r"1 of 5 .* has changed since the plan was made"):
        collect([bad, *tasks], tmp_path, executor=executor, on_progress=steps.append)
    assert digests(tmp_path) == reference
    assert {verify(path).attributes["threads"] for path in tmp_path.glob("*.h5")} == {1}
    assert sum(steps) == pytest.approx(sum(len(task.seeds) for task in tasks))
    errors = [record.message for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1 and bad.id in errors[0]  # once: it was not tried again
    assert not list(tmp_path.glob(".*"))
    assert signal.getsignal(signal.SIGTERM) is on_terminate


def test_cancelled_work_is_saved_and_nothing_is_left_behind(executor: Executor, tmp_path: Path) -> None:
    """One of the two would take an hour; it is stopped in the middle, and its state is in the zoo."""
    short, long = plan([TINY, replace(TINY, epochs=100_000)], runs=1)
    cancelled: list[float] = []

    def on_progress(amount: float) -> None:
        cancelled.append(time.monotonic())
        executor.cancel()

    with pytest.raises(Interrupted, match="populations are stored"):
        collect([short, long], tmp_path, executor=executor, on_progress=on_progress)
    assert time.monotonic() - cancelled[0] < 60
    assert unfinished.path_of(tmp_path, long.id).exists()
    assert not multiprocessing.active_children()
    assert not list(tmp_path.glob("**/.*"))
    assert digests(tmp_path).keys() <= {short.id}
    with pytest.raises(Interrupted):  # for good
        collect([short, long], tmp_path, executor=executor)


def test_unknown_executors_and_settings() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'processes'"):
        make("proceses")
    with pytest.raises(ConfigError, match="executor 'here' has no setting 'address'; it has: none"):
        make("here", address="auto", workers=None)
    with pytest.raises(ConfigError, match="at least 1"):
        make("processes", workers=0)
    with pytest.raises(ConfigError, match="a setting of the executor"):
        collect([], Path("nowhere"), executor=make("here"), workers=1)
    assert not Path("nowhere").exists()
