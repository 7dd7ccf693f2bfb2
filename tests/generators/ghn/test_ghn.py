"""The GHN as a generator: reproducible members, every model accounted for, known spread and full rank."""

from __future__ import annotations

import copy
import hashlib
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

from collect.architectures import build
from generators import init, load, save
from generators.errors import CheckpointError, ConfigError
from generators.ghn import ghn as module
from generators.ghn.codes import interpolate_codes, member_noise
from generators.ghn.config import GHNConfig
from generators.ghn.ghn import GHN
from generators.initialiser import Request
from generators.inventory import inventory
from generators.statistics import measure

SMALL = GHNConfig(hidden=16, heads=2, layers=2, width=24, rank=6, cells=8)
NOISY = replace(SMALL, anchor=0.6, code=4)
IMAGE = torch.zeros(1, 1, 8, 8)


def network(name: str = "resnet-8-w4", classes: int = 10) -> nn.Module:
    return build(name, shape=(1, 8, 8), classes=classes)


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Text(nn.Module):
    """Token numbers to classes through an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(30, 8), nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, tokens):
        return self.head(self.lstm(self.embed(tokens))[0][:, -1])


# ---- members -----------------------------------------------------------------------------------------------------


def test_members_of_a_deterministic_ghn_are_equal():
    """All decoded tensors of all members, bit for bit; another seed changes nothing either."""
    ghn, model = GHN(SMALL), network()
    assert ghn.kind_name == "ghn"
    states = ghn.sample(model, 11, seed=1)
    for value in states.values():
        assert all(torch.equal(member, value[0]) for member in value)
    assert equal(states, ghn.sample(model, 11, seed=2))


@pytest.mark.parametrize("changes", [{"anchor": 0.5}, {"code": 4}, {"anchor": 0.5, "code": 4}])
def test_members_of_a_noise_ghn_differ(changes):
    """Every decoded tensor of every two of ten members (two blocks), by anchor or by code alone; so do seeds."""
    ghn, model = GHN(replace(SMALL, **changes)), network()
    assert ghn.kind_name == "noise-ghn"
    states, others = ghn.sample(model, 10, seed=1), ghn.sample(model, 10, seed=2)
    names = {name for group in ghn.plan(model, IMAGE).groups for name in group.names}
    assert len(names) >= 8
    for name in names:
        flat = torch.cat([states[name], others[name]]).flatten(1)
        assert torch.pdist(flat).min() > 0, name


@pytest.mark.parametrize("config", [SMALL, NOISY, replace(SMALL, code=4)], ids=["ghn", "noise-ghn", "code"])
@pytest.mark.parametrize("name", ["resnet-8-w4", "vit-2-w16", "mlp-2-w40"])
def test_member_3_of_5_is_member_3_of_50(config, name):
    """Bit for bit, and what `first=3` gives and `init(member=3)` writes; also member 49 in a block of its own."""
    ghn, model = GHN(config), network(name)
    five, fifty = ghn.sample(model, 5, seed=4), ghn.sample(model, 50, seed=4)
    for member in (3, 49):
        wanted = {key: value[member] for key, value in fifty.items()}
        alone = {key: value[0] for key, value in ghn.sample(model, 1, seed=4, first=member).items()}
        assert equal(alone, wanted)
        filled = copy.deepcopy(model)
        init(filled, ghn, seed=4, member=member)
        assert equal(filled.state_dict(), wanted)
    assert equal({key: value[3] for key, value in five.items()}, {key: value[3] for key, value in fifty.items()})


@pytest.mark.parametrize("numbers", [1, 10**4, 10**9])
def test_size_of_a_block_changes_no_weight(monkeypatch, numbers):
    """Members decoded one by one, in blocks, or eight at once agree to rounding with one `predict` of all."""
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", numbers)
    ghn, model = GHN(NOISY), network()
    states = ghn.sample(model, 9, seed=3)
    plan = ghn.plan(model, IMAGE)
    codes = torch.stack([ghn.code(3, member, len(plan.table.features)) for member in range(9)])
    with torch.no_grad():
        wanted = ghn.predict(plan, codes, member_noise(3, range(9)))
    for name, value in wanted.items():
        torch.testing.assert_close(states[name], value, rtol=1e-4, atol=1e-5)


PROCESS = """
import hashlib, torch
from collect.architectures import build
from generators.ghn.ghn import GHN, GHNConfig
ghn = GHN(GHNConfig(hidden=16, heads=2, layers=2, width=24, rank=6, cells=8, anchor=0.6, code=4))
states = ghn.sample(build("vit-2-w16", shape=(1, 8, 8), classes=10), 3, seed=9)
digest = hashlib.sha256()
for name in sorted(states):
    digest.update(states[name].numpy().tobytes())
