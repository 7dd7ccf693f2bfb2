"""Fitting conv VAEs on a real zoo of digit networks: data path, fidelity, collapse, and a kill in the middle."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from collect import data, zoo_file
from collect.population import train
from collect.recipe import Recipe
from collect.zoo import Zoo
from generators import init
from generators.checkpoint import load
from generators.errors import CollapseError, ConfigError, ZooError
from generators.local.groups import GroupKey
from train_generators import cli
from train_generators.slices import open_groups
from train_generators.tracking import read_log
from train_generators.training_state import load_state
from train_generators.vae import fit
from train_generators.vae_config import VAEConfig
from train_generators.vae_data import open_data

QUICK = VAEConfig(steps=120, save_every=40, least_slices=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 networks of three families, six of them diverged and two started from Xavier."""
    folder = tmp_path_factory.mktemp("zoo")
    images = data.load("digits")
    for architecture, changes, seeds in (
        ("resnet-8-w8", {"lr": 0.1}, range(8)),
        ("mobilenet-3-w16", {"lr": 0.1}, range(5)),
        ("mlp-2-w32", {"lr": 0.02}, range(5)),
        ("mlp-2-w32", {"lr": 1e30, "momentum": 0.0}, range(4)),
        ("resnet-8-w8", {"init": "xavier"}, range(2)),
    ):
        recipe = Recipe(architecture=architecture, epochs=2, **changes)
        zoo_file.write(train(recipe, list(seeds), images), folder)
    return folder


@pytest.fixture(scope="module")
def fitted(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("fitted") / "vae"
    return fit(folder, QUICK, out, quiet=True), out


def contents(out) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in ("config.json", "weights.safetensors", "training/log.jsonl")}


def test_samples_match_networks_that_had_no_part_in_the_fit(fitted):
    generator, _ = fitted
    metrics = generator.card["metrics"]
    assert {"conv_weight-3x3-0", "conv_weight-3x3-1", "conv_weight-3x3-2"} <= metrics.keys() == set(generator.groups)
    for group, row in metrics.items():
        assert row["active_units"] == row["latent_units"], group
        assert 0.9 < row["second_moment_ratio"] < 1.1, group
        assert 0.7 < row["second_moment_ratio_raw"] < 1.3, group
        assert row["covariance_error"] < row["covariance_error_train"] + 0.05, group
        assert 0.05 < row["noise_share"] <= 0.25, group


def test_the_card_says_what_was_used_and_what_was_left_out(fitted, folder):
    generator, out = fitted
    card = load(out).card
    assert card == json.loads(json.dumps(generator.card))
    assert card["data"] == "digits" and card["zoo"]["runs"] == 18, "neither diverged nor Xavier runs"
    assert card["training"]["steps"] == 120 == json.loads((out / "training" / "config.json").read_text())["steps"]
    for group, reason in card["skipped_groups"].items():
        assert group not in card["metrics"] and "fewer than 200" in reason
    assert card["zoo"]["architectures"] == ["mlp-2-w32", "mobilenet-3-w16", "resnet-8-w8"]


def test_it_initialises_an_architecture_and_width_that_no_zoo_had(fitted):
    _, out = fitted
    from collect.architectures import build, parse

    model = build(parse("resnet-20-w12"), shape=(1, 8, 8), classes=10)
    report = init(model, str(out), seed=0)
    ratios = [row["std_ratio"] for name, row in report.statistics.items() if name in report.generated]
    assert len(ratios) == 19 and all(0.85 < ratio < 1.15 for ratio in ratios)


