"""Calibration: what it measures, how it chooses, and that a cut loses nobody."""

from __future__ import annotations

import pytest
import torch

from collect import calibration
from collect.calibration import Calibration, calibrate, cut, divide, unit
from collect.forms import Loop, choose, template
from collect.grouped import Grouped
from collect.recipe import Recipe

SHAPE = (1, 8, 8)
RECIPE = Recipe(architecture="cnn-3-w8", batch_size=32)
CPU = torch.device("cpu")


@pytest.fixture
def form() -> Grouped:
    return Grouped(template(RECIPE.architecture, shape=SHAPE, classes=10))


def test_every_size_is_timed_until_one_is_slow(form: Grouped, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock of our own: 16 members are the fastest, 64 are too slow to go on."""
    times = {2: 3.0, 4: 2.0, 8: 1.5, 16: 1.0, 32: 1.05, 64: 1.2, 128: 0.1}
    monkeypatch.setattr(calibration, "_seconds", lambda trial, _: times[len(trial.images)] * len(trial.images))
    monkeypatch.setattr(calibration, "STEPS", 1)
    monkeypatch.setattr(calibration, "unit", lambda module: 2)
    found = calibrate(form, RECIPE, shape=SHAPE, most=1024)
    assert found.seconds == {members: times[members] for members in (2, 4, 8, 16, 32, 64)}
    assert found.stack == 16
    assert list(calibrate(form, RECIPE, shape=SHAPE, most=8).seconds) == [2, 4, 8]
    assert list(calibrate(form, RECIPE, shape=SHAPE, memory=5 * found.member_bytes).seconds) == [2, 4]
    assert list(calibrate(form, RECIPE, shape=SHAPE, memory=0).seconds) == [2]


def test_real_times_and_the_bytes_that_a_member_keeps(form: Grouped) -> None:
    """Kept are at least the inputs of the three convolutions, in float32."""
    found = calibrate(form, RECIPE, shape=SHAPE, most=8)
    assert list(found.seconds) == [4, 8] and all(seconds > 0 for seconds in found.seconds.values())
    inputs = 32 * (8 * 8 + 8 * 8 * 8 + 8 * 4 * 4) * 4
    assert inputs < found.member_bytes < 10 * inputs


def test_a_loop_is_timed_with_one_member(form: Grouped) -> None:
    assert list(calibrate(Loop(form.module), RECIPE, shape=SHAPE).seconds) == [1]


@pytest.mark.parametrize(
    ("name", "expected"), [("resnet-8-w32", 2), ("resnet-8-w4", 8), ("cnn-3-w6", 16), ("cnn-3-w5", 32), ("mlp-2-w3", 2)]
)
def test_unit_fills_vectors(name: str, expected: int) -> None:
    assert unit(template(name, shape=SHAPE, classes=10)) == expected


@pytest.mark.parametrize(
    ("members", "stack", "unit", "expected"),
    [
        (24, 8, 4, (8, 8, 8)),
        (31, 8, 4, (8, 8, 8, 4, 3)),  # the rest is the same, whatever the stack
        (31, 16, 4, (16, 12, 3)),
        (5, 2, 1, (2, 2, 1)),
        (5, 9, 1, (5,)),
        (3, 8, 4, (3,)),
        (1, 8, 4, (1,)),
    ],
)
def test_divide(members: int, stack: int, unit: int, expected: tuple[int, ...]) -> None:
    assert divide(members, stack, unit=unit) == expected


def test_cut_measures_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Recipe] = []

    def measured(form: object, recipe: Recipe, **options: object) -> Calibration:
        asked.append(recipe)
        return Calibration({2: 1.0, 4: 0.5, 8: 0.7}, 1)

    monkeypatch.setattr(calibration, "calibrate", measured)
    calibration._once.cache_clear()
    small = choose("mlp-1-w4", shape=SHAPE, classes=10)
    recipe = Recipe(architecture="mlp-1-w4", lr=0.2)
    options = dict(shape=SHAPE, device=CPU)
    assert cut(small, recipe, 8, stack=None, **options) == calibration.Cut((8,))
    assert cut(small, recipe, 20, stack=5, **options) == calibration.Cut((5, 5, 5, 5))
    assert cut(Loop(small.module), recipe, 9, stack=5, **options) == calibration.Cut((1,) * 9)
    assert not asked
    for lr in (0.1, 0.2):  # the same steps: measured once
        found = cut(small, Recipe(architecture="mlp-1-w4", lr=lr), 9, stack=None, **options)
        assert found == calibration.Cut((4, 4, 1), {2: 1.0, 4: 0.5, 8: 0.7})
    assert [recipe.architecture for recipe in asked] == ["mlp-1-w4"]
    calibration._once.cache_clear()