print(digest.hexdigest())
"""


def test_another_process_gives_the_same_bits():
    """A fresh interpreter with another hash seed, against this one."""
    states = GHN(NOISY).sample(network("vit-2-w16"), 3, seed=9)
    digest = hashlib.sha256()
    for name in sorted(states):
        digest.update(states[name].numpy().tobytes())
    done = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True)
    assert done.stdout.strip() == digest.hexdigest(), done.stderr


def test_random_streams_of_the_caller_are_untouched():
    """Making, sampling and initialising draw nothing from the global stream, and do not depend on it."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ghn, model = GHN(NOISY), network()
    states = ghn.sample(model, 2)
    init(copy.deepcopy(model), ghn)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert equal(states, GHN(NOISY).sample(model, 2))
    assert not equal(states, GHN(replace(NOISY, seed=1)).sample(model, 2)), "the seed of the start values counts"


def test_saved_and_loaded_gives_the_same_bits(tmp_path):
    ghn = GHN(NOISY, name="mine")
    with torch.no_grad():
        for parameter in ghn.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save(ghn, tmp_path / "checkpoint")
    again = load(tmp_path / "checkpoint")
    assert again.config == NOISY and again.name == "mine" and isinstance(again, GHN)
    assert equal(ghn.sample(network(), 3, seed=2), again.sample(network(), 3, seed=2))


@pytest.mark.parametrize("name", ["resnet-8-w4", "vgg-4-w4", "mobilenet-3-w8", "vit-2-w16", "mlp-2-w8"])
def test_weights_do_not_depend_on_the_traced_inputs(name):
    """With the tracer's guess, with one image and with five: the same bits."""
    ghn, model = GHN(NOISY), network(name)
    guessed = ghn.sample(model, 1)
    for count in (1, 5):
        assert equal(guessed, ghn.sample(model, 1, example_inputs=torch.zeros(count, 1, 8, 8)))


# ---- formula -----------------------------------------------------------------------------------------------------


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
def test_spread_and_rank(config):
    """For wide and unseen shapes: He spread within sampling error, with an anchor full rank and distinct values."""
    ghn = GHN(config)
    model = nn.Sequential(
        nn.Conv2d(1, 48, 3), nn.ReLU(), nn.Conv2d(48, 48, 3, groups=48), nn.Conv2d(48, 33, 1), nn.ReLU(),
        nn.ConvTranspose2d(33, 24, 2), nn.Flatten(), nn.Linear(24 * 25, 120), nn.ReLU(), nn.Linear(120, 10),
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


# ---- any model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "resnet-14-w5",
        "resnet-44-w3",
        "vgg-9-w40",
        "mobilenet-7-w6",
        "mlp-9-w20",
        "mlp-1-w700",
        "vit-5-w48",
        "vit-1-w16",
    ],
)
@pytest.mark.parametrize("config", [SMALL, NOISY], ids=["ghn", "noise-ghn"])
def test_any_depth_and_width(name, config):
    """Every matrix of every family is generated, the rest named; the network gives finite logits that differ."""
    model = network(name)
    report = init(model, GHN(config), seed=1, example_inputs=IMAGE)
    assert len(report.generated) + len(report.fallbacks) + len(report.kept) == len(model.state_dict())
    matrices = {key for key, value in model.named_parameters() if value.dim() in (2, 4) and min(value.shape[:2]) > 1}
    assert matrices <= report.generated.keys()
    with torch.no_grad():
        logits = model(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert torch.isfinite(logits).all() and logits.std() > 0


def _torchvision(name):
    return lambda: (torchvision.models.get_model(name, weights=None), None)


@pytest.mark.parametrize(
    "make, least",
    [
        (_torchvision("resnet18"), 20),
        (_torchvision("mobilenet_v3_small"), 50),
        (lambda: (nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2,
                                        enable_nested_tensor=False), torch.zeros(1, 5, 16)), 7),
        (lambda: (Text(), torch.zeros(2, 4, dtype=torch.long)), 1),
    ],
    ids=["resnet18", "mobilenet_v3_small", "transformer", "lstm"],
)  # fmt: skip
def test_models_from_elsewhere_are_accounted_for(make, least):
    """Each tensor has one line in the report; left out matrices say why; nothing keeps its old value silently."""
    model, example = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = init(model, GHN(NOISY, name="mine"), example_inputs=example)
    assert {*report.generated, *report.fallbacks, *report.kept} == before.keys()
    mine = [name for name, source in report.generated.items() if source == "mine"]
    assert len(mine) >= least
    for name, info in ((info.name, info) for info in inventory(model)):
        if len(info.shape) >= 2 and name not in mine:
            assert "(" in report.fallbacks[name], "a fallback names its reason"
            assert any(word in report.fallbacks[name] for word in ("classes", "does not predict")), name
        if len(info.shape) >= 2:
            assert not torch.equal(model.state_dict()[name], before[name]), name
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_classifier_of_other_classes_falls_back_by_name():
    model = network(classes=4)
    report = init(model, GHN(SMALL))
    (head,) = [name for name, value in model.named_parameters() if value.shape == (4, 16)]
    assert "trained for 10 classes, this layer has 4" in report.fallbacks[head] and head not in report.generated


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.head(self.second(self.first(x).relu()).relu())

    model, example = Tied(), torch.zeros(1, 8)
    report = init(model, GHN(NOISY), example_inputs=example)
    assert model.second.weight is model.first.weight
    assert report.kept["second.weight"] == "tied to first.weight" and "first.weight" in report.generated
    states = GHN(NOISY).sample(model, 2, example_inputs=example)
    assert torch.equal(states["first.weight"], states["second.weight"])


