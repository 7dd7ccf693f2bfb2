"""Any model: of every depth, width and origin each tensor is generated, or the report says why not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

from generators import init
from generators.ghn.ghn import GHN
from generators.graph import trace
from generators.inventory import inventory
from small_ghn import IMAGE, NOISY, SMALL, network
from small_models import sequential_mlp


class Text(nn.Module):
    """Token numbers to classes through an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(30, 8), nn.LSTM(8, 12, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, tokens):
        return self.head(self.lstm(self.embed(tokens))[0][:, -1])


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


@pytest.mark.parametrize(
    ("make", "widest"),
    [
        (lambda: sequential_mlp(12, 64, 10), 64),  # many outputs
        (lambda: sequential_mlp(70, 8, 10), 70),  # many inputs, of the first layer ...
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10)), 72),  # ... and of the classifier
        (lambda: nn.Sequential(nn.ConvTranspose2d(1, 66, 1), nn.Conv2d(66, 2, 3, groups=2)), 66),
    ],
)
def test_far_wider_models_get_a_note(make, widest):
    """Beyond twice the widest of training; none below, and none if the training is not known."""
    for known, noted in ((8, True), (widest // 2, False), (0, False)):
        model = make()
        example = torch.zeros(1, model[0].in_features) if isinstance(model[0], nn.Linear) else IMAGE
        notes = init(model, GHN(replace(SMALL, widest=known), name="mine"), example_inputs=example).notes
        wanted = f"mine was trained on layers of up to 8 channels; this model has {widest}"
        assert notes == ((wanted,) if noted else ())


@pytest.mark.parametrize("decoder", ["core", "coordinate"])
def test_query_key_value_and_heads_of_an_attention_layer_differ(decoder):
    """Of a deterministic GHN, where no noise could hide copies: twelve matrices, no two of which are nearly alike."""
    model, heads = nn.TransformerEncoderLayer(64, 4, batch_first=True), 4
    state = GHN(replace(SMALL, decoder=decoder, cells=16)).sample(model, 1, example_inputs=torch.zeros(1, 5, 64))
    parts = torch.stack(state["self_attn.in_proj_weight"][0].chunk(3 * heads)).flatten(1)
    cosines = nn.functional.normalize(parts, dim=1) @ nn.functional.normalize(parts, dim=1).T
    assert cosines.fill_diagonal_(0).abs().max() < 0.98


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_query_key_and_value_of_a_gpt2_differ(attention):
    """One matrix `[32, 96]` in `transformers`, which the trace shows to feed an attention with three of that width."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=32, n_layer=1, n_head=4, vocab_size=20, n_positions=8, attn_implementation=attention,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model, example = transformers.GPT2LMHeadModel(config), {"input_ids": torch.zeros(1, 6, dtype=torch.long)}
    name = "transformer.h.0.attn.c_attn.weight"
    info = inventory(model, trace(model, example))[name]
    assert (info.blocks, info.block_axis, info.fan_in, info.fan_out) == (3, 1, 32, 32)
    (weight,) = GHN(replace(SMALL, cells=16)).sample(model, 1, example_inputs=example)[name]
    parts = torch.stack(weight.chunk(3, dim=1)).flatten(1)
    cosines = nn.functional.normalize(parts, dim=1) @ nn.functional.normalize(parts, dim=1).T
    assert cosines.fill_diagonal_(0).abs().max() < 0.98
