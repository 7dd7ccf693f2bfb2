"""What the pictures of local generators show, against slow references, and that they are drawn for every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from collect import zoo_file
from collect.data import ImageSet
from collect.population import train
from collect.recipe import Recipe
from generators.checkpoint import load, save
from generators.errors import ConfigError, ZooError
from generators.local.config import LocalConfig
from generators.local.generator import SLICE_MODELS, LocalGenerator
from generators.local.groups import GroupKey
from generators.local.slice_model import Layer
from train_generators import local_plots
from train_generators.cli import COMMANDS
from train_generators.vae_config import VAEConfig
from train_generators.vae_data import open_data

KEY = GroupKey.parse("conv_weight-3x3-1")


@pytest.fixture(scope="module")
def zoo(images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    zoo_file.write(train(Recipe(architecture="resnet-8-w4", epochs=1), [0, 1], images), folder)
    return folder


@pytest.mark.parametrize("kind", SLICE_MODELS)
def test_traversal_follows_the_latents_of_greatest_effect(kind: str) -> None:
    generator = LocalGenerator(LocalConfig(kind=kind, groups=(str(KEY),)))  # type: ignore[arg-type]
    model = generator.model(KEY).eval()
    model.colour.copy_(torch.randn(9, 9, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        chosen, slices = local_plots.traversal(model, latents=3)

        def at(latent: int, value: float) -> torch.Tensor:
            codes = torch.zeros(1, model.latent)
            codes[0, latent] = value
            return (model.shift + model.decode(codes) @ model.colour.T).reshape(3, 3)

        effects = [(at(latent, 3.0) - at(latent, -3.0)).square().mean().item() for latent in range(model.normal)]
    assert slices.shape == (3, 9, 3, 3)
    assert model.normal == model.latent - (3 if kind == "filter-vae" else 0), "facts of the layer are no draws"
    for place, latent in enumerate(chosen):
        assert effects[latent] == pytest.approx(sorted(effects)[-1 - place], rel=1e-3, abs=1e-9)
        for step, value in enumerate(local_plots.STEPS):
            torch.testing.assert_close(slices[place, step], at(latent, value.item()), rtol=1e-4, atol=1e-5)


def test_variances_along_the_axes_are_those_of_the_coordinates() -> None:
    slices = torch.randn(4000, 2, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0, 2.0], [3.0, 0]])
    found = local_plots.principal_variances(slices, torch.eye(4).double())
    np.testing.assert_allclose(found, slices.flatten(1).var(0, correction=0), rtol=1e-3, atol=1e-9)


def test_singular_values_at_unit_spread() -> None:
    matrix = 7 * torch.eye(4)
    np.testing.assert_allclose(local_plots.singular_values(matrix), [2, 2, 2, 2])


def test_the_command_draws_every_picture(zoo: Path, tmp_path: Path) -> None:
    assert COMMANDS["pictures"].load() is local_plots.main
    local_plots.main(checkpoint="conv-vae-digits", zoo=zoo, out=tmp_path)
    for name in ("kernels.png", "traversals.png", "spectra.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="noise-ghn"):
        local_plots.main(checkpoint="noise-ghn-digits", zoo=zoo, out=tmp_path)


def test_networks_are_those_that_the_generator_was_fitted_on(images: ImageSet, tmp_path: Path) -> None:
    """Those of a zoo without He networks, for a generator fitted with `--init any`."""
    zoo_file.write(train(Recipe(architecture="resnet-8-w4", init="xavier", epochs=1), [0], images), tmp_path / "zoo")
    generator = load("conv-vae-digits")
    with pytest.raises(ZooError, match="started from 'he'"):
        local_plots.main(checkpoint="conv-vae-digits", zoo=tmp_path / "zoo", out=tmp_path)
    generator.card["training"] = {**generator.card.get("training", {}), "init": "any"}
    save(generator, tmp_path / "any")
    local_plots.main(checkpoint=str(tmp_path / "any"), zoo=tmp_path / "zoo", out=tmp_path)
    assert (tmp_path / "kernels.png").exists()


@pytest.mark.parametrize("kind", ["conv-vae", "filter-vae"])
def test_samples_are_of_unit_spread_and_whole_layers_are_drawn_for_those_of_the_zoo(
    kind: str, zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `filter-vae` is told fan-in, fan-out and depth: layers that the zoo lacks have another spread."""
    generator = LocalGenerator(LocalConfig(kind=kind, groups=(str(KEY),)))  # type: ignore[arg-type]
    model, trained = generator.model(KEY).eval(), open_data(zoo, VAEConfig(least_slices=1)).groups[KEY].train
    model.unit_std.fill_(2.0)
    seen: list[Layer] = []
    draw = model.draw
    monkeypatch.setattr(model, "draw", lambda layer, draws: seen.append(layer) or draw(layer, draws))
    samples = local_plots.sampled(model, trained, 500, torch.Generator().manual_seed(0))
    assert samples.shape == (500, *KEY.shape)
    known = {Layer.of(KEY, stack.shape, stack.depth) for stack in trained.stacks}
    assert set(seen) == (known if model.whole_layers else {Layer(500)})
    draws = torch.Generator().manual_seed(0)
    every = torch.cat([draw(layer, draws) for layer in seen]).flatten(1)
    scaled = {tuple(row.tolist()) for row in every / 2.0}
    assert all(tuple(row.tolist()) in scaled for row in samples.flatten(1))