def test_done_again_it_trains_nothing_and_writes_the_same_bytes(fitted, folder, monkeypatch):
    _, out = fitted
    before = contents(out)
    monkeypatch.setattr("train_generators.vae.steps", None)
    fit(folder, QUICK, out, quiet=True)
    assert contents(out) == before


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from train_generators.vae import fit
from train_generators.vae_config import VAEConfig
from train_generators.vae_data import open_data
fit(sys.argv[1], VAEConfig(steps=120, save_every=40, least_slices=200), sys.argv[2], quiet=True)
"""


def test_killed_in_the_middle_and_run_again_it_ends_with_the_same_bytes(fitted, folder, tmp_path):
    _, whole = fitted
    out = tmp_path / "vae"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), str(out)])
    deadline = time.monotonic() + 60
    while len(read_log(out / "training")) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was still at work"
    assert not (out / "weights.safetensors").exists()
    before, started = load_state(out / "training" / "state.safetensors")[1]["cpu_seconds"], time.process_time()
    fit(folder, QUICK, out, quiet=True)
    assert contents(out) == contents(whole)
    spent = load_state(out / "training" / "state.safetensors")[1]["cpu_seconds"]
    assert 0 < before < spent <= before + time.process_time() - started


def test_another_configuration_does_not_overwrite_a_training(fitted, folder):
    _, out = fitted
    before = contents(out)
    with pytest.raises(ConfigError, match=r"another configuration or zoo.*delete .*state\.safetensors"):
        fit(folder, VAEConfig(steps=121, save_every=40, least_slices=200), out, quiet=True)
    assert contents(out) == before


def test_collapse_is_an_error_that_names_the_group_and_the_figures(folder, tmp_path):
    """The fault of the paper's code: a decoder variance as large as the data's makes every latent useless."""
    config = VAEConfig(steps=150, least_slices=200, noise_bounds=(0.99, 1.0))
    with pytest.raises(CollapseError, match=r"group conv_weight-3x3-0 .* 0 of 9 latent units are active"):
        fit(folder, config, tmp_path / "vae", quiet=True)
    assert [path.name for path in sorted((tmp_path / "vae").rglob("*.*"))] == ["config.json", "log.jsonl"]


def test_after_a_collapse_other_settings_can_be_tried_in_the_same_folder(folder, tmp_path):
    out = tmp_path / "vae"
    with pytest.raises(CollapseError):  # after the first state was saved
        fit(folder, dataclasses.replace(QUICK, lr=1e20), out, quiet=True)
    assert fit(folder, dataclasses.replace(QUICK, least_slices=2000), out, quiet=True).card["metrics"]


def test_a_loss_that_is_not_finite_is_an_error(folder, tmp_path):
    with pytest.raises(CollapseError, match=r"conv_weight-3x3-0: the loss is not finite.*lower --lr"):
        fit(folder, VAEConfig(steps=50, least_slices=200, lr=1e20), tmp_path / "vae", quiet=True)


def test_zoos_without_anything_to_fit(folder, tmp_path):
    with pytest.raises(ZooError, match="no zoo at"):
        fit(tmp_path / "none", QUICK, tmp_path / "vae", quiet=True)
    with pytest.raises(ZooError, match="started from 'lecun'.*--init any"):
        fit(folder, VAEConfig(init="lecun"), tmp_path / "vae", quiet=True)
    with pytest.raises(ZooError, match="fewer than 1000000"):
        fit(folder, VAEConfig(least_slices=10**6), tmp_path / "vae", quiet=True)
    assert not (tmp_path / "vae").exists()


def test_kernels_made_elsewhere_are_fitted_too(folder, tmp_path):
    """A folder of `.npy` files as the Deep Weight Prior repositories publish them, here of a zoo's kernels."""
    group = open_groups(Zoo(folder), patch=8, depth_buckets=1, slices_per_tensor=4096)[
        GroupKey.parse("conv_weight-3x3-0")
    ]
    (tmp_path / "kernels").mkdir()
    for name, side in (("train", group.train), ("test", group.held_out)):
        np.save(tmp_path / "kernels" / f"{name}.npy", side.in_ram()[:, None].numpy())
    generator = fit(tmp_path / "kernels", QUICK, tmp_path / "vae", quiet=True)
    row = load(tmp_path / "vae").card["metrics"]["conv_weight-3x3-0"]
    assert row["covariance_error"] < row["covariance_error_white"] and row["zoo_gain"] is None
    assert generator.card["data"] == "kernels" and generator.card["zoo"]["files"] == 2
    for options, message in (({"scale": "zoo"}, "no gain over He"), ({"kind": "filter-vae"}, "make no filters")):
        with pytest.raises(ConfigError, match=message):
            fit(tmp_path / "kernels", dataclasses.replace(QUICK, **options), tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("options", [{"steps": 0}, {"lr": 0.0}, {"warm_up": 2.0}, {"patch": 0}, {"lr": math.nan}])
def test_configurations_that_make_no_sense(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        VAEConfig(**options)


def test_the_command_line_fits_and_shows_a_table(folder, tmp_path, capsys):
    out = tmp_path / "vae"
    cli.main(["vae", "--zoo", str(folder), "--out", str(out), "--steps", "120", "--scale", "zoo", "--name", "mine"])
    shown = capsys.readouterr().out
    assert "conv_weight-3x3-0" in shown and "9/9" in shown and "told apart" in shown and "…" not in shown
    assert load(out).name == "mine" and load(out).config.scale == "zoo"


def test_the_limit_on_ram_reaches_zoos_and_collections(folder, tmp_path):
    """Of a group that is larger a share is held, in strips."""
    limit = 2**16
    np.save(tmp_path / "train.npy", np.ones((4000, 1, 3, 3), dtype=np.float32))
    for source in (folder, tmp_path):
        config = dataclasses.replace(QUICK, ram_limit=limit)
        free, held = (open_data(source, each).groups for each in (QUICK, config))
        assert {group.train.ram_limit for group in held.values()} == {limit}
        sizes = {key: (4 * free[key].train.in_ram().numel(), 4 * held[key].train.in_ram().numel()) for key in held}
        assert any(size > limit for size, _ in sizes.values())
        assert all(share <= limit for _, share in sizes.values())
    with pytest.raises(ConfigError, match="ram_limit must be at least 1"):
        dataclasses.replace(QUICK, ram_limit=0)
