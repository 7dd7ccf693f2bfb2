"""Hyperfan: the variances of the generated main network, by formula and by drawing it (research note, section 1.7)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from generators.errors import ConfigError, PowerhouseError
from generators.filling import init
from generators.hyperfan import MainLayer, hyperfan_, hyperfan_variances


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def heads(width: int, numbers: int, biases: int = 0) -> tuple[nn.Linear, Any]:
    """Heads that are full of NaN, so that nothing of the constructor can be left."""
    made = [torch.nn.utils.skip_init(nn.Linear, width, size) for size in (numbers, biases) if size]
    for head in made:
        for parameter in head.parameters():
            nn.init.constant_(parameter, math.nan)
    return made[0], made[1] if biases else None


def variances(embeddings: torch.Tensor, *, fan_in: int, fan_out: int, seed=0, bias=False, **options):
    """Second moments `[n]` of the weights (and biases) that fresh heads make, a new pair per embedding `[n, d]`."""
    weights, offsets = [], []
    generator = rng(seed)
    for e in embeddings:
        head, bias_head = heads(len(e), 64 * fan_in, 512 if bias else 0)
        hyperfan_(head, fan_in=fan_in, fan_out=fan_out, generator=generator, bias_head=bias_head, **options)
        with torch.no_grad():
            weights.append(head(e).square().mean())
            offsets.append(bias_head(e).square().mean() if bias_head is not None else torch.zeros(()))
    return torch.stack(weights), torch.stack(offsets)


def test_mean_and_spread_over_embeddings():
    """200 embeddings of 256 entries: Var(W) fan / 2 is 1 on average, and spreads by sqrt(2 / 256) between them."""
    found, _ = variances(torch.randn(200, 256, generator=rng(1)), fan_in=64, fan_out=64)
    ratio = found * 64 / 2
    assert abs(ratio.mean() - 1) < 0.02
    assert abs(ratio.std() - math.sqrt(2 / 256)) < 0.02


@pytest.mark.parametrize("relu, gain", [(True, 2), (False, 1)])
def test_calibrated_on_each_single_embedding(relu, gain):
    """Var(W) fan / R is 1 for every embedding, up to the sampling error of the head, whatever its length."""
    embeddings = torch.randn(20, 32, generator=rng(2)) * torch.logspace(-2, 2, 20)[:, None]
    for e in embeddings:
        found, _ = variances(e[None], fan_in=64, fan_out=64, hidden=e[None], relu=relu)
        assert abs(found.item() * 64 / gain - 1) < 4 * math.sqrt(2 / (64 * 64))


def test_weight_and_bias_share_the_variance():
    """400 embeddings after a hidden ReLU layer: with biases Var(W) fan and Var(b) are 1, without Var(W) fan is 2."""
    layer = nn.Linear(64, 64, bias=False)
    nn.init.kaiming_normal_(layer.weight, generator=rng(3))
    with torch.no_grad():
        hidden = layer(torch.randn(400, 64, generator=rng(4))).relu()
    found, offsets = variances(hidden, fan_in=32, fan_out=64, bias=True, hidden=hidden)
    assert abs(found.mean() * 32 - 1) < 0.05 and abs(offsets.mean() - 1) < 0.05
    found, _ = variances(hidden, fan_in=32, fan_out=64, hidden=hidden)
    assert abs(found.mean() * 32 - 2) < 0.1


def test_fan_out_in_draws():
    """Var(W) fan_out is 2; the bias head is exactly zero if the fan-in is not below the fan-out."""
    embeddings = torch.randn(60, 256, generator=rng(5))
    found, offsets = variances(embeddings, fan_in=64, fan_out=32, mode="out", bias=True)
    assert abs(found.mean() * 32 / 2 - 1) < 0.05 and torch.equal(offsets, torch.zeros(60))
    found, offsets = variances(embeddings, fan_in=16, fan_out=64, mode="out", bias=True)
    assert abs(found.mean() * 64 / 2 - 1) < 0.05 and abs(offsets.mean() / (2 * (1 - 16 / 64)) - 1) < 0.05


@pytest.mark.parametrize("fan_in, fan_out", [(9, 64), (64, 9), (32, 32), (1, 1), (9, 9)])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_formulas(fan_in, fan_out, relu, bias):
    """Each cell of the table of the paper, written out once more; harmonic between in and out, their harmonic mean."""

    def of(mode):
        return hyperfan_variances(
            fan_in=fan_in, fan_out=fan_out, width=20, second_moment=0.7, mode=mode, relu=relu, generates_bias=bias
        )

    r, b, scale = 1 + relu, 1 + bias, 20 * 0.7
    assert of("in") == pytest.approx((r / (b * fan_in * scale), r / (2 * scale)))
    assert of("out")[0] == pytest.approx(r / (fan_out * scale))
    if fan_in >= fan_out:
        assert of("out")[1] == 0 == of("harmonic")[1]
    else:
        assert of("out")[1] == pytest.approx(r * (1 - fan_in / fan_out) / scale)
        assert 1 / of("harmonic")[1] == pytest.approx((1 / of("in")[1] + 1 / of("out")[1]) / 2)
    low, high = sorted([of("in")[0], of("out")[0]])
    assert low * (1 - 1e-12) <= of("harmonic")[0] <= high * (1 + 1e-12)
    assert 1 / of("harmonic")[0] == pytest.approx((1 / of("in")[0] + 1 / of("out")[0]) / 2)
    if fan_in == fan_out and not bias:
        assert of("in")[0] == pytest.approx(of("out")[0]) == of("harmonic")[0]


def test_second_moment_of_the_embedding():
    """Doubling it halves Var(H); scaling embeddings by c with c^2 given leaves the main weights as they were."""
    options: dict[str, Any] = dict(fan_in=30, fan_out=30, width=8)
    once, twice = hyperfan_variances(**options), hyperfan_variances(second_moment=2.0, **options)
    assert once == pytest.approx((2 * twice[0], 2 * twice[1]))
    e = torch.randn(5, 64, generator=rng(6))
    plain, _ = variances(e, fan_in=30, fan_out=30)
    scaled, _ = variances(10 * e, fan_in=30, fan_out=30, second_moment=100.0)
    torch.testing.assert_close(plain, scaled)


def test_in_place_and_reproducible():
    """Everything is written, head biases zero; the same stream gives the same bits and the global one is not used."""
    before = torch.get_rng_state()
    (one, one_bias), (two, two_bias) = heads(16, 40, 4), heads(16, 40, 4)
    for head, bias_head in ((one, one_bias), (two, two_bias)):
        hyperfan_(head, fan_in=10, fan_out=4, generator=rng(7), bias_head=bias_head)
    assert torch.equal(one.weight, two.weight) and torch.equal(one_bias.weight, two_bias.weight)
    assert torch.isfinite(one.weight).all() and one_bias.weight.std() > 0
    assert not one.bias.any() and not one_bias.bias.any()
    assert torch.equal(torch.get_rng_state(), before)
    no_bias = nn.Linear(16, 40, bias=False)
    hyperfan_(no_bias, fan_in=10, fan_out=4, generator=rng(7))
    assert no_bias.bias is None and no_bias.weight.requires_grad


@pytest.mark.parametrize(
    "module, fan_in",
    [
        (nn.Conv2d(8, 16, 3), 72),
        (nn.Conv2d(8, 8, 3, groups=8), 9),  # depthwise
        (nn.Conv2d(8, 16, (1, 5), groups=2), 20),
    ],
)
def test_convolutions_keep_their_variance(module, fan_in):
    """With the inventory's fans of a convolution, a generated kernel gives outputs of variance 1 on white noise."""
    from generators.inventory import inventory

    info = inventory(module)["weight"]
    assert info.fan_in == fan_in
    e = torch.randn(1, 128, generator=rng(8))
    head, _ = heads(128, info.numel)
    hyperfan_(head, fan_in=info.fan_in, fan_out=info.fan_out, generator=rng(9), hidden=e, relu=False)
    images = torch.randn(64, module.in_channels, 12, 12, generator=rng(10))
    with torch.no_grad():
        outputs = nn.functional.conv2d(images, head(e).reshape(info.shape), groups=module.groups)
    assert abs(outputs.var() - 1) < 6 * math.sqrt(2 / info.numel) + 0.02


