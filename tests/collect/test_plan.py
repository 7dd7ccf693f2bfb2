"""The plan is a pure function of what was asked for, and finds every fault before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import generators
from collect.plan import FEWEST, LONGEST, MOST, plan, read, save, saved_plans, sweep
from collect.recipe import Recipe, run_ids
from collect.runner import CollectError, collect
from generators.errors import ConfigError, DataError, PowerhouseError, UnknownNameError, ZooError
from generators.ghn.config import GHNConfig
from generators.ghn.ghn import GHN

TINY = Recipe(architecture="mlp-1-w4", epochs=1)


def test_sweep_is_the_product_in_the_order_written() -> None:
    found = sweep(TINY, architecture=["mlp-1-w4", "mlp-2-w4"], lr=[0.1, 0.2])
    pairs = [(recipe.architecture, recipe.lr) for recipe in found]
    assert pairs == [("mlp-1-w4", 0.1), ("mlp-1-w4", 0.2), ("mlp-2-w4", 0.1), ("mlp-2-w4", 0.2)]
    assert all(recipe.epochs == 1 for recipe in found)


def test_every_run_is_in_one_task_and_ids_are_the_recipes() -> None:
    recipes = sweep(TINY, init=["he", "xavier"])
    tasks = plan(recipes, runs=5, first_seed=3, together=2)
    assert [task.seeds for task in tasks] == [(3, 4), (5, 6), (7,)] * 2
    expected = {name for recipe in recipes for name in run_ids(recipe, tasks[0].data_digest, range(3, 8))}
    found = [name for task in tasks for name in run_ids(task.recipe, task.data_digest, task.seeds)]
    assert sorted(found) == sorted(expected)
    assert len({task.id for task in tasks}) == len(tasks)


def test_equal_calls_make_equal_plans_and_more_runs_keep_the_first() -> None:
    assert plan([TINY, TINY], runs=4, together=2) == plan([TINY], runs=4, together=2)
    assert plan([TINY], runs=8, together=2)[:2] == plan([TINY], runs=4, together=2)


def test_files_grow_with_the_recipe_and_more_runs_keep_them() -> None:
    tasks = plan([TINY], runs=3000)
    sizes = [len(task.seeds) for task in tasks]
    assert sizes[:13] == [8] * 8 + [16] * 4 + [32] and sizes[-2] == MOST == 256
    done = 0
    for size in sizes[:-1]:
        assert size == FEWEST or size <= done / 4
        done += size
    fewer = plan([TINY], runs=100)
    assert fewer[:-1] == tasks[: len(fewer) - 1] and len(fewer) == 11
    assert [len(task.seeds) for task in plan([TINY], runs=8)] == [8]


def test_files_of_costly_networks_stay_small() -> None:
    (small,) = plan([TINY], runs=1)
    epochs = int(LONGEST / small.cost / 20)  # 20 of them, but not 32, are within the bound
    assert {len(task.seeds) for task in plan([replace(TINY, epochs=epochs)], runs=512)} == {8, 16}
    assert {len(task.seeds) for task in plan([replace(TINY, epochs=4 * epochs)], runs=512)} == {8}


def test_independent_seeds_depend_on_root_recipe_and_number_only() -> None:
    recipes = sweep(TINY, lr=[0.1, 0.2])

    def seeds(runs: int, first: int = 0, root_seed: int | None = 5) -> list[list[int]]:
        tasks = plan(recipes, runs=runs, first_seed=first, root_seed=root_seed, together=3)
        return [[seed for task in tasks if task.recipe == recipe for seed in task.seeds] for recipe in recipes]

    assert seeds(4, root_seed=None) == [[0, 1, 2, 3]] * 2
    one, other = seeds(4)
    assert len({*one, *other}) == 8 and all(0 <= seed < 2**53 for seed in one + other)
    assert [found[:4] for found in seeds(7)] == [one, other]
    assert seeds(2, first=2) == [one[2:], other[2:]]
    assert seeds(4, root_seed=6) != [one, other]
    assert plan(recipes[1:], runs=4, root_seed=5)[0].seeds == tuple(other)


def test_two_ways_to_write_a_recipe_are_one() -> None:
    assert len(plan(sweep(TINY, data=["digits", "Digits"], lr=[1, 1.0]), runs=2)) == 1


def test_cost_is_that_of_all_networks_of_the_task() -> None:
    one, three = (plan([TINY], runs=runs)[0] for runs in (1, 3))
    assert three.cost == 3 * one.cost > 0


def test_a_refitted_checkpoint_at_the_same_place_makes_other_networks(tmp_path: Path) -> None:
    """Resume takes what is valid: without the digest it would take networks of the former checkpoint."""
    small = {"hidden": 16, "heads": 2, "layers": 1, "rank": 8, "cells": 8, "width": 8}
    place = tmp_path / "ghn"
    plans = []
    for seed in (0, 1):
        generators.save(GHN(GHNConfig(seed=seed, **small)), place)
        plans += plan([replace(TINY, init=str(place)), replace(TINY, init=f"{place}+lsuv")], runs=1)
    assert len({task.id for task in plans}) == 4
    with pytest.raises(CollectError, match="changed since the plan"):
        collect(plans[:1], tmp_path / "zoo", workers=0)
    assert [task.recipe.init_digest for task in plan([TINY], runs=1)] == [""]


@pytest.mark.parametrize(
    ("recipe", "error", "words"),
    [
        (dict(data="digit"), UnknownNameError, "'digits'"),
        (dict(init="hee"), UnknownNameError, "'he'"),
        (dict(init="he+xavier"), ConfigError, "put it first"),
        (dict(architecture="resnet-9-w4"), ConfigError, "8"),
        (dict(architecture="mlp-0-w4"), ConfigError, "at least 1"),
        (dict(batch_size=5000), ConfigError, "1295 training images"),
        (dict(data="nowhere.npz"), DataError, "nowhere.npz"),
    ],
)
def test_faults_are_found_while_planning(recipe: dict, error: type[PowerhouseError], words: str) -> None:
    with pytest.raises(error, match=words):
        plan([Recipe(**{"architecture": "mlp-1-w4"} | recipe)], runs=1)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(runs=0),
        dict(runs=1, together=0),
        dict(runs=1, first_seed=-1),
        dict(runs=2, first_seed=2**53),
        dict(runs=10**8),
    ],
)  # fmt: skip
def test_numbers_without_sense(arguments: dict) -> None:
    with pytest.raises(ConfigError, match="must be|more than"):
        plan([TINY], **arguments)


def test_an_empty_plan_and_wrong_sweeps_are_errors() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        plan([], runs=1)
    with pytest.raises(UnknownNameError, match="'init'"):
        sweep(TINY, inits=["he"])
    with pytest.raises(ConfigError, match="at least one value"):
        sweep(TINY, lr=[])
    with pytest.raises(ConfigError, match="list"):
        sweep(TINY, init="he")


def test_digest_of_the_data_is_part_of_the_ids(tmp_path: Path) -> None:
    """Two .npz files of one name and shape but other pixels must not share populations."""
    ids = []
    for value in (0, 9):
        images = np.arange(60 * 16, dtype=np.uint8).reshape(60, 4, 4)
        images[0, 0, 0] = value
        labels = np.arange(60) % 3
        path = tmp_path / "own.npz"
        np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
        ids.append(plan([Recipe(data=str(path), architecture="mlp-1-w4", epochs=1, batch_size=8)], runs=1)[0].id)
    assert ids[0] != ids[1]


def test_saved_plans_come_back_and_equal_ones_are_one_file(tmp_path: Path) -> None:
    first = [replace(task, stack=4) for task in plan(sweep(TINY, saved=["last", (0, 1)]), runs=3, together=2)]
    second = plan([TINY], runs=6, together=2, root_seed=1)
    assert save(first, tmp_path) == save(first, tmp_path)
    save(second, tmp_path)
    plans, bad = saved_plans(tmp_path)
    assert not bad and sorted(plans.values(), key=len) == [second, first]
    found = next(tasks for tasks in plans.values() if tasks == first)
    assert [(task.id, task.stack, task.cost) for task in found] == [(task.id, 4, task.cost) for task in first]


def test_a_plan_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Format 1, written out by hand as version 0.1 did; beside the same plan in this format it counts once."""
    tasks = plan(sweep(TINY, init=["he", "xavier"]), runs=3, together=2)
    rows = [
        {"cost": task.cost, "data_digest": task.data_digest, "recipe": asdict(task.recipe), "seeds": task.seeds}
        for task in tasks
    ]
    (tmp_path / "plan-00.json").write_text(json.dumps({"format": 1, "tasks": rows}, indent=1, sort_keys=True))
    assert saved_plans(tmp_path) == ({"plan-00.json": tasks}, {})
    save(tasks, tmp_path)
    assert saved_plans(tmp_path) == ({"plan-00.json": tasks}, {})


