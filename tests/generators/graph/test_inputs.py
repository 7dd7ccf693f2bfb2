"""Inputs, given and guessed: several and nested ones, and the models that must be covered without any."""

from __future__ import annotations

import cProfile
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from generators.graph import trace
from small_models import Forward, attention_block, rows


@dataclass
class Result:
    logits: Tensor
    states: list[Tensor]


def test_several_nested_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(5, 3), nn.Linear(3, 2)

        def forward(self, pair, *, options, flag=None):
            x = self.a(pair[0]) - self.b(options["y"])
            return {"result": Result(self.c(x), [x, pair[1]])}

    inputs = {"pair": (torch.zeros(2, 4), torch.zeros(1)), "options": {"y": torch.zeros(2, 5)}}
    graph = trace(Two(), inputs)
    assert [row[0] for row in rows(graph)] == ["input"] * 3 + ["linear", "linear", "add", "linear", "output"]
    assert graph.predecessors[7] == (6, 5, 1)


def test_pairs_are_guessed():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = (
                nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 8)),
                nn.Linear(16, 1),
            )

        def forward(self, first, second):
            return self.head(torch.cat([self.body(first), self.body(second)], 1))

    assert trace(Pair()).unused == ()


def text_model() -> nn.Module:
    return Forward(lambda m, x: m.head(m.rnn(m.words(x))[0][:, -1]), words=nn.Embedding(50, 16),
                   rnn=nn.LSTM(16, 12, batch_first=True), head=nn.Linear(12, 3))  # fmt: skip


class Transformer(nn.Module):
    """A GPT in small: learned positions, causal attention, tied head."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 8), nn.Embedding(32, 8)
        self.blocks = nn.ModuleList(attention_block(True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 50, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("mask", torch.ones(32, 32).tril().bool())

    def forward(self, ids, targets=None):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)), None if targets is None else F.cross_entropy(x.flatten(0, 1), targets.flatten())


ENCODER = {"d_model": 16, "nhead": 4, "dim_feedforward": 32, "batch_first": True}
COVERED = {
    "resnet18": (partial(torchvision.models.get_model, "resnet18"), 51),
    "vit_b_16": (partial(torchvision.models.get_model, "vit_b_16"), 117),
    "convnext_tiny": (partial(torchvision.models.get_model, "convnext_tiny"), 138),
    "efficientnet_b0": (partial(torchvision.models.get_model, "efficientnet_b0"), 158),
    "densenet121": (partial(torchvision.models.get_model, "densenet121"), 302),
    "swin_t": (partial(torchvision.models.get_model, "swin_t"), 156),
    "mobilenet_v3_small": (partial(torchvision.models.get_model, "mobilenet_v3_small"), 105),
    "googlenet": (partial(torchvision.models.get_model, "googlenet", init_weights=False), 134),
    "inception_v3": (partial(torchvision.models.get_model, "inception_v3", init_weights=False), 211),
    "text": (text_model, 5),
    "gpt": (Transformer, 17),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**ENCODER), 2), 20),
    "transformer": (lambda: nn.Transformer(16, 4, 1, 1, 32), 28),
    "signal": (lambda: nn.Sequential(nn.Conv1d(2, 8, 9, 4), nn.BatchNorm1d(8), nn.PReLU(), nn.AdaptiveAvgPool1d(1),
                                     nn.Flatten(), nn.Linear(8, 5)), 6),
    "volume": (lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.InstanceNorm3d(4, affine=True)), 4),
    "digits": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 10)), 4),
    "decoder": (lambda: nn.Sequential(nn.Linear(5, 32), nn.Unflatten(1, (8, 2, 2)), nn.ConvTranspose2d(8, 4, 4)), 4),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 2)), 4),
    "bilinear": (lambda: nn.Bilinear(3, 3, 5), 4),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:torch.nn.modules.transformer")
@pytest.mark.parametrize("name", COVERED)
def test_coverage(name):
    """Inputs are guessed, every parameter has a node, every node is connected."""
    build, size = COVERED[name]
    with torch.device("meta"):  # saves the time of filling them
        model = build()
    graph = trace(model)
    named = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert graph.unused == () and sorted(graph.by_parameter) == sorted(named)
    assert len(graph) == size
    assert all(node.attributes["to_output"] >= 0 for node in graph.nodes)
    fed = [node.index for node in graph.nodes if not graph.predecessors[node.index]]
    assert all(
        graph.nodes[i].kind in ("input", "parameter") or i == graph.by_parameter.get("places.weight") for i in fed
    )


def calls_of_a_trace(blocks: int) -> int:
    """Python functions called while a chain of residual blocks is traced: the same on every machine."""
    model = torchvision.models.resnet.ResNet(torchvision.models.resnet.BasicBlock, [blocks, 1, 1, 1])
    trace(model)  # whatever is made once
    counted = cProfile.Profile()
    counted.runcall(trace, model)
    return sum(entry.callcount for entry in counted.getstats())


def test_the_work_of_a_trace_is_linear_in_its_length():
    short, middle, long = (calls_of_a_trace(blocks) for blocks in (10, 40, 70))
    assert long - middle == pytest.approx(middle - short, rel=0.05)
    assert long < 300_000  # about 500 nodes; ResNet-50 has 175
