"""The GHN as a generator: what it writes is its formula, of known spread and full rank, and can be learned."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from generators import save
from generators.errors import CheckpointError, ConfigError
from generators.ghn import ghn as module
from generators.ghn.codes import member_noise
from generators.ghn.ghn import GHN
from generators.statistics import measure
from small_ghn import IMAGE, NOISY, SMALL, equal, network
from small_models import InputFirst, attention_block


@pytest.mark.parametrize("name", ["resnet-8-w4", "vit-2-w16", "mobilenet-3-w8"])
def test_what_is_written_is_the_formula(name):
    """W = he_std * (anchor * eps + sqrt(1 - anchor^2) * decoded) for each tensor, block by block, member by member."""
    ghn, model = GHN(replace(NOISY, gain_bound=2.0)), network(name)
    plan, anchor = ghn.plan(model, IMAGE), ghn.config.anchor
    with torch.no_grad():
        ghn.decoder.gain.weight.normal_(generator=torch.Generator().manual_seed(2))
        states = ghn.sample(model, 2, seed=8, first=5)
        hidden = ghn.encoder(plan.table)
        for index, member in enumerate((5, 6)):
            vectors = torch.cat([hidden, ghn.code(8, member, len(hidden))], dim=1)[None]
            for group in plan.groups:
                decoded = ghn.decoder(group, vectors)[0]
                for target, (key, block) in enumerate(zip(group.names, group.blocks, strict=True)):
                    eps = member_noise(8, range(member, member + 1))(f"{key}[{block}]", (1, *group.shape))[0]
                    wanted = group.target_std * (anchor * eps + math.sqrt(1 - anchor**2) * decoded[target])
                    rows = slice(block * group.outputs, (block + 1) * group.outputs)
                    atol = 1e-5 * group.target_std
                    torch.testing.assert_close(states[key][index][rows], wanted, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("config", [NOISY, replace(SMALL, anchor=0.3), replace(SMALL, rank=2)], ids=str)
def test_spread_and_rank(config, monkeypatch):
    """For wide and unseen shapes: He spread within sampling error, with an anchor full rank and distinct values.

    As decoded: the last five layers have no normalisation, and would be rescaled.
    """
    monkeypatch.setattr(module, "rescale", lambda *_, **__: None)
    ghn = GHN(config)
    model = nn.Sequential(
        nn.Conv2d(1, 48, 3), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 48, 3, groups=48), nn.Conv2d(48, 33, 1),
        nn.ReLU(), nn.ConvTranspose2d(33, 24, 2), nn.Flatten(), nn.Linear(24 * 25, 120), nn.ReLU(), nn.Linear(120, 10),
    )  # fmt: skip
    states = ghn.sample(model, 1, example_inputs=IMAGE)
    groups = {name: group for group in ghn.plan(model, IMAGE).groups for name in group.names}
    assert len(groups) == 6
    for name, group in groups.items():
        value = states[name][0]
        rms = value.square().mean().sqrt().item() / group.target_std
        assert abs(rms - 1) < (6 / math.sqrt(value.numel()) if config.anchor else 1e-4), name
        if config.anchor:
            row = measure(value, group.target_std)
            assert row.numeric_rank == row.rank_limit and row.distinct_share > 0.99, name


def test_query_key_and_value_differ():
    """The three matrices of attention weights, stacked by torch's module or fused in a linear layer."""
    for model, example in (
        (network("vit-2-w16"), IMAGE),
        (nn.TransformerEncoderLayer(16, 2, 32), torch.zeros(3, 1, 16)),
    ):
        ghn = GHN(SMALL)
        stacked = [name for group in ghn.plan(model, example).groups for name, block in
                   zip(group.names, group.blocks, strict=True) if block == 2]  # fmt: skip
        states = ghn.sample(model, 1, example_inputs=example)
        assert stacked
        for name in stacked:
            q, k, v = states[name][0].chunk(3)
            for one, other in ((q, k), (k, v), (q, v)):
                assert (one - other).norm() > 0.1 * one.norm(), name