def _deep_variances(initialise, seed: int, layers: int = 6) -> list[float]:
    """Second moment before each ReLU of a main MLP of width 128, 256 inputs and 10 outputs without normalisation.

    A 64-64-64 ReLU hypernetwork makes all of it from one embedding.
    """
    generator = rng(seed)
    e = torch.randn(64, generator=generator)
    for _ in range(2):
        layer = torch.empty(64, 64)
        nn.init.kaiming_normal_(layer, generator=generator)
        e = (layer @ e).relu()
    x = torch.randn(128, 256, generator=generator)
    found: list[float] = []
    for inputs, outputs in itertools.pairwise((256, *[128] * (layers - 1), 10)):
        head, bias_head = heads(64, inputs * outputs, outputs)
        initialise(head, bias_head, inputs, outputs, generator, e)
        x = x if not found else x.relu()
        x = (head(e).reshape(outputs, inputs) @ x.T).T + bias_head(e)
        found.append(x.var().item() + x.mean().item() ** 2)
    return found


@torch.no_grad()
@pytest.mark.parametrize("calibrated", [False, True])
def test_deep_main_network(calibrated):
    """Median variance at each of six layers over 15 seeds within [0.2, 5]; with calibration, within [1, 3] at all."""

    def initialise(head, bias_head, inputs, outputs, generator, e):
        options = {"hidden": e[None]} if calibrated else {}
        hyperfan_(head, fan_in=inputs, fan_out=outputs, generator=generator, bias_head=bias_head, **options)

    found = torch.tensor([_deep_variances(initialise, seed) for seed in range(15)])
    medians = found.median(dim=0).values
    low, high = (1.0, 3.0) if calibrated else (0.2, 5.0)
    assert ((medians > low) & (medians < high)).all(), medians
    if calibrated:
        assert found[:, :5].max() < 4 and found[:, :5].min() > 0.5, "no embedding is far off"


