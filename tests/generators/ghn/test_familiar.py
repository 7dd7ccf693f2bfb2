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
from generators.inventory import inventory
from small_ghn import network

IMAGES = ("convolution", "classifier")
SMALL = GHNConfig(hidden=16, heads=2, layers=1, width=16, rank=6, cells=8, anchor=0.5, code=4)


def weights(model: nn.Module) -> list:
    return [info for info in inventory(model) if len(info.shape) > 1]


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


@pytest.mark.parametrize("name", ["resnet-8-w4", "vgg-4-w4", "cnn-2-w4"])
def test_known_families_are_known(name):
    assert strange(weights(network(name)), IMAGES) == {}


@pytest.mark.parametrize("name", ["vit-2-w16", "mobilenet-4-w8", "mlp-2-w16"])
def test_all_is_left_where_much_is_strange(name):
    """With a reason of its own for what was met; of a GHN that does not know what it met, nothing is strange."""
    found = strange(weights(network(name)), IMAGES)
    assert found.keys() == {info.name for info in weights(network(name))}
    assert len({*found.values()}) >= 2 and any("would not fit the rest" in because for because in found.values())
    assert strange(weights(network(name)), ()) == {}


def test_a_few_strange_layers_are_left_alone():
    """A hidden linear layer behind six convolutions: it goes, they stay. Behind a single one it is too much."""
    for depth, alone in ((6, True), (1, False)):
        convolutions = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(depth)]
        model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 10))
        found = strange(weights(model), IMAGES)
        hidden = f"{depth + 1}.weight"
        assert found[hidden] == "the GHN met no linear layer in its training"
        assert (set(found) == {hidden}) is alone


def test_what_is_left_is_he():
    """In a transformer every tensor, with the draws of `he` and its reason; in a ResNet the rule moves nothing."""
    knowing = GHN(replace(SMALL, met=IMAGES), name="knowing")
    for name, left in (("vit-2-w16", True), ("resnet-8-w4", False)):
        model, other = network(name), network(name)
        report = init(model, knowing, seed=4)
        init(other, "he" if left else GHN(SMALL), seed=4)
        assert bool(report.generated) is not left and ("met no attention" in str(report)) is left
        for key, value in model.named_parameters():
            assert torch.equal(value, dict(other.named_parameters())[key]), key
