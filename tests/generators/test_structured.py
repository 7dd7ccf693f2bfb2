"""Sparse, Dirac and delta-orthogonal weights against torch.nn.init and by what they do to real digits."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from generators.filling import init
from generators.structured import CONNECTIONS


@pytest.fixture(scope="module")
def images() -> Tensor:
    """64 real handwritten digits as 16 images of 4 channels, `[16, 4, 8, 8]`, standardised."""
    pixels = torch.tensor(load_digits().images[:64], dtype=torch.float32).reshape(16, 4, 8, 8)
    return (pixels - pixels.mean()) / pixels.std()


def _filled(layer: nn.Module, name: str, seed: int = 11) -> Tensor:
    init(layer, name, seed=seed)
    return layer.weight.detach()


def _inputs_of_unit(layer: nn.Module, unit: int, inputs: tuple[int, ...]) -> int:
    """How many inputs one output of the layer reads, at a place that none of them misses: by its gradient."""
    x = torch.ones(1, *inputs, requires_grad=True)
    output = layer(x)[0, unit]
    middle = output[tuple(size // 2 for size in output.shape)] if output.ndim else output
    (gradient,) = torch.autograd.grad(middle, x)
    return int(gradient.count_nonzero())


# ---- sparse


@pytest.mark.parametrize(
    ("layer", "inputs", "connections"),
    [
        (nn.Linear(40, 30), (40,), CONNECTIONS),
        (nn.Linear(9, 30), (9,), 9),
        (nn.Conv2d(4, 6, 3), (4, 9, 9), CONNECTIONS),
        (nn.Conv2d(6, 6, 3, groups=6), (6, 9, 9), 9),
        (nn.Conv1d(12, 8, 5, groups=2), (12, 11), CONNECTIONS),
        (nn.ConvTranspose2d(6, 4, 3, groups=2), (6, 9, 9), CONNECTIONS),
    ],
)
def test_connections_per_output(layer: nn.Module, inputs: tuple[int, ...], connections: int) -> None:
    """Counted by gradients of outputs; a unit with fewer inputs than the paper's 15 reads all of them."""
    report = init(layer, "sparse", seed=3)
    assert report.generated["weight"] == "sparse"
    units = layer.bias.numel()
    assert [_inputs_of_unit(layer, unit, inputs) for unit in range(units)] == [connections] * units


def test_sparse_weights_have_the_variance_of_he_for_the_inputs_that_are_left() -> None:
    """30,000 weights within 4 standard errors of 2 / 15; every input is about equally often read (chi-square)."""
    weight = _filled(nn.Linear(100, 2000), "sparse")
    drawn, times = weight[weight != 0], (weight != 0).sum(0)
    assert drawn.std().item() == pytest.approx(math.sqrt(2 / 15), rel=4 / math.sqrt(2 * drawn.numel()))
    expected = 2000 * 15 / 100
    statistic = ((times - expected) ** 2 / (expected * (1 - 15 / 100))).sum().item() * 99 / 100
    assert abs(statistic - 99) < 4 * math.sqrt(2 * 99)


# ---- dirac

CONVOLUTIONS = {
    "1d": lambda: nn.Conv1d(4, 6, 5),
    "2d": lambda: nn.Conv2d(6, 4, 3),
    "wide": lambda: nn.Conv2d(3, 4, (1, 7)),
    "even": lambda: nn.Conv2d(3, 4, 4),
    "3d": lambda: nn.Conv3d(4, 4, 3),
    "grouped": lambda: nn.Conv2d(6, 12, 3, groups=3),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_dirac_is_that_of_torch(name: str) -> None:
    layer = CONVOLUTIONS[name]()
    wanted = nn.init.dirac_(torch.empty_like(layer.weight), layer.groups)
    assert torch.equal(_filled(layer, "dirac"), wanted)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 5, padding=2, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.ConvTranspose2d(4, 4, 3, padding=1),
        nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2),
        nn.Linear(8, 8),
    ],
    ids=str,
)
def test_dirac_hands_its_input_on(layer: nn.Module, images: Tensor) -> None:
    """Digits come out as they go in, bit by bit, also of transposed convolutions, which torch's own does not know."""
    init(layer, "dirac")
    assert torch.equal(layer(images), images)


def test_dirac_of_stacked_matrices_is_the_identity_of_each() -> None:
    attention, lstm = nn.MultiheadAttention(8, 2), nn.LSTM(5, 7)
    init(attention, "dirac")
    init(lstm, "dirac")
    for block in attention.in_proj_weight.detach().chunk(3):
        assert torch.equal(block, torch.eye(8))
    for gate in lstm.weight_ih_l0.detach().chunk(4):
        assert torch.equal(gate, torch.eye(7, 5))