@torch.no_grad()
def test_twenty_layers_without_normalisation():
    """The spread before each activation stays within a factor of 2 of 1, in every draw, with calibrated heads."""

    def initialise(head, bias_head, inputs, outputs, generator, e):
        options: dict[str, Any] = dict(fan_in=inputs, fan_out=outputs, generator=generator, bias_head=bias_head)
        hyperfan_(head, hidden=e[None], relu=outputs != 10, **options)

    found = torch.tensor([_deep_variances(initialise, seed, layers=20) for seed in range(10)]).sqrt()
    assert found.shape == (10, 20) and found.min() > 0.5 and found.max() < 2, (found.min(), found.max())


@torch.no_grad()
def test_kaiming_on_the_heads_explodes():
    """What hyperfan is for: the ordinary rule on the heads gives more than 1e9 at the sixth layer."""

    def initialise(head, bias_head, inputs, outputs, generator, e):
        for layer in (head, bias_head):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)

    found = torch.tensor([_deep_variances(initialise, seed) for seed in range(7)])
    assert found.median(dim=0).values[-1] > 1e9


@pytest.mark.parametrize(
    "changes", [{"fan_in": 0}, {"fan_out": 0}, {"width": 0}, {"second_moment": 0.0}, {"mode": "both"}]
)
def test_impossible_settings(changes):
    with pytest.raises(ConfigError, match="hyperfan"):
        hyperfan_variances(**({"fan_in": 4, "fan_out": 4, "width": 4} | changes))


# ---- the initialisers -----------------------------------------------------------------------------------------------


