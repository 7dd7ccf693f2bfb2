"""Slices of a real zoo against slow loops over state dicts; networks split, not slices."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from collect import data, zoo_file
from collect.population import train
from collect.recipe import Recipe
from collect.zoo import Zoo
from generators.errors import ConfigError
from generators.local.groups import GroupKey
from train_generators.slices import SliceGroup, open_groups

SIZES = dict(patch=8, depth_buckets=3, slices_per_tensor=4096)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Eight ResNets and four MLPs, briefly trained on digits."""
    folder, images = tmp_path_factory.mktemp("zoo"), data.load("digits")
    for architecture, lr, seeds in (("resnet-8-w8", 0.1, range(8)), ("mlp-2-w32", 0.02, range(4))):
        zoo_file.write(train(Recipe(architecture=architecture, lr=lr, epochs=1), list(seeds), images), folder)
    return Zoo(folder)


def test_slices_equal_those_of_a_slow_loop_over_state_dicts(zoo):
    zoo = zoo.where(architecture="resnet-8-w8", init="he")
    groups = open_groups(zoo, **SIZES)
    expected: dict[tuple[int, str], dict[tuple[str, str], torch.Tensor]] = {}
    for index, run in enumerate(zoo.runs):
        named = list(zoo.module(index).named_parameters())
        owners = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in named))
        for name, value in named:
            if value.dim() == 4:
                bucket = min(int(owners.index(name[: -len(".weight")]) / (len(owners) - 1) * 3), 2)
                scaled = value.detach() / value.detach().square().mean().sqrt()
                slices = torch.stack([scaled[o, i] for o in range(len(value)) for i in range(value.shape[1])])
                side = "train" if run["split"] == "train" else "held_out"
                expected.setdefault((bucket, side), {})[run["id"], name] = slices
    assert {str(key) for key in groups} == {f"conv_weight-3x3-{bucket}" for bucket, _ in expected}
    for key, group in groups.items():
        for side in ("train", "held_out"):
            found = {(each.network, each.name): each.slices for each in getattr(group, side).tensors()}
            wanted = expected.get((key.bucket, side), {})
            assert found.keys() == wanted.keys()
            assert all(torch.allclose(found[name], wanted[name]) for name in wanted)


def test_networks_are_split_and_the_gain_is_that_of_the_training_ones(zoo):
    groups = open_groups(zoo, **SIZES)
    for key, group in groups.items():
        assert not set(group.train.networks) & set(group.held_out.networks)
        assert {zoo.split_of(run) for run in group.train.networks} == {"train"}
        assert "train" not in {zoo.split_of(run) for run in group.held_out.networks}
        assert 0.5 < group.gain < 3, key
    chosen = [
        (math.prod(spec.shape[1:]) / 2, float((values**2).mean()))
        for run, _, spec, depth, values in zoo.tensors(role="conv_weight", kernel=(3, 3))
        if depth < 1 / 3 and zoo.split_of(run) == "train"
    ]
    group = groups[GroupKey("conv_weight", (3, 3), 0)]
    assert group.gain == pytest.approx(math.sqrt(sum(fan * power for fan, power in chosen) / len(chosen)), rel=1e-5)
    assert group.std == pytest.approx(math.sqrt(sum(power for _, power in chosen) / len(chosen)), rel=1e-5)


def test_the_sides_of_a_two_sample_test_share_no_network(zoo):
    group = open_groups(zoo, **SIZES)[GroupKey("conv_weight", (3, 3), 0)]
    train, held_out = set(group.train.networks), set(group.held_out.networks)
    one, none = group.held_out.of(sorted(held_out)[:1]), group.held_out.of([])
    for case, allowed in ((group, held_out), (SliceGroup(group.train, one), train | held_out),
                          (SliceGroup(group.train, none), train)):  # fmt: skip
        first, second = (set(side.networks) for side in case.sides())
        assert first and second and not first & second and first | second <= allowed
    assert len(held_out) > 1 and [len(side.networks) for side in SliceGroup(none, one).sides()] == [1, 0]


