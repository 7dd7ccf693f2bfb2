"""The decode plan: every parameter is decoded or left out with a reason."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from collect.architectures import build
from generators import init
from generators.ghn.plan import DecodePlan, decode_plan
from generators.graph import trace
from generators.inventory import inventory


def plan(model: nn.Module, *inputs: int, classes: int = 10, example=None) -> DecodePlan:
    graph = trace(model, torch.zeros(1, *inputs) if example is None else example)
    return decode_plan(graph, inventory(model, graph), classes=classes, distance_limit=4)


def decoded(made: DecodePlan) -> dict[str, list]:
    """Name -> the (group, block) pairs that make it."""
    found: dict[str, list] = {}
    for group in made.groups:
        for name, block in zip(group.names, group.blocks, strict=True):
            found.setdefault(name, []).append((group, block))
    return found


class Odd(nn.Module):
    """One of everything that a plan has to think about."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.volume = nn.Conv3d(1, 2, 3, padding=1)
        self.signal = nn.Conv1d(12, 12, 3, padding=1, groups=12)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.pair = nn.Bilinear(6, 6, 6)
        self.experts = nn.Parameter(torch.randn(5, 6, 6))
        self.tied, self.free = nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied.weight = self.free.weight
        self.unused = nn.Linear(3, 3)
        self.scale = nn.LayerNorm(6)
        self.head = nn.Linear(6, 10)

    def forward(self, tokens):
        x = self.embed(tokens)
        x, _ = self.attention(x, x, x, need_weights=False)
        x = self.signal(x.transpose(1, 2))
        x = self.up(x[..., None]).mean((2, 3)) + self.volume(x[:, None, :, :, None])[:, :1].mean()
        x = self.free(self.tied(self.pair(x, x))).relu()
        x = torch.einsum("ni,eij->nj", x, self.experts)
        return self.head(self.scale(x))


@pytest.fixture(scope="module")
def odd():
    return plan(Odd(), example=torch.zeros(2, 4, dtype=torch.long))


def test_every_parameter_has_one_place(odd):
    """Decoded and left out are disjoint and together all names; blocks of a parameter are complete and in order."""
    found = decoded(odd)
    names = [name for name, _ in Odd().named_parameters(remove_duplicate=False)]
    assert sorted([*found, *odd.left_out]) == sorted(names)
    assert all(reason for reason in odd.left_out.values())
    for name, places in found.items():
        info = odd.found[name]
        assert [block for _, block in places] == list(range(info.blocks)), name
        group = places[0][0]
        assert (group.outputs * info.blocks, *group.shape[1:]) == info.shape, name
        assert group.fan_in == info.fan_in, name
        assert odd.table.features[group.nodes].shape[0] == len(group.names)
    sizes = [math.prod(odd.found[name].shape) for name in found]
    assert odd.numel == sum(sizes)


def test_reasons(odd):
    assert set(decoded(odd)) == {
        "attention.in_proj_weight", "attention.out_proj.weight", "signal.weight", "up.weight", "tied.weight",
        "head.weight",
    }  # fmt: skip
    reasons = odd.left_out
    assert reasons["embed.weight"] == "the GHN does not predict embedding"
    assert reasons["head.bias"] == "the GHN does not predict linear_bias"
    assert reasons["free.weight"] == "tied to tied.weight"
    assert "kernels of 3 axes" in reasons["volume.weight"]
    assert "(6, 6, 6)" in reasons["pair.weight"]
    assert "experts" in reasons
    assert reasons["unused.weight"] == "no operation of the traced graph consumes it"
    assert len(decoded(odd)["attention.in_proj_weight"]) == 3


def test_stacked_experts_are_left_out():
    """A free weight of eight matrices has no rows and columns that the decoder knows."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 6, 6))
            self.head = nn.Linear(6, 10)

        def forward(self, x):
            return self.head(torch.bmm(x, self.weight).relu().mean(0))

    made = plan(Experts(), example=torch.zeros(8, 2, 6))
    assert set(decoded(made)) == {"head.weight"} and "(8, 6, 6)" in made.left_out["weight"]


def test_what_has_no_entries_is_left_out():
    """On both sides of a layer of width 0; the spread of a matrix without inputs is a number."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 0), nn.Linear(0, 10))
    made = plan(model, 8)
    assert set(decoded(made)) == {"0.weight"}
    assert made.left_out["1.weight"] == made.left_out["2.weight"] == "it has no entries"
    (group,) = made.groups
    assert math.isfinite(replace(group, fan_in=0).target_std)
    for spec in ("noise-ghn-digits", "ghn-digits", "conv-vae-digits"):
        report = init(model, spec, example_inputs=torch.zeros(2, 8))
        assert report.fallbacks["1.weight"] == report.fallbacks["2.weight"] == "he (it has no entries)"


def test_classifier_falls_back_by_name_for_other_classes():
    model = build("resnet-8-w4", shape=(1, 8, 8), classes=7)
    head = next(name for name, value in model.named_parameters() if value.shape[0] == 7 and value.dim() == 2)
    assert plan(model, 1, 8, 8, classes=10).left_out[head] == "the GHN was trained for 10 classes, this layer has 7"
    made = plan(model, 1, 8, 8, classes=7)
    ((group, _),) = decoded(made)[head]
    assert group.output and group.outputs == 7 and head not in made.left_out


def test_output_that_is_stored_input_first_is_left_out():
    """Its rows are not classes, whatever their number is."""
    model = nn.Sequential(nn.Conv2d(1, 10, 3), nn.ReLU(), nn.ConvTranspose2d(10, 4, 2))
    made = plan(model, 1, 8, 8, classes=10)
    assert set(decoded(made)) == {"0.weight"} and "input-first" in made.left_out["2.weight"]


def test_spread_is_he_of_the_inventory():
    """Every target's spread is that of the inventory: fan-in per group, transposed, gain 1 for classifiers."""
    models = [build(name, shape=(1, 8, 8), classes=10) for name in ("mobilenet-3-w8", "vit-2-w32", "mlp-2-w16")]
    upwards = nn.Sequential(nn.ConvTranspose2d(1, 6, 2, groups=1), nn.Flatten(), nn.Linear(6 * 81, 10))
    for model in [*models, upwards]:
        made = plan(model, 1, 8, 8)
        for name, places in decoded(made).items():
            assert places[0][0].target_std == pytest.approx(made.found[name].he_std), name
    depthwise = [
        name for name, places in decoded(plan(models[0], 1, 8, 8)).items() if places[0][0].shape[1:] == (1, 3, 3)
    ]
    assert len(depthwise) >= 3
    (((head, _),),) = [places for places in decoded(plan(models[2], 1, 8, 8)).values() if places[0][0].output]
    assert head.target_std == pytest.approx(math.sqrt(1 / head.fan_in))


def test_equal_shapes_are_decoded_together():
    """A ResNet-20 has seven groups: stem, three stages, two first convolutions of a stage, classifier."""
    made = plan(build("resnet-20-w16", shape=(1, 8, 8), classes=10), 1, 8, 8)
    assert sorted(len(group.names) for group in made.groups) == [1, 1, 1, 1, 5, 5, 6]
    nodes = torch.cat([group.nodes for group in made.groups])
    assert len(nodes.unique()) == len(nodes) == 20, "every layer has a node of its own"