class Hypernetwork(nn.Module):
    """From embeddings of 64 numbers over two ReLU layers of 64 to the weights and biases of a main MLP."""

    def __init__(self, *sizes: int, told: dict | None = None) -> None:
        super().__init__()
        self.sizes, self.told = list(itertools.pairwise(sizes)), told
        self.embedding = nn.Embedding(3, 64)
        self.hidden = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.weights = nn.ModuleList([nn.Linear(64, inputs * outputs) for inputs, outputs in self.sizes])
        self.biases = nn.ModuleList([nn.Linear(64, outputs) for _, outputs in self.sizes])

    def main_layers(self) -> Any:
        last = len(self.sizes) - 1
        return self.told if self.told is not None else {
            f"weights.{i}": MainLayer(inputs, outputs, relu=i < last, bias=f"biases.{i}")
            for i, (inputs, outputs) in enumerate(self.sizes)
        }  # fmt: skip

    def forward(self, index: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        """What each layer of the main network gives before its ReLU, for inputs `[N, I]` and one index."""
        e, found = self.hidden(self.embedding(index)), list[torch.Tensor]()
        for weight, bias, (inputs, outputs) in zip(self.weights, self.biases, self.sizes, strict=True):
            x = x if not found else x.relu()
            x = x @ weight(e).reshape(outputs, inputs).T + bias(e)
            found.append(x)
        return found


@torch.no_grad()
def test_a_filled_hypernetwork_makes_a_deep_main_network_of_unit_scale() -> None:
    """Six layers, 15 seeds: the median variance before each ReLU is within [0.2, 5], that of the answer below 2;
    with He on the heads it exceeds 1e9.
    """
    model = Hypernetwork(256, 128, 128, 128, 128, 128, 10)
    x = torch.randn(64, 256, generator=rng(11))
    medians = {}
    for spec, seeds in (("hyperfan", 15), ("he", 3)):
        rows = []
        for seed in range(seeds):
            init(model, spec, seed=seed)
            rows.append([value.square().mean().item() for value in model(torch.tensor(0), x)])
        medians[spec] = torch.tensor(rows).median(dim=0).values
    assert ((medians["hyperfan"] > 0.2) & (medians["hyperfan"] < 5)).all() and medians["hyperfan"][-1] < 2, medians
    assert medians["he"][-1] > 1e9


@pytest.mark.parametrize("spec, mode", [("hyperfan", "in"), ("hyperfan-out", "out"), ("hyperfan-harmonic", "harmonic")])
def test_heads_have_the_variances_of_the_formulas(spec: str, mode: Any) -> None:
    """Std within 5 % of the formula's, or exactly 0; all else is a named fallback, and the report is complete."""
    model = Hypernetwork(32, 64, 16)
    report = init(model, spec, seed=3)
    for index, (inputs, outputs) in enumerate(model.sizes):
        weight, bias = hyperfan_variances(
            fan_in=inputs, fan_out=outputs, width=64, mode=mode, relu=index == 0, generates_bias=True
        )
        assert model.weights[index].weight.std().item() == pytest.approx(math.sqrt(weight), rel=0.05)
        assert model.biases[index].weight.std().item() == pytest.approx(math.sqrt(bias), rel=0.05)
        assert not model.weights[index].bias.any() and not model.biases[index].bias.any()
    assert len(report.generated) == 8 and not report.kept and report.generated["weights.0.bias"].endswith("head bias 0")
    assert report.fallbacks["hidden.0.weight"] == f"he ({spec}: not a head)" and not model.hidden[0].bias.any()
    assert abs(model.embedding.weight.std() - 1) < 0.2
    again = Hypernetwork(32, 64, 16)
    init(again, spec, seed=3)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), again.parameters(), strict=True))
    init(again, spec, seed=3, member=1)
    assert not torch.equal(model.weights[0].weight, again.weights[0].weight)


def test_what_the_model_tells_is_used() -> None:
    """A second moment of 4 halves the spread of a head; without a generated bias it is sqrt 2 as large."""
    one, four, alone = (
        Hypernetwork(32, 64, told={"weights.0": MainLayer(32, 64, **options)})
        for options in (dict(bias="biases.0"), dict(bias="biases.0", second_moment=4.0), {})
    )
    for model in (one, four, alone):
        init(model, "hyperfan")
    torch.testing.assert_close(one.weights[0].weight, 2 * four.weights[0].weight)
    torch.testing.assert_close(alone.weights[0].weight, math.sqrt(2) * one.weights[0].weight)
    report = init(alone, "hyperfan")
    assert report.fallbacks["biases.0.weight"].startswith("he")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            nn.Linear(3, 2),
            "hyperfan is for hypernetworks, and Linear does not say what it makes; give it",
        ),
        (Hypernetwork(3, 2, told={"weights.0": (3, 2)}), "Hypernetwork does not say"),
        (
            Hypernetwork(3, 2, told={"weight.0": MainLayer(3, 2)}),
            r"unknown head in main_layers\(\) 'weight.0'",
        ),
        (Hypernetwork(3, 2, told={"embedding": MainLayer(3, 2)}), "'embedding' .* must be a linear layer"),
        (Hypernetwork(3, 2, told={"weights.0": MainLayer(3, 2, bias="weights.0")}), "that makes one tensor"),
        (Hypernetwork(3, 2, told={"weights.0": MainLayer(0, 2)}), "positive fans"),
    ],
)
def test_models_that_are_no_hypernetworks(model: nn.Module, words: str) -> None:
    before = [value.clone() for value in model.parameters()]
    with pytest.raises(PowerhouseError, match=words):
        init(model, "hyperfan")
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), before, strict=True))