def test_the_view_of_a_zoo_is_what_is_read(zoo):
    """Chosen runs that do not lie side by side in their file."""
    some = zoo.where(seed=[1, 2, 5])
    for group in open_groups(some, **SIZES).values():
        assert set(group.train.networks) | set(group.held_out.networks) <= set(some.column("id").tolist())
    ids = {run["id"] for run in zoo.where(architecture="resnet-8-w8").runs}
    whole = open_groups(zoo, **SIZES)[GroupKey("conv_weight", (3, 3), 1)]
    part = open_groups(some, **SIZES)[GroupKey("conv_weight", (3, 3), 1)]
    kept = [run for run in whole.train.networks if run in set(some.column("id").tolist())]
    assert kept and set(whole.train.networks) <= ids
    assert torch.equal(part.train.in_ram(), whole.train.of(kept).in_ram())


def test_pruning_leaves_the_gain_and_takes_a_share_of_every_tensor(zoo):
    zoo = zoo.where(architecture="resnet-8-w8", init="he")
    whole, pruned = open_groups(zoo, **SIZES), open_groups(zoo, **SIZES, prune=0.25)
    for key, group in pruned.items():
        assert group.gain == whole[key].gain and group.std == whole[key].std
        for before, after in zip(whole[key].train.tensors(), group.train.tensors(), strict=True):
            assert len(after.slices) == len(before.slices) - len(before.slices) // 4
            assert after.slices.square().mean().item() == pytest.approx(1, rel=1e-5)
    with pytest.raises(ConfigError, match=r"in \[0, 1\), got 1.5"):
        open_groups(zoo, **SIZES, prune=1.5)


def test_tensors_without_a_size_are_left_out_and_named(tmp_path, caplog):
    trained = train(Recipe(architecture="resnet-8-w8", epochs=1), [0, 1, 2], data.load("digits"))
    spec = trained.layout[3]
    weights = trained.weights.copy()
    weights[0, :, spec.offset : spec.offset + spec.length] = 0.0
    weights[1, :, spec.offset + 5] = math.nan
    zoo_file.write(dataclasses.replace(trained, weights=weights), tmp_path)
    groups = open_groups(Zoo(tmp_path), **SIZES)
    assert len(spec.shape) == 4 and caplog.text.count(f"{spec.name} is") == 2
    assert f"{spec.name} is all zero and is left out" in caplog.text and f"{spec.name} is not finite" in caplog.text
    found = [each for group in groups.values() for side in (group.train, group.held_out) for each in side.tensors()]
    assert sum(each.name == spec.name for each in found) == 1
    assert all(each.slices.isfinite().all() for each in found)


def test_a_limit_per_tensor_takes_different_slices_and_the_same_every_time(zoo):
    zoo = zoo.where(architecture="resnet-8-w8", init="he")
    few = SIZES | {"slices_per_tensor": 50}
    first, second = open_groups(zoo, **few), open_groups(zoo, **few)
    for key in first:
        tensors = [tensor.slices for tensor in first[key].train.tensors(seed=4)]
        assert max(map(len, tensors)) <= 50
        assert torch.equal(torch.cat(tensors), second[key].train.in_ram(seed=4))
        assert all(len(torch.unique(slices.flatten(1), dim=0)) == len(slices) for slices in tensors)


def test_dense_layers_give_row_patches_but_the_classifier_does_not(zoo):
    groups = open_groups(zoo.where(architecture="mlp-2-w32"), **SIZES)
    assert {str(key) for key in groups} == {"matrix-1x8-0", "matrix-1x8-1"}
    first = next(values for _, _, spec, _, values in zoo.tensors(role="linear_weight") if spec.shape == (32, 64))
    group = next(iter(groups.values()))
    scaled = torch.from_numpy(first.copy()) / math.sqrt((first**2).mean())
    slices = [each.slices for side in (group.train, group.held_out) for each in side.tensors()]
    assert any(torch.allclose(found[9, 0], scaled[1, 8:16]) for found in slices if len(found) == 32 * 8)
