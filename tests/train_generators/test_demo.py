"""The whole job at toy size, against what it must leave behind; a second call must find everything done."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import generators
from collect.recipe import Recipe
from collect.zoo import Zoo
from generators.errors import ConfigError
from generators.ghn.config import GHNConfig
from train_generators.demo import FAMILIES, UNSEEN, ZOO, DemoConfig, demo, families
from train_generators.ghn_config import GHNTrainingConfig
from train_generators.vae_config import VAEConfig

SMALL = {"hidden": 16, "heads": 2, "layers": 1, "rank": 8, "cells": 8, "width": 8}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> DemoConfig:
    return DemoConfig(
        out=tmp_path_factory.mktemp("demo") / "run", zoo=("vgg-3-w4", "mlp-1-w16"), zoo_runs=2,
        zoo_recipe=Recipe(epochs=1), ghn_architectures=("vgg-3-w4", "mlp-1-w16"), unseen=("vgg-4-w4",), seeds=2,
        learning_rates=(0.1,), comparison_recipe=Recipe(epochs=1),
        vae=VAEConfig(steps=250, least_slices=32, channels=4),
        ghn=GHNTrainingConfig(steps=4, ghn=GHNConfig(**SMALL)),
        noise_ghn=GHNTrainingConfig(steps=4, name="noise-ghn", draws=2, ghn=GHNConfig(anchor=0.5, code=2, **SMALL)),
        workers=1,
    )  # fmt: skip


def test_the_demo_leaves_zoo_checkpoints_report_and_records_and_repeats_nothing(toy: DemoConfig) -> None:
    out = demo(toy)
    assert len(Zoo(out / "zoo")) == 4
    compared = Zoo(out / "comparison-zoo")
    assert len(compared) == 2 * 5  # two seeds; he, xavier and three generators
    for name, kind in (("conv-vae", "conv-vae"), ("ghn", "ghn"), ("noise-ghn", "noise-ghn")):
        assert generators.load(out / "checkpoints" / name).kind_name == kind
    figures = json.loads((out / "report" / "results.json").read_text())
    assert figures["figures"]["vgg-4-w4/noise-ghn/runs"] == 2
    assert (out / "report" / "report.html").stat().st_size > 10_000
    assert list((out / "report" / "records").iterdir())
    assert json.loads((out / "config.json").read_text())["seeds"] == 2
    written = {path: path.stat().st_mtime_ns for path in (out / "comparison-zoo").glob("*.h5")}
    demo(toy)
    assert {path: path.stat().st_mtime_ns for path in (out / "comparison-zoo").glob("*.h5")} == written


def test_what_the_demo_calls_unseen_is_unseen() -> None:
    """Neither the zoo nor the GHN trainings hold the depth and the width of a compared network, or its family."""
    split = [name.split("-") for name in (*ZOO, *families())]
    for name in UNSEEN:
        family, depth, width = name.split("-")
        mine = [(d, w) for f, d, w in split if f == family]
        assert depth not in {d for d, _ in mine} and width not in {w for _, w in mine}
    assert any(name.split("-")[0] not in FAMILIES for name in UNSEEN)
    with pytest.raises(ConfigError, match="cannot be unseen"):
        replace(DemoConfig(), unseen=(ZOO[0],))