def test_far_wider_models_get_a_note():
    """Beyond twice the widest of training; none below, and none if the training is not known."""
    for widest, noted in ((8, True), (16, False), (0, False)):
        notes = init(network("mlp-2-w32"), GHN(replace(SMALL, widest=widest), name="mine")).notes
        assert (notes == ("mine was trained on layers of up to 8 channels; this model has 32",)) is noted, widest
        assert bool(notes) is noted


def test_plans_are_kept_per_architecture(monkeypatch):
    """Traced anew, planned once; names, unused shapes and ties make another plan; old plans are dropped."""
    monkeypatch.setattr(module, "PLANS_KEPT", 3)
    ghn = GHN(SMALL)
    assert ghn.plan(network()) is ghn.plan(network())

    class WithSpare(nn.Sequential):
        def __init__(self, spare: int) -> None:
            super().__init__(nn.Linear(6, 10))
            self.spare = nn.Parameter(torch.randn(spare, spare))

        def forward(self, x):
            return self[0](x)

    for spare in (2, 3):  # the same graph, another tensor that no operation touches
        report = init(WithSpare(spare), ghn, example_inputs=torch.zeros(1, 6))
        assert "spare" in {*report.fallbacks, *report.kept}
    for width in range(4, 9):
        ghn.plan(network(f"mlp-1-w{width}"))
    assert len(ghn._plans) == 3


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
    ],
)
def test_impossible_configurations(changes, words):
    with pytest.raises(ConfigError, match=words):
        replace(SMALL, **changes)


def test_request_decides_the_member():
    """`propose` is the proposal of the member that the request names."""
    ghn, model = GHN(NOISY), network()
    request = Request(inventory(model), seed=2, member=6)
    one, many = ghn.propose(model, request), ghn.propose_stack(model, request, range(4, 8))
    assert equal(one.values, {name: value[2] for name, value in many.values.items()}) and one.sources == many.sources


