"""The unit of work: what it stores, what it tells, and how it ends when it is stopped or cannot work."""

from dataclasses import replace
from pathlib import Path

import pytest

from collect import failures, unfinished
from collect import perform as module
from collect.data import load
from collect.perform import perform
from collect.plan import Task, plan
from collect.recipe import Recipe
from collect.zoo_file import path_of, verify
from generators.commandline import Interrupted

STEPS = 10  # of one stack
REASON = "has changed since the plan was made; plan again"


@pytest.fixture
def task() -> Task:
    (found,) = plan([Recipe(architecture="mlp-1-w4", epochs=2, batch_size=256, augmentation="shift")], runs=4)
    return replace(found, stack=2)


def test_a_population_is_stored_and_every_step_is_told(task: Task, tmp_path: Path) -> None:
    told: list[tuple] = []
    outcome = perform(task, tmp_path, None, lambda *progress: told.append(progress))
    assert (outcome.task, outcome.error, outcome.diverged) == (task, "", 0) and outcome.seconds > 0
    assert verify(path_of(tmp_path, task.id)).id == task.id
    assert told == [(task.id, step / (2 * STEPS)) for step in range(2 * STEPS)]
    assert [path.suffix for path in tmp_path.iterdir()] == [".h5"]


@pytest.mark.parametrize("stop", [0, 7, STEPS, 2 * STEPS - 1])
def test_stopped_it_leaves_its_state_and_goes_on_from_it(task: Task, tmp_path: Path, stop: int) -> None:
    def tick(population: str, fraction: float) -> None:
        if fraction >= stop / (2 * STEPS):
            raise Interrupted("asked to stop")

    told: list[float] = []
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "zoo"
    perform(task, undisturbed, None, lambda *progress: None)
    with pytest.raises(Interrupted, match="asked to stop"):
        perform(task, folder, None, tick)
    assert [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()] == [
        Path(unfinished.FOLDER) / f"{task.id}{unfinished.SUFFIX}"
    ]
    assert perform(task, folder, None, lambda _, fraction: told.append(fraction)).error == ""
    assert told[0] == stop / (2 * STEPS)
    assert verify(path_of(folder, task.id)).digest == verify(path_of(undisturbed, task.id)).digest
    assert [path.suffix for path in folder.iterdir()] == [".h5"]


@pytest.mark.parametrize("device", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there(task: Task, tmp_path: Path, device: str) -> None:
    outcome = perform(task, tmp_path, None, lambda *progress: None, device=device)
    assert f"cannot train on device '{device}'" in outcome.error and not outcome.detail and outcome.fatal
    assert not list(tmp_path.iterdir())


def test_images_at_hand_are_used(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load("digits")
    monkeypatch.setattr(module, "_images", None)  # it would be a fault to call it
    assert perform(task, tmp_path, None, lambda *progress: None, images=images).error == ""


def test_what_has_changed_since_the_plan_was_made_is_an_outcome_and_a_record_of_it(task: Task, tmp_path: Path) -> None:
    data = replace(task, data_digest="0" * 32)
    checkpoint = replace(task, recipe=replace(task.recipe, init_digest="of another checkpoint"))
    for changed in (data, checkpoint):
        outcome = perform(changed, tmp_path, None, lambda *progress: None)
        assert "has changed since the plan was made; plan again" in outcome.error and not outcome.fatal
    assert {name: each.error for name, each in failures.read(tmp_path).items()} == {
        data.id: f"data set 'digits' {REASON}", checkpoint.id: f"the checkpoint in 'he' {REASON}"
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == [failures.FOLDER]
