"""What every kind of local generator must do, on the trained kernels of a zoo of real digit networks."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch
from torch import nn

from collect import zoo_file
from collect.population import train
from collect.recipe import Recipe
from collect.zoo import Zoo
from generators.checkpoint import load
from generators.errors import CollapseError, ConfigError
from generators.generator import GENERATOR_KINDS
from generators.local.config import LocalKind, LocalOptions
from generators.local.fidelity import match
from generators.local.generator import SLICE_MODELS
from generators.local.groups import GroupKey
from generators.local.slice_model import Layer
from generators.seeds import stream
from train_generators.slices import SliceGroup, open_groups
from train_generators.tracking import read_log
from train_generators.vae import fit
from train_generators.vae_config import VAEConfig
from train_generators.vae_group import finish

KINDS = tuple(SLICE_MODELS)
QUICK = VAEConfig(steps=120, save_every=40, depth_buckets=1, codes=16, latent=9)


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """Fewer slices to judge a group by; that of the PixelCNN are drawn place by place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train_generators.vae_group.JUDGED", 6000)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, images):
    """14 ResNets."""
    folder = tmp_path_factory.mktemp("zoo")
    zoo_file.write(train(Recipe(architecture="resnet-8-w8", epochs=3), list(range(14)), images), folder)
    return folder


@pytest.fixture(scope="module")
def groups(folder) -> dict[GroupKey, SliceGroup]:
    return open_groups(Zoo(folder), patch=8, depth_buckets=1, slices_per_tensor=4096)


@pytest.fixture(scope="module", params=KINDS)
def fitted(request, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("fitted") / request.param
    return fit(folder, dataclasses.replace(QUICK, kind=request.param), out, quiet=True), out


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(5, 30, 3), nn.Conv2d(30, 24, 3), nn.Linear(24, 2))


def test_every_kind_has_a_model_and_a_name_in_checkpoints():
    assert set(KINDS) == set(get_args(LocalKind))
    assert {kind for kind, place in GENERATOR_KINDS.items() if "LocalGenerator" in place} == set(KINDS)
    assert all(model.summary and model.paper for model in SLICE_MODELS.values())


def test_the_decoder_says_more_than_the_mean(fitted):
    """A decoder of zeros has, at the largest variance of 1/4, a misfit of d / 2 (4 - log 4): 10 nats and more."""
    _, out = fitted
    for group in {row["group"] for row in read_log(out / "training")}:
        losses = [row["misfit"] for row in read_log(out / "training") if row["group"] == group]
        assert losses[-1] < 4.0, group


def test_samples_match_held_out_networks_better_than_white_noise(fitted):
    generator, _ = fitted
    for group, row in generator.card["metrics"].items():
        assert row["held_out_runs"] >= 2, group
        assert 0.9 <= row["second_moment_ratio"] <= 1.1, group
        assert 0.5 <= row["second_moment_ratio_raw"] <= 2.0, group
        assert row["covariance_error"] < row["covariance_error_white"], group
        assert row["covariance_error"] < row["covariance_error_train"] + 0.05, group
        assert row["auroc"] <= 0.65 and row["auroc"] < row["auroc_he"] + 0.03, group
        assert row["active_units"] >= row["latent_units"] / 3, group


def test_calibrated_samples_have_the_covariance_of_the_training_slices(fitted, groups):
    generator, _ = fitted
    for key in generator.keys:
        drawn = generator.model(key).draw(Layer(128, 128, fan_in=1152, fan_out=1152), stream(5, "layer"))
        figures = match(drawn, groups[key].train.in_ram())
        assert 0.9 <= figures["second_moment_ratio"] <= 1.1 and figures["covariance_error"] <= 0.15, key


def test_samples_are_finite_and_a_member_does_not_depend_on_how_many_there_are(fitted):
    generator, _ = fitted
    model = network()
    two, four = generator.sample(model, 2, seed=3), generator.sample(model, 4, seed=3)
    for name in ("0.weight", "1.weight"):
        assert four[name].isfinite().all()
        assert torch.equal(two[name], four[name][:2]) and not torch.equal(four[name][0], four[name][1])


def test_saved_and_loaded_it_draws_the_same_bits(fitted):
    generator, out = fitted
    found = load(out)
    assert found.kind_name == generator.kind_name and found.config == generator.config
    first, second = (each.sample(network(), 1, seed=9) for each in (generator, found))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_stopped_and_begun_again_it_ends_with_the_same_bytes(fitted, folder, tmp_path):
    generator, whole = fitted
    config, done = dataclasses.replace(QUICK, kind=generator.config.kind), 0.0

    def stop(amount: float) -> None:
        nonlocal done
        done += amount
        if done > 0.5 * config.steps:  # after the first state was saved
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(folder, config, tmp_path / "vae", quiet=True, on_step=stop)
    fit(folder, config, tmp_path / "vae", quiet=True)
    for name in ("config.json", "weights.safetensors", "training/log.jsonl"):
        assert (tmp_path / "vae" / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_whose_latents_say_nothing_is_an_error(kind, groups):
    """Every slice standardised to 0: whatever the model, its latents cannot carry anything."""
    key, group = next(iter(groups.items()))
    config = dataclasses.replace(QUICK, kind=kind, channels=4, hidden=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SLICE_MODELS[kind](key.shape, config)
    model.standardise(group.train.in_ram())
    model.whiten.zero_()
    with pytest.raises(CollapseError, match=rf"group {key} .* latent units are active"):
        finish(key, model, group, config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 8), (2, 2), (5, 7), (1, 1), (5,), (3, 3, 3)])
def test_every_kind_takes_every_shape(kind, shape):
    model = SLICE_MODELS[kind](shape, LocalOptions(kind=kind, channels=4, hidden=8, codes=8)).eval()
    for layer in (Layer(3, 5), Layer(0), Layer(1)):
        assert model.draw(layer, stream(0, "draw")).shape == (layer.count, *shape)
        assert model.draw(layer, stream(0, "draw")).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_do_not_depend_on_the_number_of_threads(kind):
    model = SLICE_MODELS[kind]((3, 3), LocalOptions(kind=kind)).eval()
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(model.draw(Layer(30, 40, fan_in=360, fan_out=270), stream(1, "draw")))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_filters_are_not_pruned():
    with pytest.raises(ConfigError, match=r"whole filters.*leave out --prune"):
        VAEConfig(kind="filter-vae", prune=0.05)
