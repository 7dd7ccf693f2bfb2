"""Configurations of a GHN training: what is refused at once, and that published ones are not."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from generators.errors import ConfigError, PowerhouseError
from generators.ghn.config import GHNConfig
from small_training import QUICK
from train_generators.architectures import Pool
from train_generators.ghn import fit
from train_generators.ghn_config import GHNTrainingConfig
from train_generators.objectives import Objective

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"held_out": ("mlp-1-w16", "vgg-3-w4")}, "mlp-1-w16.*both trained on and held out"),
        ({"steps": 0}, "at least 1"),
        ({"batch_size": 1}, "batch_size"),
        ({"log_every": 0}, "log_every"),
        ({"lr": 0.0}, "lr"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_norm": math.nan}, "clip_norm"),
        ({"lr": math.nan}, "lr"),
        ({"lr": math.inf}, "lr"),
        ({"weight_decay": -1e-4}, "weight_decay"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"warm_up": 1.5}, "warm_up"),
        ({"warm_up": -0.1}, "warm_up"),
        ({"anchor_warm_up": 1.5}, "anchor_warm_up"),
        ({"anchor_warm_up": math.nan}, "anchor_warm_up"),
        ({"seed": 2**64}, "64 bits"),
        ({"seed": -(2**63) - 1}, "64 bits"),
        ({"cosine_weight": -0.1, "draws": 2, "ghn": GHNConfig(code=4)}, "cosine_weight must"),
        ({"cosine_weight": 0.1}, "draws of 2"),
        ({"cosine_weight": 0.1, "draws": 2}, "anchor or a code"),
    ],
)
def test_impossible_configurations(changes, words):
    with pytest.raises(ConfigError, match=words):
        replace(QUICK, **changes)


@pytest.mark.parametrize(
    ("name", "last", "beyond"),
    [
        ("seed", 2**64 - 1, 2**64),
        ("seed", -(2**63), -(2**63) - 1),
        ("warm_up", 0.0, -1e-9),
        ("warm_up", 1.0, 1 + 1e-9),
        ("anchor_warm_up", 1.0, 1 + 1e-9),
        ("weight_decay", 0.0, -1e-9),
        ("clip_norm", 1e-9, 0.0),
    ],
)
def test_bounds_are_where_they_are_said_to_be(name, last, beyond):
    """The last value that makes sense is taken as it is, the next one is refused by name."""
    assert getattr(replace(QUICK, **{name: last}), name) == last
    with pytest.raises(ConfigError, match=name):
        replace(QUICK, **{name: beyond})


def test_settings_that_nothing_would_read():
    """Of the objective whose weight is 0, and of a pool without families; the way out is named."""
    settings = {"horizon": (3, "adapted"), "inner_lr": (0.1, "adapted"), "inner_momentum": (0.5, "adapted"),
                "prior": (0.5, "zoo")}  # fmt: skip
    for name, (value, part) in settings.items():
        with pytest.raises(ConfigError, match=rf"{name} is {value}.*--objective\.{part}"):
            Objective(**{name: value})
        assert getattr(Objective(**{name: value, part: 1.0}), name) == value
    for wrong in ({"depths": (3, 5)}, {"widths": (4, 9)}, {"count": 3}):
        with pytest.raises(ConfigError, match=r"--pool\.families"):
            Pool(**wrong)
        Pool(families=("resnet",), **wrong)
    Pool(depths=[3, 14])  # type: ignore[arg-type]  # as JSON has it


# ---- found before anything is written ----------------------------------------------------------------------------


def test_nothing_to_train_on(images, tmp_path):
    with pytest.raises(ConfigError, match="no architectures"):
        fit(replace(QUICK, architectures=()), tmp_path / "out", images=images, quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"ghn": replace(QUICK.ghn, seed=7), "seed": 3}, "ghn.seed is 7, but the GHN gets 3.*--seed"),
        ({"ghn": replace(QUICK.ghn, classes=5)}, "ghn.classes is 5, but the GHN gets 10"),
        ({"ghn": replace(QUICK.ghn, met=("linear layer",))}, "ghn.met"),
        ({"batch_size": 10**4}, "batch_size is 10000, but digits has"),
        ({"mix_zoo": True}, "--zoo"),
        ({"hold_out": 0.2}, "hold_out"),
    ],
)
def test_what_would_be_ignored_or_impossible(images, tmp_path, changes, words):
    """Found before anything is written."""
    with pytest.raises(ConfigError, match=words):
        fit(replace(QUICK, **changes), tmp_path / "out", images=images, quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_resolved_seed_is_no_contradiction(images, tmp_path):
    """The resolved configuration of a training can be trained again: its GHN has the seed and the classes it gets."""
    config = replace(QUICK, architectures=("mlp-1-w16",), steps=1, seed=3, ghn=replace(QUICK.ghn, seed=3))
    assert fit(config, tmp_path / "out", images=images, quiet=True).config.seed == 3


@pytest.mark.parametrize("name", ["resnet-9-w4", "renset-8-w4", "resnet"])
@pytest.mark.parametrize("where", ["architectures", "held_out"])
def test_unknown_architectures(images, tmp_path, name, where):
    """Found before the first step, held-out ones too, which are not used before the first evaluation."""
    with pytest.raises(PowerhouseError, match="resnet"):
        fit(replace(QUICK, **{where: (name,)}), tmp_path / "out", images=images, quiet=True)
    assert not (tmp_path / "out").exists()


# ---- published ones ----------------------------------------------------------------------------------------------


def made(kind: type, values: dict[str, Any]) -> Any:
    """A configuration from the JSON of one, whose fields a later version may have more of."""
    known = {field.name: getattr(kind(), field.name) for field in fields(kind)}
    assert values.keys() <= known.keys()
    return kind(**{
        name: made(type(known[name]), value) if is_dataclass(known[name])
        else tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
    })  # fmt: skip


def published() -> dict[str, dict[str, Any]]:
    found = {}
    for path in sorted((ROOT / "checkpoints").glob("*ghn*/config.json")):
        training = json.loads(path.read_text())["card"].get("training", {})
        if "meta_batch" in training:
            found[path.parent.name] = training
    for path in sorted((ROOT / "docs" / "results").glob("*/training_config.json")):
        found[path.parent.name] = json.loads(path.read_text())
    for name, values in json.loads((ROOT / "docs" / "results" / "demo" / "config.json").read_text()).items():
        if isinstance(values, dict) and "meta_batch" in values:
            found[f"demo {name}"] = values
    return found


@pytest.mark.parametrize("name", published())
def test_published_configurations_are_still_possible(name):
    values = published()[name]
    config = made(GHNTrainingConfig, values)
    assert (config.steps, config.objective.horizon) == (values["steps"], 16)


def test_there_are_published_configurations():
    assert {"noise-ghn-cifar10-long", "cifar10-decoders", "demo ghn", "demo noise_ghn"} <= published().keys()
