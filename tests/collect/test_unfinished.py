"""A training that is put down and taken up again ends with the same bits; a state that cannot be used does no harm."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from collect import unfinished
from collect.data import ImageSet, load
from collect.population import Population, train
from collect.recipe import Recipe
from generators.commandline import Interrupted

BASE = Recipe(architecture="mlp-2-w8", epochs=3, batch_size=256, lr=0.05, saved="all")
SEEDS = (3, 4, 5, 6)
STEPS = 15  # of one stack


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return load("digits")


def stopping_at(*calls: int) -> Callable[[float], None]:
    """A tick that raises `Interrupted` at its calls with these numbers, from 0 on."""
    count = -1

    def tick(share: float) -> None:
        nonlocal count
        count += 1
        if count in calls:
            raise Interrupted("asked to stop")

    return tick


def assert_same(found: Population, expected: Population) -> None:
    assert found.status == expected.status
    for name in ("weights", "buffers", "metrics"):
        assert np.array_equal(getattr(found, name), getattr(expected, name), equal_nan=True), name


def stopped(recipe: Recipe, images: ImageSet, path: Path, *calls: int, **options: int) -> None:
    with pytest.raises(Interrupted):
        train(recipe, SEEDS, images, tick=stopping_at(*calls), unfinished_path=path, **options)


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({}, (0, STEPS - 1, STEPS, STEPS + 7)),  # first and last step of the first stack, in the second
        ({"architecture": "resnet-8-w2", "augmentation": "flip-crop", "nesterov": True}, (7,)),  # in an epoch
        ({"architecture": "vit-1-w16", "optimiser": "adamw", "lr": 3e-3, "clip_norm": 0.5}, (4, 5, 6)),  # around one
        ({"lr": 1e4, "evaluations_per_epoch": 2, "saved": (1, 3)}, (2, 6)),  # all diverge
        ({"architecture": "vgg-3-w4", "saved": "last", "statistics": "running"}, (14,)),
    ],
)
def test_stopped_at_any_step_and_taken_up_again_is_the_same_as_never_stopped(
    images: ImageSet, tmp_path: Path, changes: dict, calls: tuple[int, ...]
) -> None:
    recipe, path = dataclasses.replace(BASE, **changes), tmp_path / "state"
    undisturbed = train(recipe, SEEDS, images, stack=2)
    for call in calls:
        stopped(recipe, images, path, call, stack=2)
        assert_same(train(recipe, SEEDS, images, stack=2, unfinished_path=path), undisturbed)
        path.unlink()


def test_stopped_again_and_again_with_a_member_that_diverges_on_the_way(
    images: ImageSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At this learning rate some of the members diverge, at different steps."""
    caplog.set_level("INFO")
    recipe, path = dataclasses.replace(BASE, lr=1024.0), tmp_path / "state"
    undisturbed = train(recipe, SEEDS, images)
    assert set(undisturbed.status) == {"ok", "diverged"}
    for steps in (3, 3, 3, 4):
        stopped(recipe, images, path, steps)
    assert_same(train(recipe, SEEDS, images, unfinished_path=path), undisturbed)
    assert caplog.text.count("going on from") == 4


def test_saved_as_often_as_asked_and_not_without_a_path(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = []
    real = unfinished.Keeper.save

    def save(self: unfinished.Keeper, state: dict) -> None:
        saves.append(state)
        real(self, state)

    monkeypatch.setattr(unfinished.Keeper, "save", save)
    train(BASE, SEEDS, images, unfinished_path=tmp_path / "state")
    assert not saves and not list(tmp_path.iterdir())
    whole = train(BASE, SEEDS, images, unfinished_path=tmp_path / "state", save_every=0)
    assert len(saves) == STEPS
    assert_same(train(BASE, SEEDS, images, unfinished_path=tmp_path / "state"), whole)  # from the last of them
    train(BASE, SEEDS, images, save_every=0)
    assert len(saves) == STEPS


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (damage, "does not match its digest"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged or no training state"),
        (lambda path: path.write_bytes(b""), "damaged or no training state"),
        (lambda path: path.write_text("mine"), "damaged or no training state"),
        (lambda path: (path.unlink(), path.mkdir()), "damaged or no training state"),
    ],
)
def test_a_damaged_state_is_passed_over_with_a_warning(
    images: ImageSet, tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], object], reason: str
) -> None:
    path = tmp_path / "state"
    stopped(BASE, images, path, 7)
    spoil(path)
    found = train(BASE, SEEDS, images, unfinished_path=path)
    assert reason in caplog.text and "starts again" in caplog.text
    assert_same(found, train(BASE, SEEDS, images))


def test_the_state_of_another_training_or_version_is_passed_over(
    images: ImageSet, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    stopped(BASE, images, path, 7)
    other = dataclasses.replace(BASE, lr=0.04)
    assert_same(train(other, SEEDS, images, unfinished_path=path), train(other, SEEDS, images))
    assert "its population is" in caplog.text
    assert train(BASE, SEEDS, images, unfinished_path=path, stack=2).stack == 2
    assert "its stack is 'fastest' and not '2'" in caplog.text
    monkeypatch.setattr(unfinished, "FORMAT", "of the future")
    assert_same(train(BASE, SEEDS, images, unfinished_path=path), train(BASE, SEEDS, images))
    assert "and not 'of the future'" in caplog.text


def test_a_state_that_cannot_be_written_does_not_end_the_training(
    images: ImageSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "state"
    found = train(BASE, SEEDS, images, unfinished_path=path, save_every=0)
    assert "the training state is not saved" in caplog.text
    assert_same(found, train(BASE, SEEDS, images))
    stopped(BASE, images, path, 3)  # as asked, with a warning and no other error


def test_a_state_is_the_same_nest_again(tmp_path: Path) -> None:
    keeper = unfinished.Keeper(tmp_path / "state", {"population": "a"})
    state = {"a": {"b.c": torch.arange(3), "d": {"0": torch.tensor(True)}}, "e": torch.zeros(2, 0), "none": {}}
    keeper.save(state)
    found = keeper.load()
    assert found.keys() == {"a", "e"} and found["a"]["d"].keys() == {"0"}
    assert torch.equal(found["a"]["b.c"], torch.arange(3)) and found["e"].shape == (2, 0) and found["a"]["d"]["0"]
