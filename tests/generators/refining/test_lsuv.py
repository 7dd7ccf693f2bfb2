"""LSUV: unit output spread on real digits, against a slow reference, and on awkward models."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from generators.errors import ConfigError, DataError, ModelError
from generators.filling import init
from generators.refining.lsuv import LSUV


@pytest.fixture(scope="module")
def images() -> Tensor:
    """128 real handwritten digits, `[N, 1, 8, 8]`, standardised."""
    pixels = torch.tensor(load_digits().images[:128], dtype=torch.float32)[:, None]
    return (pixels - pixels.mean()) / pixels.std()


class Residual(nn.Module):
    """Convolutions in a branch, batch norm, dropout, a layer that is used twice, a bias that is not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.stem(images)).relu()
        hidden = hidden + self.shared(self.shared(hidden).relu())
        return self.head(self.drop(hidden).mean((2, 3)))


def _batches(images: Tensor) -> list:
    return [(images, torch.zeros(len(images)))]


def _reference(model: nn.Module, images: Tensor, *, tolerance: float = 0.1, tries: int = 10) -> None:
    """The paper's loop, slow and obvious: for each layer in turn, run the whole model, divide, repeat."""
    order: list[nn.Module] = []
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    handles = [
        layer.register_forward_hook(lambda layer, *_: order.append(layer) if layer not in order else None)
        for layer in layers
    ]
    model.eval()(images)
    for handle in handles:
        handle.remove()
    for layer in order:
        for _ in range(tries):
            outputs: list[Tensor] = []
            handle = layer.register_forward_hook(lambda layer, inputs, output, seen=outputs: seen.append(output))
            model(images)
            handle.remove()
            if abs(outputs[0].std() - 1) <= tolerance:
                break
            layer.weight.data /= outputs[0].std()


def test_agrees_with_the_slow_reference(images: Tensor) -> None:
    fast, slow = Residual(), Residual()
    for model in (fast, slow):
        init(model, "he", seed=3)
        with torch.no_grad():
            model.stem.bias.fill_(0.4)  # more than one division is needed
    init(fast, "lsuv", data=_batches(images))
    _reference(slow, images)
    for name, value in slow.named_parameters():
        torch.testing.assert_close(fast.get_parameter(name), value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("start", ["orthogonal", "xavier", "trunc-normal"])
def test_every_layer_has_unit_spread(images: Tensor, start: str) -> None:
    """Measured on the finished model: from any start, each layer's output std is 1 within the tolerance."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.Tanh(), nn.Flatten(), nn.Linear(256, 32),
        nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    report = init(model, f"{start}+lsuv", data=_batches(images))
    hidden = images
    for layer in model:
        hidden = layer(hidden)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert abs(hidden.std().item() - 1.0) <= 0.1
    assert "lsuv: output std" in report.generated["7.weight"]


def test_state_mode_and_randomness_are_restored(images: Tensor) -> None:
    """The model stays in training mode without hooks or gradients, and a shuffling loader cannot leak randomness."""
    model = Residual()
    dataset = torch.utils.data.TensorDataset(images, torch.zeros(len(images)))
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    init(model, "he+lsuv", seed=1, data=loader)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before[1:]
    assert model.training
    assert model.norm.running_mean.eq(0).all()
    assert not any(module._forward_hooks for module in model.modules())
    assert all(value.grad is None and value.requires_grad for value in model.parameters())
    again = Residual()
    init(again, "he+lsuv", seed=1, data=loader)
    assert torch.equal(model.shared.weight, again.shared.weight)


def test_frozen_and_tied_weights_are_left(images: Tensor) -> None:
    model = Residual()
    init(model, "he")
    model.shared.weight.requires_grad_(False)
    frozen = model.shared.weight.clone()
    report = init(model, "lsuv", data=_batches(images))
    assert torch.equal(model.shared.weight, frozen)
    assert "shared.weight" in report.kept
    assert "stem.weight" in report.generated
    tied = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    tied[2].weight = tied[0].weight
    report = init(tied, "lsuv", data=[(images[:, 0, 0], None)])
    assert set(report.kept) == set(tied.state_dict())
    assert "no convolution or linear layer" in report.notes[0]


def test_dead_layer_is_left_and_said(images: Tensor) -> None:
    """A layer of zeros has no spread to divide by."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 4))
    init(model, "he")
    with torch.no_grad():
        model[1].weight.zero_()
    report = init(model, "lsuv", data=_batches(images))
    assert model[1].weight.eq(0).all()
    assert "1.weight left as it was" in report.notes[0]


def test_transformer(images: Tensor) -> None:
    """Linear layers called as modules are fixed, the stacked projections inside attention are kept and reported."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = init(model, "xavier+lsuv", data=[(images[:, 0], None)])
    assert "lsuv" in report.generated["linear1.weight"]
    assert "lsuv" not in report.generated["self_attn.in_proj_weight"]


def test_half_precision(images: Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).bfloat16()
    init(model, "trunc-normal+lsuv", data=_batches(images.bfloat16()))
    assert abs(model(images.bfloat16()).float().std().item() - 1.0) <= 0.15


@pytest.mark.parametrize("batch", ["tensor", "dict", "tuple"])
def test_forms_of_input(images: Tensor, batch: str) -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, first: Tensor, second: Tensor | float = 0.0) -> Tensor:
            return self.linear(first + second)

    rows = images[:, 0, 0]
    forms = {"tensor": rows, "dict": {"first": rows, "second": rows}, "tuple": ((rows, rows), None)}
    assert "lsuv" in init(Adds(), "he+lsuv", data=iter([forms[batch]])).generated["linear.weight"]


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (None, ConfigError, "needs data"),
        ([], DataError, "empty"),
        ([(torch.zeros(2, 3), None)], ModelError, "first batch"),
    ],
)
def test_bad_data(data: list | None, error: type[Exception], words: str) -> None:
    model = nn.Linear(4, 4)
    before = model.weight.clone()
    with pytest.raises(error, match=words) as caught:
        init(model, LSUV(), data=data)
    assert torch.equal(model.weight, before)
    if error is ModelError:
        assert isinstance(caught.value.__cause__, RuntimeError)