# ---- codes and stacks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["node", "network"])
def test_members_of_given_codes(per):
    """Their own codes give the members bit for bit; those of other members give weights between neither."""
    ghn, model = GHN(replace(SMALL, code=4, code_per=per)), network("vit-2-w16")
    codes = ghn.codes(model, 11, seed=3)
    assert codes.shape == (11, len(ghn.plan(model).table.features) if per == "node" else 1, 4)
    assert equal(ghn.sample(model, 11, seed=3), ghn.sample(model, 11, seed=3, codes=codes))
    assert torch.equal(codes[6:9], ghn.codes(model, 3, seed=3, first=6))
    moved = ghn.sample(model, 3, seed=8, first=2, codes=codes[6:9])
    wanted = ghn.sample(model, 3, seed=3, first=6)
    for name in {name for group in ghn.plan(model).groups for name in group.names}:
        torch.testing.assert_close(moved[name], wanted[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(wanted[name][0], wanted[name][1])


def test_white_noise_stays_that_of_the_member_when_codes_are_given():
    """Two members of one code differ by their white noise alone."""
    ghn, model = GHN(NOISY), network()
    codes = ghn.codes(model, 1, seed=3).expand(2, -1, -1)
    states, (group, *_) = ghn.sample(model, 2, seed=3, codes=codes), ghn.plan(model).groups
    own = member_noise(3, range(2))(f"{group.names[0]}[0]", (2, *group.shape))
    difference = group.target_std * ghn.config.anchor * (own[0] - own[1])
    torch.testing.assert_close(
        states[group.names[0]][0] - states[group.names[0]][1], difference, rtol=1e-3, atol=1e-5
    )  # fmt: skip


def test_codes_per_network_are_the_same_for_all_nodes():
    """As `predict` has it for codes that were written out node by node."""
    ghn, model = GHN(replace(SMALL, code=4, code_per="network")), network()
    plan, codes = ghn.plan(model), ghn.codes(model, 2)
    one = ghn.predict(plan, codes, lambda _, shape: torch.zeros(shape))
    other = ghn.predict(plan, codes.expand(-1, len(plan.table.features), -1), lambda _, shape: torch.zeros(shape))
    assert equal(one, other)


def test_codes_that_do_not_fit():
    model = network()
    with pytest.raises(ConfigError, match="without noise codes"):
        GHN(replace(SMALL, anchor=0.5)).sample(model, 2, codes=torch.zeros(2, 1, 4))
    with pytest.raises(ConfigError, match=r"\(2, 1, 4\).*got \(3, 1, 4\)"):
        GHN(replace(NOISY, code_per="network")).sample(model, 2, codes=torch.zeros(3, 1, 4))
    with pytest.raises(ConfigError, match="code_per"):
        replace(SMALL, code_per="layer")


def test_interpolated_codes():
    """Ends exactly, equal angles on the way, lengths of codes (a straight way has 0.7 of it in the middle)."""
    first, second = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(4))
    way = interpolate_codes(first, second, [0.0, 0.25, 0.5, 0.75, 1.0])
    torch.testing.assert_close(way[[0, -1]], torch.stack([first, second]))
    unit = nn.functional.normalize(way.flatten(1), dim=1)
    angles = torch.acos((unit[1:] * unit[:-1]).sum(1))
    assert angles.std() < 0.05 * angles.mean()
    assert way.flatten(1).norm(dim=1).min() > 0.95 * min(first.norm(), second.norm())
    torch.testing.assert_close(interpolate_codes(first, 3 * first, [0.5])[0], 2 * first)


@pytest.mark.parametrize("name", ["resnet-8-w4", "vit-2-w16"])
def test_stack_for_vmap_against_a_loop(name):
    """An ensemble by vmap over functional_call gives the logits of networks loaded one by one, in eval and training."""
    ghn, model = GHN(NOISY), network(name)
    next(model.parameters()).requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters, buffers = ghn.sample(model, 3, seed=5, stacked=True)
    assert [key for key, _ in model.named_parameters()] == list(parameters)
    assert [value.requires_grad for value in parameters.values()] == [each.requires_grad for each in model.parameters()]
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    states = ghn.sample(model, 3, seed=5)
    for training in (False, True):
        model.train(training)
        stacked = torch.func.vmap(
            lambda own, rest: torch.func.functional_call(model, (own, rest), images), randomness="same"
        )(parameters, {key: value.clone() for key, value in buffers.items()})
        for member in range(3):
            alone = copy.deepcopy(model)
            alone.load_state_dict({key: value[member] for key, value in states.items()})
            torch.testing.assert_close(stacked[member], alone(images), rtol=1e-4, atol=1e-4)
    for value in (*parameters.values(), *buffers.values()):
        value.detach().zero_()
    assert equal(model.state_dict(), before), "nothing of the stack is the model's own"


# ---- where it runs -----------------------------------------------------------------------------------------------


def test_defaults_of_the_caller_change_no_weight():
    """Another default device or data type."""
    ghn, model = GHN(NOISY), network("vit-2-w16")
    wanted = ghn.sample(model, 2, seed=1)
    try:
        torch.set_default_dtype(torch.float64)
        assert equal(GHN(NOISY).sample(model, 2, seed=1), wanted)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert equal(GHN(NOISY).sample(model, 2, seed=1), wanted)


# ---- what is saved -----------------------------------------------------------------------------------------------


def test_collapsed_spectra_are_not_saved(tmp_path):
    """A GHN of rank 2 names a tensor, its figure and a probe; with enough white noise it is saved."""
    with pytest.raises(
        CheckpointError, match=r"weight \(.*\) .* probe model 'convnet' has stable rank 1\.\d+, under 3"
    ):
        save(GHN(replace(SMALL, rank=2)), tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())
    save(GHN(replace(SMALL, rank=2, anchor=0.9)), tmp_path / "checkpoint")