# ---- delta-orthogonal


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 12, 5, padding=2),
        nn.Conv2d(4, 8, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
        nn.ConvTranspose2d(4, 8, 3, padding=1),
        nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2),
        nn.Linear(8, 10),
    ],
    ids=str,
)
def test_delta_orthogonal_keeps_norms(layer: nn.Module, images: Tensor) -> None:
    """Each image leaves the layer sqrt 2 times as long as it came: the gain, and no other stretch."""
    init(layer, "delta-orthogonal", seed=5)
    before, after = images.flatten(1).norm(dim=1), layer(images).flatten(1).norm(dim=1)
    torch.testing.assert_close(after, math.sqrt(2) * before, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(4, 12), (12, 4), (6, 6)])
def test_delta_orthogonal_matrix(shape: tuple[int, int]) -> None:
    """Zero but for the centre; there, the shorter side's vectors are orthogonal with length sqrt 2."""
    weight = _filled(nn.Conv2d(shape[1], shape[0], 3), "delta-orthogonal").double()
    centre = weight[:, :, 1, 1].clone()
    weight[:, :, 1, 1] = 0
    assert weight.eq(0).all()
    gram = centre @ centre.T if shape[0] < shape[1] else centre.T @ centre
    torch.testing.assert_close(gram, 2 * torch.eye(min(shape), dtype=torch.float64), atol=1e-5, rtol=0)


def test_signals_pass_fifty_delta_orthogonal_convolutions(images: Tensor) -> None:
    """A linear network of 50 layers keeps all norms within 1e-3 (gain taken out); one by he spreads them."""

    def lengths(name: str) -> Tensor:
        hidden = images
        for number in range(50):
            layer = nn.Conv2d(4, 4, 3, padding=1, bias=False)
            init(layer, name, seed=number)
            hidden = layer(hidden) / math.sqrt(2)
        return (hidden.flatten(1).norm(dim=1) / images.flatten(1).norm(dim=1)).detach()

    torch.testing.assert_close(lengths("delta-orthogonal"), torch.ones(len(images)), rtol=0, atol=1e-3)
    assert (lengths("he").log().abs() > 1).all()


def test_linear_layers_are_those_of_orthogonal() -> None:
    ours, plain = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
    init(ours, "delta-orthogonal", seed=4)
    init(plain, "orthogonal", seed=4)
    assert torch.equal(ours.in_proj_weight, plain.in_proj_weight)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(3, 8, 4), "a kernel of even size has no centre"),
        (nn.Conv2d(8, 8, (3, 2)), "a kernel of even size has no centre"),
        (nn.Conv2d(8, 16, 3, groups=8), "a depthwise convolution has no matrix to make orthogonal"),
    ],
)
def test_layers_without_a_delta_orthogonal_weight_are_made_by_he(layer: nn.Module, reason: str) -> None:
    report = init(layer, "delta-orthogonal", seed=1)
    assert report.fallbacks == {"weight": f"he (delta-orthogonal: {reason})"}
    ours = layer.weight.detach().clone()
    assert torch.equal(ours, _filled(layer, "he", seed=1))


# ---- weights that other modules store in their own way


class Experts(nn.Module):
    """A convolution whose kernel is stored first; a matrix, and one matrix per expert, that are stored inputs first."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(3, 3, 2, 20))
        self.mixer = nn.Parameter(torch.zeros(20, 24))
        self.experts = nn.Parameter(torch.zeros(5, 24, 30))

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.conv2d(x, self.kernel.permute(3, 2, 0, 1)).mean((2, 3))
        return torch.stack([hidden @ self.mixer] * 5) @ self.experts


@pytest.mark.parametrize("name", ["sparse", "dirac", "delta-orthogonal"])
def test_free_weights(name: str) -> None:
    """Each expert is a matrix of its own; a kernel that is stored in a layout of its own is made by he."""
    model = Experts()
    report = init(model, name, example_inputs=torch.zeros(2, 2, 8, 8))
    assert report.fallbacks == {"kernel": f"he ({name}: its kernel is stored in a layout of its own)"}
    for matrix in (model.mixer.detach(), *model.experts.detach()):
        inputs, outputs = matrix.shape
        if name == "dirac":
            assert torch.equal(matrix, torch.eye(inputs, outputs))
        elif name == "delta-orthogonal":
            torch.testing.assert_close(matrix @ matrix.T, 2 * torch.eye(inputs), atol=1e-5, rtol=0)
        else:
            assert matrix.count_nonzero(0).tolist() == [CONNECTIONS] * outputs
