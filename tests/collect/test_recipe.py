"""Recipes: round trip, ids, and values that make no sense."""

import dataclasses

import pytest

from collect.recipe import Recipe, canonical_json, from_json, population_id, run_ids
from generators.errors import ConfigError, UnknownNameError


def run_id(recipe: Recipe, data_digest: str, seed: int) -> str:
    (found,) = run_ids(recipe, data_digest, [seed])
    return found


def test_json_round_trips() -> None:
    recipe = Recipe(saved=(4, 0), epochs=4, lr=0.01)
    assert from_json(canonical_json(recipe)) == recipe
    assert canonical_json(from_json(canonical_json(recipe))) == canonical_json(recipe)


@pytest.mark.parametrize("text", ['{"learning_rate": 1}', "{", "3"])
def test_foreign_json_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="fields of collect"):
        from_json(text)


# What the first version wrote, which had none of `ADDED`.
FIRST_VERSION = (
    '{"architecture":"vgg-6-w8","augmentation":"shift","batch_size":64,"clip_norm":0.0,"data":"digits","epochs":5,'
    '"evaluations_per_epoch":1,"init":"xavier","init_digest":"","label_smoothing":0.0,"lr":0.05,"momentum":0.9,'
    '"nesterov":false,"optimiser":"sgd","saved":[0,5],"schedule":"cosine","statistics":"train","warmup_epochs":0.0,'
    '"weight_decay":0.0005}'
)


def test_ids_are_pinned() -> None:
    """Resuming a zoo relies on these never moving; raise `ENGINE_VERSION` if they must."""
    assert run_id(Recipe(), "digest", 3) == "92664ce8667a27d7"
    assert population_id(Recipe(), "digest", [3, 4]) == "4748efd1c87d3a1a"
    assert run_id(from_json(FIRST_VERSION), "digest", 3) == "c18740ec83f0cad0"


def test_json_of_the_first_version_is_read_with_defaults_for_what_it_did_not_have() -> None:
    recipe = Recipe(
        architecture="vgg-6-w8", augmentation="shift", epochs=5, init="xavier", lr=0.05, saved=(0, 5)
    )  # fmt: skip
    assert from_json(FIRST_VERSION) == recipe
    assert (recipe.dropout, recipe.precision, recipe.trajectory, recipe.classifier_lr) == (0.0, "float32", "float32", 1)
    assert recipe.evaluation_steps == ()


def test_every_choice_the_data_and_the_seed_are_in_the_id_but_not_the_place_of_the_data() -> None:
    base = Recipe(data="here/own.npz", optimiser="sgd", momentum=0.9)
    others: dict[str, object] = {
        "architecture": "vgg-6-w8", "init": "xavier", "optimiser": "adamw", "lr": 0.2, "momentum": 0.8,
        "nesterov": True, "weight_decay": 0.0, "schedule": "step", "warmup_epochs": 1.0, "epochs": 21, "batch_size": 32,
        "augmentation": "shift", "label_smoothing": 0.1, "clip_norm": 1.0, "evaluations_per_epoch": 2, "saved": "all",
        "statistics": "running", "init_digest": "sha256 of another checkpoint", "dropout": 0.1, "precision": "bfloat16",
        "trajectory": "float16", "classifier_lr": 0.1, "evaluation_steps": (5,),
    }  # fmt: skip
    assert others.keys() | {"data"} == {field.name for field in dataclasses.fields(Recipe)}
    ids = {run_id(base, "d", 0), run_id(base, "other", 0), run_id(base, "d", 1)}
    for field, value in others.items():
        ids.add(run_id(dataclasses.replace(base, **{field: value}), "d", 0))
    assert len(ids) == 3 + len(others)
    assert run_id(dataclasses.replace(base, data="there/own.npz"), "d", 0) == run_id(base, "d", 0)
    checkpoint = dataclasses.replace(base, init="here/ghn", init_digest="content")
    assert run_id(checkpoint, "d", 0) == run_id(dataclasses.replace(checkpoint, init="there/ghn"), "d", 0)
    assert run_id(dataclasses.replace(base, lr=1), "d", 0) == run_id(dataclasses.replace(base, lr=1.0), "d", 0)


@pytest.mark.parametrize(
    ("saved", "epochs"), [("last", (3,)), ("all", (0, 1, 2, 3)), ((3, 0, 3), (0, 3)), ([1], (1,))]
)  # fmt: skip
def test_saved_epochs(saved: str | tuple[int, ...], epochs: tuple[int, ...]) -> None:
    assert Recipe(epochs=3, saved=saved).checkpoint_epochs == epochs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser": "adam"}, "did you mean 'adamw'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"augmentation": "xyz"}, "choose one of none, shift, flip-crop"),
        ({"statistics": "test"}, "unknown statistics"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be above 0"),
        ({"momentum": 1.0}, "below 1"),
        ({"weight_decay": -1e-4}, "at least 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"epochs": 5, "warmup_epochs": 5}, "warmup_epochs must be at least 0 and below 5"),
        ({"batch_size": 0}, "batch_size"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"clip_norm": -1}, "clip_norm"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"classifier_lr": -0.1}, "classifier_lr must be at least 0"),
        ({"precision": "float16"}, "unknown precision"),
        ({"trajectory": "bfloat16"}, "unknown trajectory"),
        ({"evaluations_per_epoch": 0}, "evaluations_per_epoch"),
        ({"evaluation_steps": (0,)}, "whole steps from 1"),
        ({"evaluation_steps": (2.5,)}, "whole steps from 1"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov needs"),
        ({"saved": "first"}, "unknown saved"),
        ({"saved": (0, 99)}, "whole epochs from 0 to 20"),
        ({"saved": ()}, "whole epochs"),
        ({"saved": (0.5,)}, "whole epochs"),
        ({"architecture": "resnet20"}, "FAMILY-DEPTH-wWIDTH"),
    ],
)
def test_nonsense_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**changes)


def test_evaluations_are_those_of_every_epoch_and_the_named_steps() -> None:
    recipe = Recipe(epochs=2, batch_size=128, evaluations_per_epoch=2, evaluation_steps=(13, 3, 10, 3))
    assert recipe.evaluation_steps == (3, 10, 13) and from_json(canonical_json(recipe)) == recipe
    assert recipe.evaluations(1295) == {0: 0.0, 3: 0.3, 5: 0.5, 10: 1.0, 13: 1.3, 15: 1.5, 20: 2.0}
    with pytest.raises(ConfigError, match="evaluation_steps has 13, but 2 epochs of digits are 12 steps"):
        recipe.evaluations(128 * 6)


def test_unknown_architecture_suggests_near_names() -> None:
    with pytest.raises(UnknownNameError, match="resnet-8-w8"):
        Recipe(architecture="restnet-8-w8")
