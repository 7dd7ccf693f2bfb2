"""Whole layers as batches: dependence against loops over pairs, patches against the layers, and what the VAE learns."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from generators.local.config import LocalOptions
from generators.local.filter_vae import FilterVAE, Patches, facts_of
from generators.local.groups import GroupKey
from generators.local.slice_model import Layer
from generators.seeds import stream
from train_generators import layers as layers_module
from train_generators.layers import PATCH, LayerBatches, dependence
from train_generators.slice_source import Slices, TensorStack
from train_generators.slices import SliceGroup
from train_generators.vae_config import VAEConfig
from train_generators.vae_group import finish, steps

KEY = GroupKey("conv_weight", (2, 2), 0)
SHAPES = ((24, 20, 2, 2), (6, 1, 2, 2), (18, 30, 2, 2))
NETWORKS = 12


def layer(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Kernels that share a quarter of their variance with their filter, and input channels of different strength."""
    draws = stream(seed, "layer", *shape)
    rows, own = torch.randn(shape[0], 1, 2, 2, generator=draws), torch.randn(shape, generator=draws)
    strength = torch.exp(0.5 * torch.randn(1, shape[1], 1, 1, generator=draws))
    return (rows * 0.5 + own * 0.75**0.5) * strength


def side(networks: range) -> Slices:
    stacks = []
    for shape in SHAPES:
        values = np.stack([layer(shape, network).flatten().numpy() for network in networks])
        stack = TensorStack(
            lambda values=values: values, tuple(map(str, networks)), tuple(range(len(networks))), str(shape), shape, 0,
            depth=0.5, fan_in=math.prod(shape[1:]), key=KEY,
        )  # fmt: skip
        stacks.append(stack.measured(0.0))
    return Slices(KEY, stacks, per_tensor=4096)


@pytest.fixture(scope="module")
def data() -> SliceGroup:
    return SliceGroup(side(range(NETWORKS)), side(range(NETWORKS, NETWORKS + 4)))


def model(data: SliceGroup) -> FilterVAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = FilterVAE(KEY.shape, LocalOptions(kind="filter-vae", hidden=32))
    made.standardise(data.train.in_ram())
    return made


def test_dependence_equals_loops_over_all_pairs():
    layers = [torch.randn(3, 4, 2, generator=stream(0, "a")), torch.randn(5, 2, 2, generator=stream(0, "b"))]
    figures = dependence(layers)
    for energy, names in ((False, ("filter", "input")), (True, ("filter_energy", "input_energy"))):
        arrays = [each.square().mean(2, keepdim=True) if energy else each for each in layers]
        mean = torch.cat([array.flatten(0, 1) for array in arrays]).mean(0)
        for axis, name in ((1, names[0]), (0, names[1])):
            shared = power = 0.0
            for array in arrays:
                lines = (array - mean).unbind(1 - axis)
                for line in lines:
                    pairs = [float(one @ other) for one, other in itertools.permutations(line, 2)]
                    shared += sum(pairs) / (array.shape[axis] - 1)
                    power += float(line.square().sum())
            assert figures[f"{name}_correlation"] == pytest.approx(shared / power, rel=1e-4), name


def test_patches_number_rows_and_columns_of_each_layer_apart():
    first, second = torch.arange(12.0).reshape(2, 3, 2), torch.arange(8.0).reshape(4, 1, 2) + 100
    patches = Patches.of([(first, Layer(2, 3)), (second, Layer(4, 1, fan_in=9, depth=1.0))])
    assert patches.row.tolist() == [0, 0, 0, 1, 1, 1, 2, 3, 4, 5]
    assert patches.column.tolist() == [0, 1, 2, 0, 1, 2, 3, 3, 3, 3]
    assert torch.equal(patches.slices, torch.cat([first.flatten(0, 1), second.flatten(0, 1)]))
    assert torch.equal(patches.facts[6], facts_of(Layer(4, 1, fan_in=9, depth=1.0)))


def test_a_patch_holds_slices_of_its_rows_and_columns(data):
    made = model(data)
    tensors = [tensor for tensor, _ in LayerBatches(made, data.train).tensors()]
    batch = next(LayerBatches(made, data.train).batches(300, seed=0, first=5))
    again = LayerBatches(made, data.train).batches(300, seed=0, first=4)
    next(again)
    assert torch.equal(next(again).slices, batch.slices) and len(batch) >= 300
    row = batch.slices[batch.row == 0]
    assert 1 <= len(row) <= PATCH
    places = [
        (number, line)
        for number, tensor in enumerate(tensors)
        for line in range(len(tensor))
        if (torch.cdist(row, tensor[line]).amin(1) < 1e-3).all()
    ]
    assert len(places) == 1, "all slices of a row are of one filter of one layer"


def test_it_learns_what_slices_of_a_filter_and_of_an_input_have_in_common(data):
    made = model(data)
    config = VAEConfig(kind="filter-vae", steps=600, batch_size=256)
    for _ in steps(made, data, torch.optim.Adam(made.parameters()), config, first=0):
        pass
    row = finish(KEY, made, data, config)
    assert row["filter_correlation"] == pytest.approx(0.25, abs=0.08)
    assert row["filter_correlation_drawn"] == pytest.approx(row["filter_correlation"], rel=0.3)
    assert row["input_energy_correlation"] > 0.15
    assert row["input_energy_correlation_drawn"] > 0.5 * row["input_energy_correlation"]
    assert abs(row["input_correlation_drawn"]) < 0.05, "nothing is shared where nothing was"


def test_slices_share_their_latents_in_a_drawn_layer(data):
    made = model(data).eval()
    layer = Layer(7, 5, fan_in=20, fan_out=28)
    latents = made.prior(layer, 256, stream(0, "prior"))[: layer.count].reshape(7, 5, -1)
    each = made.each
    assert torch.equal(latents[:, :1, :each].expand(7, 5, each), latents[..., :each])
    assert torch.equal(latents[:1, :, each : 2 * each].expand(7, 5, each), latents[..., each : 2 * each])
    assert len(latents[..., 2 * each + 3 :].flatten(0, 1).unique(dim=0)) == 35
    assert torch.equal(made.draw(layer, stream(0, "draw")), made.draw(layer, stream(0, "draw")))


def test_layers_to_draw_are_those_of_all_networks_or_of_a_large_zoo_some(data, monkeypatch):
    source = LayerBatches(model(data), data.train)
    everything = source.layers(100)
    assert len(everything) == len(SHAPES) * NETWORKS
    monkeypatch.setattr(layers_module, "MOST", 2000)
    some = source.layers(100)
    assert 100 <= sum(each.count for each in some) < 100 + max(each.count for each in everything)
    assert set(some) <= set(everything)
    assert {each for count in range(100, 2000, 100) for each in source.layers(count)} == set(everything)
