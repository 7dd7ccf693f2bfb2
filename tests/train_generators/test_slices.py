"""Slices of a real zoo against slow loops over state dicts; networks split, not slices."""

from __future__ import annotations

import math

import pytest
import torch

from collect import data, zoo_file
from collect.population import train
from collect.recipe import Recipe
from collect.zoo import Zoo
from train_generators.slices import read_groups

SIZES = dict(patch=8, depth_buckets=3, slices_per_tensor=4096, seed=0)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Eight ResNets and four MLPs, briefly trained on digits."""
    folder, images = tmp_path_factory.mktemp("zoo"), data.load("digits")
    for architecture, lr, seeds in (("resnet-8-w8", 0.1, range(8)), ("mlp-2-w32", 0.02, range(4))):
        zoo_file.write(train(Recipe(architecture=architecture, lr=lr, epochs=1), list(seeds), images), folder)
    return Zoo(folder)


def test_slices_equal_those_of_a_slow_loop_over_state_dicts(zoo):
    zoo = zoo.where(architecture="resnet-8-w8", init="he")
    groups = read_groups(zoo, **SIZES)
    expected: dict[tuple[int, bool], list[torch.Tensor]] = {}
    for index, run in enumerate(zoo.runs):
        kernels = [value for value in zoo.state_dict(index).values() if value.dim() == 4]
        owners = len({name.rpartition(".")[0] for name in dict(zoo.module(index).named_parameters())})
        names = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in zoo.module(index).named_parameters()))
        positions = [names.index(name[: -len(".weight")]) for name, v in zoo.state_dict(index).items() if v.dim() == 4]
        for value, position in zip(kernels, positions, strict=True):
            bucket = min(int(position / (owners - 1) * 3), 2)
            scaled = value / value.square().mean().sqrt()
            slices = torch.stack([scaled[o, i] for o in range(len(value)) for i in range(value.shape[1])])
            expected.setdefault((bucket, run["split"] != "train"), []).append(slices)
    assert {str(key) for key in groups} == {f"conv_weight-3x3-{bucket}" for bucket, _ in expected}
    for key, group in groups.items():
        for held_out, found in ((False, group.train), (True, group.held_out)):
            wanted = expected.get((key.bucket, held_out), [])
            assert len(found) == len(wanted)
            assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))


def test_networks_are_split_and_the_gain_is_that_of_the_training_ones(zoo):
    for key, group in read_groups(zoo, **SIZES).items():
        assert not group.train_runs & group.held_out_runs
        assert {zoo.split_of(run) for run in group.train_runs} == {"train"}
        assert "train" not in {zoo.split_of(run) for run in group.held_out_runs}
        assert 0.5 < group.gain < 3, key
    zoo_powers = [
        math.prod(spec.shape[1:]) / 2 * float((values**2).mean())
        for run, _, spec, depth, values in zoo.tensors(role="conv_weight", kernel=(3, 3))
        if depth < 1 / 3 and zoo.split_of(run) == "train"
    ]
    group = next(group for key, group in read_groups(zoo, **SIZES).items() if str(key) == "conv_weight-3x3-0")
    assert group.gain == pytest.approx(math.sqrt(sum(zoo_powers) / len(zoo_powers)), rel=1e-5)


def test_a_limit_per_tensor_takes_different_slices_and_the_same_every_time(zoo):
    zoo = zoo.where(architecture="resnet-8-w8", init="he")
    few = SIZES | {"slices_per_tensor": 50}
    first, second = read_groups(zoo, **few), read_groups(zoo, **few)
    for key in first:
        assert max(map(len, first[key].train)) <= 50
        assert all(torch.equal(a, b) for a, b in zip(first[key].train, second[key].train, strict=True))
        assert all(len(torch.unique(slices.flatten(1), dim=0)) == len(slices) for slices in first[key].train)


def test_dense_layers_give_row_patches_but_the_classifier_does_not(zoo):
    groups = read_groups(zoo.where(architecture="mlp-2-w32"), **SIZES)
    assert {str(key) for key in groups} == {"matrix-1x8-0", "matrix-1x8-1"}
    first = next(values for _, _, spec, _, values in zoo.tensors(role="linear_weight") if spec.shape == (32, 64))
    group = next(iter(groups.values()))
    scaled = torch.from_numpy(first.copy()) / math.sqrt((first**2).mean())
    slices = [*group.train, *group.held_out]
    assert any(torch.allclose(found[9, 0], scaled[1, 8:16]) for found in slices if len(found) == 32 * 8)
