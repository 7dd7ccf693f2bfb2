"""Which layers of which networks a GHN takes for known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from generators import init
from generators.ghn.config import GHNConfig
from generators.ghn.familiar import sort_of, strange
from generators.ghn.ghn import GHN
from generators.graph import Graph, trace
from generators.inventory import ParameterInfo, inventory
from small_ghn import IMAGE, network

IMAGES = ("convolution", "classifier")
SMALL = GHNConfig(hidden=16, heads=2, layers=1, width=16, rank=6, cells=8, anchor=0.5, code=4)


def weights(model: nn.Module, graph: Graph | None = None) -> list[ParameterInfo]:
    return [info for info in inventory(model, graph) if len(info.shape) > 1]


class Sorts(nn.Module):
    """A layer of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.signal, self.plain = nn.Conv1d(12, 12, 3, groups=12), nn.Conv2d(12, 12, 3)
        self.up, self.depthwise = nn.ConvTranspose2d(12, 6, 2), nn.Conv2d(6, 6, 3, groups=6)
        self.attention, self.hidden = nn.MultiheadAttention(6, 2), nn.Linear(6, 6)
        self.head = nn.Linear(6, 10)


def test_sorts():
    assert {info.name: sort_of(info) for info in weights(Sorts())} == {
        "signal.weight": "grouped 1-D convolution", "plain.weight": "convolution",
        "up.weight": "transposed convolution", "depthwise.weight": "grouped convolution",
        "attention.in_proj_weight": "attention", "attention.out_proj.weight": "linear layer",
        "hidden.weight": "linear layer", "head.weight": "classifier",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, left",
    [
        ("resnet-8-w4", set()), ("vgg-4-w4", set()), ("cnn-2-w4", set()), ("mlp-2-w16", {"linear layer"}),
        ("mobilenet-4-w8", {"grouped convolution"}), ("vit-2-w16", {"attention", "linear layer"}),
    ],
)  # fmt: skip
def test_what_a_ghn_of_convolutions_leaves(name, left):
    """With the sort in the reason; if it is not known what was met, nothing."""
    made = weights(network(name), trace(network(name), IMAGE))
    found = {info.name: strange(info, IMAGES) for info in made}
    reasons = {f"the GHN met no {sort} in its training" for sort in left}
    assert {*found.values()} == reasons | {None}
    assert all(strange(info, ()) is None for info in made)


def test_what_is_left_is_he():
    """With the draws of `he` and its reason in the report; the rest is as without the rule."""
    for name, some in (("vit-2-w16", True), ("resnet-8-w4", False)):
        model, other, he = (network(name) for _ in range(3))
        report = init(model, GHN(replace(SMALL, met=IMAGES)), seed=4)
        init(other, GHN(SMALL), seed=4)
        init(he, "he", seed=4)
        left = {key for key, because in report.fallbacks.items() if "in its training" in because}
        assert bool(left) is some and ("met no attention" in str(report)) is some and report.generated
        wanted, without = dict(he.named_parameters()), dict(other.named_parameters())
        for key, value in model.named_parameters():
            assert torch.equal(value, (wanted if key in left else without)[key]), key
            assert key not in left or not torch.equal(value, without[key]), key
