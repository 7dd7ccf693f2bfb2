"""EmergenceInit: scales alone, whose product is 1, that leave what a network computes as it is."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from generators.errors import ConfigError
from generators.filling import init
from generators.refining.emergence import EmergenceInit, exponents


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """64 real handwritten digits, `[N, 64]`, standardised."""
    pixels = torch.tensor(load_digits().data[:64], dtype=torch.float32)
    return (pixels - pixels.mean()) / pixels.std()


def mlp(layers: int, *, bias: bool = False) -> nn.Sequential:
    """So many linear layers with ReLUs between them."""
    widths = [64, *[32] * (layers - 1), 10]
    stack: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        stack += [nn.Linear(inputs, outputs, bias=bias), nn.ReLU()]
    return nn.Sequential(*stack[:-1])


def _weights(model: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for name, value in model.named_parameters() if name.endswith("weight")]


@pytest.mark.parametrize("layers", [2, 3, 6, 7])
@pytest.mark.parametrize("alpha", [1.1, 2.0, 0.5])
def test_scales_by_hand(layers: int, alpha: float, digits: Tensor) -> None:
    """Layer by layer: alpha^n counted from the middle, product 1, parallel to the start, the same function."""
    model = mlp(layers)
    init(model, "he", seed=1)
    before, output = _weights(model), model(digits)
    report = init(model, EmergenceInit(alpha=alpha))
    scales = [report.statistics[f"{2 * index}.weight"]["scale"] for index in range(layers)]
    for index, (old, new) in enumerate(zip(before, _weights(model), strict=True)):
        behind, ahead = index, layers - 1 - index
        distance = abs(behind - ahead) // 2 if layers % 2 else (abs(behind - ahead) + 1) // 2
        assert scales[index] == pytest.approx(alpha**distance if behind > ahead else 1 / alpha**distance)
        torch.testing.assert_close(new, old * scales[index], rtol=1e-6, atol=0)
        cosine = nn.functional.cosine_similarity(new.double().flatten(), old.double().flatten(), dim=0)
        assert cosine.item() == pytest.approx(1.0, abs=1e-6)
    assert math.prod(scales) == pytest.approx(1.0)
    torch.testing.assert_close(model(digits), output, rtol=1e-4, atol=1e-5)
    assert report.figures["emergence"] == pytest.approx({"layers": layers, "largest_scale": max(scales)})


def test_exponents_mirror_each_other() -> None:
    assert [exponents(count) for count in range(6)] == [
        [], [0], [-1, 1], [-1, 0, 1], [-2, -1, 1, 2], [-2, -1, 0, 1, 2],
    ]  # fmt: skip


def test_gradients_are_divided_by_the_scales(digits: Tensor) -> None:
    """Homogeneity, as the module says: scale times new gradient is the old gradient, by autograd on real digits."""
    model, targets = mlp(6), torch.tensor(load_digits().target[:64])
    init(model, "he", seed=2)

    def gradients() -> list[Tensor]:
        loss = nn.functional.cross_entropy(model(digits), targets)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    before = gradients()
    report = init(model, EmergenceInit(alpha=1.5))
    for index, (old, new) in enumerate(zip(before, gradients(), strict=True)):
        torch.testing.assert_close(report.statistics[f"{2 * index}.weight"]["scale"] * new, old, rtol=1e-3, atol=1e-6)


def test_convolutions_in_the_order_of_the_forward_pass() -> None:
    """The order is that of the graph, not of registration; a stack of convolutions keeps its function as well."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle = nn.Linear(8, 10, bias=False), nn.ConvTranspose2d(4, 8, 2, bias=False)
            self.first = nn.Conv2d(1, 4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(x).relu()).relu().mean((2, 3)))

    model, images = Backwards(), torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    init(model, "he", seed=3)
    output = model(images)
    report = init(model, "emergence")
    scales = [report.statistics[f"{name}.weight"]["scale"] for name in ("first", "middle", "last")]
    assert scales == pytest.approx([1 / 1.1, 1.0, 1.1])
    torch.testing.assert_close(model(images), output, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_scaled_is_left_and_named() -> None:
    """Frozen, shared and computed weights are not among the layers, so the product of the scales is 1 without them."""
    shared = nn.Linear(8, 8)
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False), shared, shared, nn.Linear(8, 8),
        weight_norm(nn.Linear(8, 8)), spectral_norm(nn.Linear(8, 8)),
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = init(model, "emergence")
    assert set(report.generated) == {"0.weight", "4.weight"}
    assert report.kept["0.bias"] == "emergence: only weights are scaled"
    assert report.kept["1.weight"] == "emergence: frozen"
    assert report.kept["2.weight"] == "emergence: read at several places"
    assert "makes its weight" in report.kept["5.parametrizations.weight.original1"]
    assert "makes its weight" in report.kept["6.parametrizations.weight.original"]
    for name in report.kept:
        assert torch.equal(model.state_dict()[name], before[name]), name


@pytest.mark.parametrize("build", [lambda: mlp(1), lambda: nn.LSTM(4, 5, num_layers=2)])
def test_nothing_to_scale(build) -> None:
    model = build()
    report = init(model, "emergence")
    assert not report.generated and "nothing changed" in report.notes[0]


MODELS = {
    "resnet": lambda: torchvision.models.resnet18(),
    "vit": lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10),
    "half": lambda: mlp(5, bias=True).half(),
}


@pytest.mark.parametrize("name", MODELS)
def test_any_model(name: str) -> None:
    """In a chain after he: every matrix of the forward pass is scaled, the product is 1, the rest is he's."""
    model, he = MODELS[name](), MODELS[name]()
    report = init(model, "he+emergence", seed=4)
    init(he, "he", seed=4)
    scales = {key: row["scale"] for key, row in report.statistics.items() if "scale" in row}
    assert len(scales) == report.figures["emergence"]["layers"] > 3
    assert sum(map(math.log, scales.values())) == pytest.approx(0.0, abs=1e-9)
    for key, value in he.named_parameters():
        torch.testing.assert_close(model.get_parameter(key), value * scales.get(key, 1.0), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, -1.1, math.inf, math.nan])
def test_bad_settings(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha is"):
        EmergenceInit(alpha=alpha)
