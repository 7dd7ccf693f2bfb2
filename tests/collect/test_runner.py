"""Collecting: what is trained, found, told and refused, however the work is done."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import pytest
import torch

from collect import perform, zoo_file
from collect.executors import attempt
from collect.plan import plan, saved_plans, sweep
from collect.recipe import Recipe
from collect.runner import CollectError, check, collect
from collect.zoo_file import path_of, verify
from generators.commandline import Interrupted
from generators.errors import ConfigError, ZooError

TINY = Recipe(architecture="mlp-1-w4", epochs=1, batch_size=256)


def digests(folder: Path) -> dict[str, str]:
    """Population id -> digest of its weights, buffers, metrics and tables, for every file; every file is whole."""
    return {path.stem: verify(path).digest for path in folder.glob("*.h5")}


def temporaries(folder: Path) -> list[Path]:
    return list(folder.glob(".*"))


def test_a_second_call_trains_what_is_missing_or_damaged_and_only_that(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = plan([TINY], runs=6, together=2)
    first = collect(tasks, tmp_path, workers=0)
    assert first.trained == tuple(task.id for task in tasks) and not first.found
    expected = digests(tmp_path)
    whole, missing, damaged = (path_of(tmp_path, task.id) for task in tasks)
    kept = whole.stat().st_mtime_ns
    missing.unlink()
    content = bytearray(damaged.read_bytes())
    content[verify(damaged).weights.offset + 5] ^= 1
    damaged.write_bytes(content)
    second = collect(tasks, tmp_path, workers=0, verify=True)
    assert second.found == (tasks[0].id,) and set(second.trained) == {tasks[1].id, tasks[2].id}
    (aside,) = second.moved_aside
    assert aside.read_bytes() == content and aside.name == f"{damaged.name}.bad"
    assert "does not match its digest" in caplog.text and aside.name in caplog.text
    assert whole.stat().st_mtime_ns == kept and digests(tmp_path) == expected
    damaged.write_bytes(b"")  # damaged again: the first one aside is not overwritten
    assert collect(tasks, tmp_path, workers=0).moved_aside[0].name == f"{damaged.name}.bad1"
    assert aside.read_bytes() == content
    assert collect(tasks, tmp_path, workers=0).trained == ()


def test_a_foreign_file_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "notes.h5"
    foreign.write_text("mine")
    collect(plan([TINY], runs=1), tmp_path, workers=0)
    assert foreign.read_text() == "mine"


def test_a_file_of_a_newer_version_is_not_moved_nor_trained_again(tmp_path: Path) -> None:
    (task,) = plan([TINY], runs=1)
    collect([task], tmp_path, workers=0)
    path = path_of(tmp_path, task.id)
    with h5py.File(path, "a") as file:
        file.attrs["schema"] = zoo_file.SCHEMA + 1
    content = path.read_bytes()
    with pytest.raises(ZooError, match="upgrade"):
        collect([task], tmp_path, workers=0)
    assert path.read_bytes() == content and len(list(tmp_path.glob("*.h5*"))) == 1


def test_many_recipes_in_one_call_the_longest_first(tmp_path: Path) -> None:
    recipes = sweep(TINY, architecture=["mlp-1-w4", "mlp-1-w32"], init=["he", "xavier"], lr=[0.01, 0.1])
    tasks = plan([*recipes, replace(TINY, epochs=9)], runs=2)
    result = collect(tasks, tmp_path, workers=0)
    costs = {task.id: task.cost for task in tasks}
    assert [costs[name] for name in result.trained] == sorted(costs.values(), reverse=True)
    assert set(digests(tmp_path)) == set(costs)
    (saved,) = saved_plans(tmp_path)[0].values()
    assert {task.id for task in saved} == set(costs)


def test_progress_adds_up_to_the_number_of_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "TICK_SECONDS", 0.0)
    tasks = plan(sweep(TINY, epochs=[1, 3]), runs=5, together=3)
    counts = []
    for part in (tasks[2:], tasks):  # the second call finds half of its populations
        steps: list[float] = []
        collect(part, tmp_path, workers=0, on_progress=steps.append)
        assert sum(steps) == pytest.approx(sum(len(task.seeds) for task in part))
        assert min(steps) > 0
        counts.append(len(steps))
    # At least one for every epoch; one for every population that was there.
    assert counts[0] >= 2 * 3 and counts[1] >= 2 * 1 + 2


def test_one_failure_is_reported_and_the_rest_is_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = plan([TINY], runs=2, together=1)
    bad = replace(good[0], data_digest="0" * 32)
    with pytest.raises(CollectError, match=r"1 of 3 .* has changed since the plan was made"):
        collect([bad, *good], tmp_path, workers=0)
    assert set(digests(tmp_path)) == {task.id for task in good}
    assert bad.id in caplog.text


def test_a_folder_that_cannot_be_written_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(population: object, folder: Path) -> Path:
        calls.append(folder)
        raise ZooError("no room")

    monkeypatch.setattr(zoo_file, "write", full)
    with pytest.raises(ZooError, match="no room"):
        collect(plan([TINY], runs=3, together=1), tmp_path, workers=0)
    assert len(calls) == 1
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match="cannot write"):
        collect(plan([TINY], runs=1), tmp_path / "file", workers=0)


def test_ctrl_c_says_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, real = plan([TINY], runs=3, together=1), zoo_file.write

    def write(population: object, folder: Path) -> Path:
        if list(folder.glob("*.h5")):
            raise KeyboardInterrupt
        return real(population, folder)

    monkeypatch.setattr(zoo_file, "write", write)
    with pytest.raises(Interrupted, match="1 of 3 populations are stored"):
        collect(tasks, tmp_path, workers=0)
    assert not temporaries(tmp_path)


def test_being_asked_to_stop_while_training_here_is_no_failure(tmp_path: Path) -> None:
    """SIGTERM raises `Interrupted` wherever the main thread is: here, in the middle of a population."""

    def stop(amount: float) -> None:
        raise Interrupted("asked to terminate")

    with pytest.raises(Interrupted, match="asked to terminate: 0 of 1 populations are stored"):
        collect(plan([replace(TINY, epochs=1000)], runs=2), tmp_path, workers=0, on_progress=stop)
    assert not list(tmp_path.glob("*.h5")) and not temporaries(tmp_path)


def test_faults_of_the_engine_keep_their_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object, **more: object) -> None:
        raise ZeroDivisionError("in the engine")

    monkeypatch.setattr(perform, "train", broken)
    with pytest.raises(CollectError, match="ZeroDivisionError: in the engine"):
        collect(plan([TINY], runs=2), tmp_path, workers=0)
    assert "in broken" in caplog.text


def test_diverged_networks_are_stored_and_counted(tmp_path: Path) -> None:
    result = collect(plan([replace(TINY, lr=1e30)], runs=2), tmp_path, workers=0)
    assert result.diverged == 2 and len(digests(tmp_path)) == 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_told_before_anything_is_written(
    tmp_path: Path, device: str, workers: int
) -> None:
    with pytest.raises(ConfigError, match=f"cannot train on device '{device}'"):
        collect(plan([TINY], runs=2, together=1), tmp_path / "zoo", workers=workers, device=device)
    assert not (tmp_path / "zoo").exists()


def test_a_device_that_fails_is_told_once(tmp_path: Path) -> None:
    """By the first process that tries: what it cannot do, no other task could."""
    with pytest.raises(ZooError, match="cannot train on device 'mtia'"):
        collect(plan([TINY], runs=2, together=1), tmp_path / "zoo", workers=0, device="mtia")
    assert not list(tmp_path.glob("zoo/*.h5"))


def test_check_and_wrong_workers(tmp_path: Path) -> None:
    (task,) = plan([TINY], runs=1)
    assert check(task, tmp_path) == ""
    path_of(tmp_path, task.id).touch()
    assert "truncated" in str(check(task, tmp_path))
    with pytest.raises(ConfigError, match="at least 0"):
        collect([task], tmp_path, workers=-1)


def test_training_here_leaves_the_callers_threads_and_random_state(tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        collect(plan([TINY], runs=1), tmp_path, workers=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)
    (header,) = (verify(path) for path in tmp_path.glob("*.h5"))
    assert header.attributes["threads"] == 1
