"""Curves of a zoo of two populations against the metrics that are stored in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from collect.plan import plan
from collect.recipe import Recipe
from collect.runner import collect
from collect.zoo import Zoo
from scripts import BENCHMARKS, load_script

RECIPE = Recipe(architecture="mlp-1-w16", epochs=2)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five networks of one recipe, in files of three and two, and two of another."""
    folder = tmp_path_factory.mktemp("zoo")
    collect(plan([RECIPE], runs=5, together=3), folder, workers=0)
    collect(plan([replace(RECIPE, lr=1e-4)], runs=2), folder, workers=0)
    return folder


def test_curves_hold_all_networks_of_a_recipe_and_of_no_other(zoo: Path) -> None:
    module = load_script(BENCHMARKS / "curves.py")
    good, bad = module.curves(zoo, [RECIPE, replace(RECIPE, lr=1e-4), replace(RECIPE, lr=0.5)])
    assert (good.lr, bad.lr, good.steps[0]) == (RECIPE.lr, 1e-4, 0) and good.accuracy.shape == (5, len(good.steps))
    ends = sorted(run["test_accuracy"] for run in Zoo(zoo).where(lr=RECIPE.lr).runs)
    assert sorted(good.accuracy[:, -1]) == pytest.approx(ends)
    assert [curve.lr for curve in module.curves(zoo, [RECIPE])] == [RECIPE.lr]


def test_table_figures_and_picture_agree(zoo: Path) -> None:
    module = load_script(BENCHMARKS / "curves.py")
    (found,) = module.curves(zoo, [RECIPE])
    last, ends = found.steps[-1], found.accuracy[:, -1]
    name = f"mlp-1-w16/he/{RECIPE.lr:g}/accuracy_{last}"
    figures = module.figures([found])
    assert figures[name] == pytest.approx(ends.mean()) and figures[f"{name}_std"] == pytest.approx(ends.std(ddof=1))
    assert f"{100 * ends.mean():.1f} ± {100 * ends.std(ddof=1):.1f} |" in module.table([found])
    assert len({line.count("|") for line in module.table([found]).splitlines()}) == 1
    assert module.picture([found]).startswith(b"\x89PNG")
    single = replace(found, accuracy=found.accuracy[:1])
    assert not np.any(single.std)


def test_the_best_rate_is_that_of_validation_images_and_never_one_that_diverged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Over all zoos: 0.1 has 0.2 and 0.4, so 0.3 on average, more than 0.05 with 0.25 and than 0.3, which diverged."""
    module = load_script(BENCHMARKS / "curves.py")

    class Found:
        metric_names = ("test_loss", "validation_accuracy")

        def __init__(self, lr: float, end: float) -> None:
            self.recipe, self.metrics = replace(module.RECIPE, lr=lr), np.full((1, 2, 2), end)

    zoos = {"a": [Found(0.3, np.nan), Found(0.1, 0.2), Found(0.05, 0.25)], "b": [Found(0.3, np.nan), Found(0.1, 0.4)]}
    monkeypatch.setattr(module, "Zoo", lambda folder: type("", (), {"populations": zoos[folder.name]}))
    (chosen,) = module.best_rates([tmp_path / "a", tmp_path / "b"], [module.RECIPE])
    assert chosen.lr == 0.1
    (chosen,) = module.best_rates([tmp_path / "a"], [module.RECIPE])
    assert chosen.lr == 0.05