@pytest.mark.parametrize("limit", [0.0, 0.5])
@pytest.mark.parametrize("decoder", ["core", "block"])
def test_query_key_and_value_that_are_stored_input_first(decoder, limit):
    """They stand side by side, each a matrix of its own with He's spread; written as `predict` gives them."""
    ghn, example = GHN(replace(NOISY, decoder=decoder, decoded_limit=limit)), torch.zeros(1, 5, 32)
    model = attention_block(fused=True, width=32, linear=InputFirst)
    plan = ghn.plan(model, example)
    weight = ghn.sample(model, 2, seed=3, example_inputs=example)["qkv.weight"]
    codes = torch.stack([ghn.code(3, member, ghn.code_nodes(plan)) for member in range(2)])
    with torch.no_grad():
        wanted = ghn.predict(plan, codes, member_noise(3, range(2)))["qkv.weight"]
    torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-6)
    for matrices in weight.unbind():
        q, k, v = matrices.chunk(3, dim=1)
        for one, other in ((q, k), (k, v), (q, v)):
            assert (one - other).norm() > 0.1 * one.norm()
            assert one.std().item() == pytest.approx(math.sqrt(2 / 32), rel=0.1)


def test_gradients_reach_the_whole_ghn():
    """`predict` is differentiable to every parameter through a model that has all sorts of layers."""
    ghn, model = GHN(replace(NOISY, gain_bound=2.0)), network("vit-2-w16")
    plan = ghn.plan(model, IMAGE)
    codes = torch.randn(2, len(plan.table.features), 4, generator=torch.Generator().manual_seed(1))
    decoded = ghn.predict(plan, codes, lambda _, shape: torch.zeros(shape))
    torch.stack([(value**3).sum() for value in decoded.values()]).sum().backward()
    for name, parameter in ghn.named_parameters():
        if "lin_skip" not in name:  # torch-geometric makes it and, without root weight, does not use it
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    for layer in (ghn.encoder.sine, ghn.encoder.relations):
        assert layer.weight.grad is not None and layer.weight.grad.abs().max() > 0


def test_sampled_in_inference_mode_and_trained_after():
    """What is kept of the first does not stand in the way of the second, and the bits are those of any other mode."""
    ghn, model = GHN(NOISY), network("vit-1-w16")
    with torch.inference_mode():
        found = ghn.sample(model, 2)
    assert equal(found, GHN(NOISY).sample(model, 2)) and not any(value.requires_grad for value in found.values())
    plan = ghn.plan(model)
    decoded = ghn.predict(plan, torch.zeros(1, ghn.code_nodes(plan), 4), member_noise(0, range(1)))
    torch.stack([value.sum() for value in decoded.values()]).sum().backward()
    assert ghn.decoder.head.weight.grad is not None


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"anchor": 1.0}, "anchor"),
        ({"anchor": -0.1}, "anchor"),
        ({"classes": 0}, "at least 1"),
        ({"hidden": 10, "heads": 4}, "divisible"),
        ({"heads": 0}, "at least 1"),
        ({"rank": 16, "cells": 8}, "rank"),
        ({"gain_bound": 0.5}, "gain_bound"),
        ({"code": -1}, "negative"),
        ({"layers": -1}, "negative"),
        ({"spectrum_steps": -1}, "negative"),
        ({"decoded_limit": -1.0, "anchor": 0.5}, "decoded_limit"),
        ({"decoded_limit": 1.0}, "needs an anchor"),
    ],
)
def test_impossible_configurations(changes, words):
    with pytest.raises(ConfigError, match=words):
        replace(SMALL, **changes)


def test_collapsed_spectra_are_not_saved(tmp_path):
    """A GHN of rank 2 names a tensor, its figure and a probe; with enough white noise it is saved."""
    with pytest.raises(CheckpointError, match=r"weight \(.*\) .* model 'convnet' has stable rank 1\.\d+, under 3"):
        save(GHN(replace(SMALL, rank=2)), tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())
    save(GHN(replace(SMALL, rank=2, anchor=0.9)), tmp_path / "checkpoint")