def test_an_id_that_is_not_that_of_its_seeds_is_found_by_who_trains_and_not_by_who_looks(tmp_path: Path) -> None:
    path = save(plan([TINY], runs=1), tmp_path)
    (expected,) = read(path)[0]
    path.write_text(path.read_text().replace('"seeds": [0]', '"seeds": [1]'))
    with pytest.raises(ZooError, match="this version calls"):
        read(path)
    assert [task.id for task in saved_plans(tmp_path)[0][path.name]] == [expected.id]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[:-20], "Expecting"),
        (lambda text: text.replace('"seeds": [0]', '"seeds": [0.5]'), "whole numbers"),
        (lambda text: text.replace('"lr": 0.1', '"lr": -1'), "lr must be above 0"),
        (lambda text: text.replace('"recipe": 0', '"recipe": 7'), "out of range"),
        (lambda text: "[]", "list indices"),
        (lambda text: '{"format": 2, "tasks": []}', "no task"),
    ],
)
def test_a_damaged_plan_file_is_named_and_hides_no_other(
    damage: Callable[[str], str], reason: str, tmp_path: Path
) -> None:
    good, path = save(plan([TINY], runs=2), tmp_path), save(plan([TINY], runs=1), tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ZooError, match=path.name) as caught:
        read(path)
    assert caught.match(reason) and caught.match("collect plan")
    plans, bad = saved_plans(tmp_path)
    assert list(plans) == [good.name] and list(bad) == [path]
