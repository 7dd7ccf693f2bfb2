"""A plan follows from spec and root seed alone; every wrong word in a spec is named."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from collect.plan import plan, read, write
from collect.recipe import Recipe
from collect.spec import FIELDS, Spec, from_json, tasks_of
from generators.errors import ConfigError, DataError, PowerhouseError, UnknownNameError

TINY = {"architecture": "mlp-1-w4", "epochs": 1}
DRAWS = {"count": 5, "lr": {"log_uniform": [0.01, 0.3]}, "width": {"integer": [4, 32]}}
DRAWN = [0.0308694, 0.0999839, 0.292473, 0.164894, 0.180434]


def test_a_grid_is_the_product_in_the_order_written() -> None:
    grid = {"depth": [8, 14], "init": ["he", "xavier"], "family": ["resnet"], "width": [4]}
    found = from_json({"recipe": {"epochs": 3, "weight_decay": 0}, "grid": grid}).recipes()
    base = Recipe(epochs=3, weight_decay=0.0)
    pairs = itertools.product((8, 14), ("he", "xavier"))
    assert found == [replace(base, architecture=f"resnet-{depth}-w4", init=init) for depth, init in pairs]
    assert type(found[0].weight_decay) is float


def test_every_combination_of_the_grid_is_under_every_draw() -> None:
    spec = from_json({"recipe": {"family": "mlp", "depth": 1}, "grid": {"init": ["he", "xavier"]}, "random": DRAWS})
    found = spec.recipes()
    assert len(found) == 10 and len({recipe.lr for recipe in found}) == 5
    assert [replace(recipe, init="xavier") for recipe in found[::2]] == found[1::2]
    assert all(0.01 <= recipe.lr <= 0.3 for recipe in found)


def test_draws_depend_on_root_seed_number_and_name_only() -> None:
    base: dict[str, Any] = {"recipe": {"family": "mlp", "depth": 1}, "random": DRAWS}
    five = from_json(base).recipes()
    assert from_json(json.loads(json.dumps(base))).recipes() == five
    assert from_json(base | {"random": DRAWS | {"count": 9}}).recipes()[:5] == five
    with_momentum = from_json(base | {"random": {"momentum": {"uniform": [0.8, 0.9]}} | DRAWS}).recipes()
    assert [(each.lr, each.architecture) for each in with_momentum] == [(each.lr, each.architecture) for each in five]
    other = from_json(base | {"seed": 1}).recipes()
    assert not {recipe.lr for recipe in other} & {recipe.lr for recipe in five}
    # These must never change: plans are made again from their specs.
    assert [recipe.lr for recipe in five] == DRAWN


def test_the_plan_of_a_spec_against_the_plan_of_its_recipes() -> None:
    spec = Spec(recipe=TINY, grid={"lr": [0.1, 0.2]}, runs=3, first_seed=2, together=2, seed=7)
    recipes = [Recipe(**TINY, lr=lr) for lr in (0.1, 0.2)]
    assert spec.plan() == plan(recipes, runs=3, first_seed=2, together=2)
    apart = replace(spec, seeds="independent")
    assert apart.plan() == plan(recipes, runs=3, first_seed=2, together=2, root_seed=7)
    assert from_json(json.loads(json.dumps(apart.to_json()))) == apart


def test_tasks_of_a_spec_file_and_of_the_plan_made_from_it(tmp_path: Path) -> None:
    value = {"recipe": TINY | {"saved": [0, 1]}, "runs": 2, "random": {"count": 3, "lr": {"uniform": [0.1, 1]}}}
    (tmp_path / "spec.json").write_text(json.dumps(value))
    tasks, spec = tasks_of(tmp_path / "spec.json")
    assert len(tasks) == 3 and spec is not None and spec["random"] == {"count": 3, "lr": {"uniform": [0.1, 1.0]}}
    path = write(tasks, tmp_path / "plan.json", spec=spec)
    assert tasks_of(path) == read(path) == (tasks, spec)
    content = path.read_bytes()
    write(tasks_of(tmp_path / "spec.json")[0], path, spec=spec)
    assert path.read_bytes() == content  # nothing in it comes from the time or the machine


def test_a_plan_whose_data_or_checkpoint_changed_is_refused(tmp_path: Path) -> None:
    (task,) = Spec(recipe=TINY, runs=1).plan()
    path = write([replace(task, data_digest="0" * 32)], tmp_path / "plan.json")
    with pytest.raises(DataError, match="'digits' has the digest 037a.*plan again"):
        tasks_of(path)
    write([replace(task, recipe=replace(task.recipe, init_digest="0" * 32))], path)
    with pytest.raises(ConfigError, match="checkpoint in 'he' has changed"):
        tasks_of(path)


def test_every_field_of_a_recipe_can_be_swept() -> None:
    assert set(FIELDS) == set(Recipe.__dataclass_fields__) - {"init_digest"} | {"family", "depth", "width"}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"recipes": {}}, UnknownNameError, "unknown key 'recipes': did you mean 'recipe'"),
        ({"recipe": TINY | {"epoch": 3}}, UnknownNameError, "recipe field 'epoch': did you mean 'epochs'.*in recipe"),
        ({"recipe": TINY | {"init_digest": "0"}}, UnknownNameError, "'init_digest'"),
        ({"grid": {"intit": ["he"]}}, UnknownNameError, "'intit': did you mean 'init'.*in grid"),
        ({"random": DRAWS | {"momentun": {}}}, UnknownNameError, "'momentun': did you mean 'momentum'.*in random"),
        ({"random": {"count": 2, "lr": {"loguniform": [1, 2]}}}, UnknownNameError, "'log_uniform'.*in random.lr"),
        ({"seeds": "pared"}, UnknownNameError, "'paired'"),
        ({"runs": "8"}, ConfigError, 'runs must be a whole number, got "8"'),
        ({"runs": True}, ConfigError, "runs must be a whole number, got true"),
        ({"runs": 0}, ConfigError, "runs must be at least 1"),
        ({"runs": 10**8}, ConfigError, "the most in one plan"),
        ({"first_seed": -1}, ConfigError, "first_seed must be at least 0"),
        ({"together": 0}, ConfigError, "together must be at least 1"),
        ({"together": "auto"}, ConfigError, "together must be a whole number or null"),
        ({"recipe": []}, ConfigError, "recipe must be an object"),
        ({"recipe": TINY | {"lr": "0.1"}}, ConfigError, "recipe.lr must be a number"),
        ({"recipe": TINY | {"lr": math.nan}}, ConfigError, "recipe.lr must be a number, got NaN"),
        ({"recipe": TINY | {"epochs": 2.5}}, ConfigError, "recipe.epochs must be a whole number"),
        ({"recipe": TINY | {"epochs": 10**400}}, ConfigError, "recipe.epochs must be a whole number"),
        ({"recipe": TINY | {"nesterov": 1}}, ConfigError, "recipe.nesterov must be true or false"),
        ({"recipe": TINY | {"saved": [0.5]}}, ConfigError, "recipe.saved must be text or a list"),
        ({"recipe": TINY | {"lr": -1}}, ConfigError, "lr must be above 0"),
        ({"recipe": TINY | {"schedule": "cosin"}}, ConfigError, "did you mean 'cosine'"),
        ({"grid": {}}, ConfigError, "grid is empty"),
        ({"random": {}}, ConfigError, "random is empty"),
        ({"grid": {"lr": []}}, ConfigError, "grid.lr needs at least one value"),
        ({"grid": {"lr": 0.1}}, ConfigError, "grid.lr must be a list"),
        ({"grid": {"init": "he"}}, ConfigError, 'grid.init must be a list, got "he"'),
        ({"grid": {"lr": [0.1, "0.2"]}}, ConfigError, r"grid.lr\[1\] must be a number"),
        ({"grid": {"lr": [0.1, 0]}}, ConfigError, r"lr must be above 0, got 0.0 \(the combination: lr 0.0\)"),
        ({"grid": {"epochs": [1, 2]}}, ConfigError, "epochs stands in recipe and in grid"),
        ({"grid": {name: [1] * 900 for name in ("batch_size", "clip_norm", "lr")}}, ConfigError, "729,000,000 recipes"),
        ({"random": {"lr": {"choice": [1]}}}, ConfigError, r"random.count is missing.* lr shall be .*\"count\": 100"),
        ({"random": {"count": 0, "lr": {"choice": [1]}}}, ConfigError, "count of at least 1"),
        ({"random": {"count": 3}}, ConfigError, "at least one field"),
        ({"recipe": {"epochs": 1}}, ConfigError, "no architecture.*family, depth, width missing"),
        ({"recipe": {"family": "mlp", "depth": 1}}, ConfigError, "width missing"),
        ({"recipe": TINY | {"width": 3}}, ConfigError, "architecture says width too"),
        ({"format": 2}, ConfigError, "newer version.*upgrade"),
        ({"format": 2, "anything": 1}, ConfigError, "newer version.*upgrade"),
        ({"format": 0}, ConfigError, "format must be 1"),
    ],
)
def test_what_is_wrong_with_a_spec(change: dict, error: type[PowerhouseError], words: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"recipe": TINY} | change))
    with pytest.raises(error, match=words) as caught:
        tasks_of(path)
    assert caught.match("spec.json")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"runs": 3, "runs": 4}', "a key is there twice"),
        ('{"runs": 3', "cannot be read as JSON"),
        ("[1]", r"the spec must be an object, got \[1\]"),
        ("\x00\xff", "cannot be read as JSON"),
        (None, "No such file"),
    ],
)
def test_what_is_no_spec(text: str | None, words: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "spec.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=words) as caught:
        tasks_of(tmp_path / "spec.json")
    assert str(caught.value).count("spec.json") == 1
