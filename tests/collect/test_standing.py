"""What is said about a plan against a folder of which everything is known."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from collect import durable, perform, runner, zoo_file
from collect.durable import Progress, claim, claimed, progress
from collect.executors import attempt
from collect.index import open_index
from collect.plan import plan, save, saved_plans, sweep
from collect.recipe import Recipe
from collect.runner import collect
from collect.standing import standings
from collect.zoo import scan

TINY = Recipe(architecture="mlp-1-w4", epochs=1, batch_size=256)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited too long")


def test_done_running_failed_and_open(tmp_path: Path) -> None:
    """Ten networks in five populations: two populations done, one damaged, one claimed, one untouched."""
    tasks = plan([TINY], runs=10, together=2)
    collect(tasks[:3], tmp_path, workers=0)
    save(tasks, tmp_path)
    plans, _ = saved_plans(tmp_path)
    (small,) = (each for each in standings(tmp_path, plans, open_index(tmp_path)[0], ()) if each.networks == 6)
    assert (small.done, small.minutes_left) == (6, 0)
    broken = zoo_file.path_of(tmp_path, tasks[2].id)
    broken.write_bytes(broken.read_bytes()[:-1])
    with claim(zoo_file.path_of(tmp_path, tasks[3].id)):
        index, bad = open_index(tmp_path)
        broken = {path.stem for path in bad}
        (found,) = (each for each in standings(tmp_path, plans, index, broken) if each.networks == 10)
    assert (found.done, found.running, found.failed, found.open, found.processes) == (4, 2, 2, 2, 1)
    minutes = sum(header.attributes["seconds"] for header in scan(tmp_path)[0]) / 60
    assert found.per_minute == pytest.approx(4 / minutes)
    assert found.minutes_left == pytest.approx(minutes * 3 / 2)  # three populations are missing, two took the minutes
    assert claimed(tmp_path) == {}


def test_time_left_follows_the_cost_of_each_architecture(tmp_path: Path) -> None:
    tasks = plan(sweep(TINY, architecture=["mlp-1-w4", "mlp-1-w16"]), runs=4, together=2)
    save(tasks, tmp_path)
    (nothing,) = standings(tmp_path, saved_plans(tmp_path)[0], None, ())
    assert (nothing.open, nothing.per_minute, nothing.minutes_left) == (8, None, None)
    collect(tasks[:1], tmp_path, workers=0)
    index, _ = open_index(tmp_path)
    found = max(standings(tmp_path, saved_plans(tmp_path)[0], index, ()), key=lambda each: each.networks)
    seconds = scan(tmp_path)[0][0].attributes["seconds"]
    expected = seconds * sum(task.cost for task in tasks[1:]) / tasks[0].cost
    assert found.minutes_left == pytest.approx(expected / 60)


def test_claims_of_the_dead_do_not_count(tmp_path: Path) -> None:
    host = socket.gethostname()
    for name in (f".gone.h5@{host}@4194999.tmp", f".here.h5@{host}@{os.getpid()}.tmp", ".far.h5@elsewhere@1.tmp"):
        (tmp_path / name).touch()
    assert claimed(tmp_path).keys() == {"here.h5", "far.h5"}


def test_a_collector_shows_what_it_trains_and_leaves_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the training fails."""
    seen: list[set[str]] = []

    def look(*_: object, **__: object) -> None:
        seen.append(set(claimed(tmp_path)))
        raise ArithmeticError("no")

    monkeypatch.setattr(perform, "train", look)
    (task,) = plan([TINY], runs=1)
    with pytest.raises(runner.CollectError, match="ArithmeticError"):
        collect([task], tmp_path, workers=0)
    assert seen == [{f"{task.id}.h5"}] and not claimed(tmp_path) and not list(tmp_path.glob(".*"))


def test_time_left_is_known_before_the_first_population_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four populations at work: one taken up at 0.2 and now at 0.6, one that has told nothing yet."""
    monkeypatch.setattr(durable, "BEAT_SECONDS", 0.02)
    clock = [100.0]
    tasks = plan([TINY], runs=8, together=2)
    save(tasks, tmp_path)
    first, second = (zoo_file.path_of(tmp_path, task.id) for task in tasks[:2])
    with claim(first) as mine, claim(second):
        with monkeypatch.context() as patch:
            patch.setattr(durable.time, "monotonic", lambda: clock[0])
            mine.tell(0.2)
            clock[0] += 30
            mine.tell(0.6)
            wait_for(lambda: progress(claimed(tmp_path)[first.name]).fraction == 0.6)
        told = progress(claimed(tmp_path)[first.name])
        assert (told.gained, told.seconds) == (pytest.approx(0.4), 30)
        assert progress(claimed(tmp_path)[second.name]) == Progress()
        (found,) = standings(tmp_path, saved_plans(tmp_path)[0], None, ())
    assert (found.running, found.open, found.processes, found.per_minute) == (4, 4, 2, None)
    whole = 30 / 0.4  # seconds of one population
    assert found.minutes_left == pytest.approx((0.4 + 3) * whole / 60 / 2)


def test_a_training_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, looked at by its own tick; what it writes at last is the population, whole, and no claim."""
    monkeypatch.setattr(durable, "BEAT_SECONDS", 0.001)
    (task,) = plan([replace(TINY, epochs=30)], runs=2)
    seen: list[float] = []

    def look(amount: float) -> None:
        seen.extend(progress(path).fraction for path in claimed(tmp_path).values())

    monkeypatch.setattr(attempt, "TICK_SECONDS", 0.0)
    collect([task], tmp_path, workers=0, on_progress=look)
    told = list(filter(None, seen))  # 0: it had told nothing yet, or was writing just then
    assert len(set(told)) > 5 and told == sorted(told) and max(told) < 1
    assert zoo_file.verify(zoo_file.path_of(tmp_path, task.id)) and not list(tmp_path.glob(".*"))
