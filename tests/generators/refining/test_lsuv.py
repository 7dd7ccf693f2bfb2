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
from generators.gradients import grad_cosine
from generators.refining.lsuv import LSUV
from small_models import Forward


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
    assert report.notes[0] == "1.weight: lsuv left it as it was: the spread of its output is 0"
    assert report.kept["1.weight"] in report.notes[0]


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


def test_half_precision_takes_data_of_either_kind(images: Tensor) -> None:
    """The pass runs in float32, so batches as a loader gives them serve a model in bfloat16 or float16."""
    for dtype in (torch.bfloat16, torch.float16):
        one, other = (nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(2))
        init(one.to(dtype), "he+lsuv", data=_batches(images))
        init(other.to(dtype), "he+lsuv", data=_batches(images.to(dtype)))
        for name, value in one.named_parameters():
            torch.testing.assert_close(other.get_parameter(name), value, rtol=2e-2, atol=1e-3, msg=name)


def test_the_report_has_scales_and_spreads(images: Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    init(model, "trunc-normal")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    report = init(model, "lsuv", data=_batches(images))
    for name in ("1.weight", "3.weight"):
        row = report.statistics[name]
        torch.testing.assert_close(before[name] * row["scale"], model.get_parameter(name).detach())
        assert row["std_before"] == pytest.approx(before[name].std().item(), rel=1e-5)
        assert row["std_after"] == pytest.approx(row["scale"] * row["std_before"], rel=1e-5)
        assert row["output_std_before"] < 0.5 and abs(row["output_std_after"] - 1.0) <= 0.1 and row["divisions"] == 1
    assert report.figures["lsuv"]["layers"] == 2 and report.seconds["lsuv"] > 0


def test_with_a_loss_the_report_tells_what_gradients_became(images: Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    init(model, "trunc-normal")
    batches = [(images, torch.arange(len(images)) % 10)]
    before = grad_cosine(model, batches, nn.functional.cross_entropy)
    figures = init(model, "lsuv", data=batches, loss=nn.functional.cross_entropy).figures["lsuv"]
    after = grad_cosine(model, batches, nn.functional.cross_entropy)
    for when, found in (("before", before), ("after", after)):
        assert figures[f"grad_cosine_{when}"] == pytest.approx(found.cosine, rel=1e-4)
        assert figures[f"gradient_norm_{when}"] == pytest.approx(found.gradient_norm, rel=1e-4)
    assert figures["gradient_norm_after"] > 5 * figures["gradient_norm_before"]
    unusable = init(model, "lsuv", data=batches, loss=lambda outputs, targets: outputs).figures["lsuv"]
    assert unusable.keys() == {"layers"}  # it needs no loss, so a bad one does not stop it


def test_two_steps_of_a_name_tell_their_figures_apart(images: Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    report = init(model, "he+lsuv+rewire+lsuv", data=_batches(images))
    assert report.figures.keys() == {"lsuv", "lsuv (2)"}
    assert list(report.seconds) == ["he", "lsuv", "rewire", "lsuv (2)"] and min(report.seconds.values()) > 0
    assert "lsuv (2): " in str(report)


class Standardised(nn.Conv2d):
    """Weight standardisation: the size of the stored weight does not matter."""

    def forward(self, images: Tensor) -> Tensor:
        return self._conv_forward(images, 3.0 * self.weight / self.weight.std(), self.bias)


def test_a_layer_that_does_not_follow_is_left(images: Tensor) -> None:
    """Ten divisions in vain would leave a weight of another order of magnitude."""
    model = nn.Sequential(Standardised(1, 8, 3), nn.Flatten(), nn.Linear(288, 4))
    init(model, "he")
    before = model[0].weight.detach().clone()
    report = init(model, "lsuv", data=_batches(images))
    assert torch.equal(model[0].weight, before) and "2.weight" in report.generated
    assert "stays" in report.kept["0.weight"] and any("after 10 divisions" in note for note in report.notes)


class InputFirst(nn.Module):
    """A linear layer that stores its weight `[inputs, outputs]`, as those of GPT-2 do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, rows: Tensor) -> Tensor:
        return torch.addmm(self.bias, rows, self.weight)


def test_layers_of_other_classes(images: Tensor) -> None:
    """What the graph shows to be a linear layer is one."""
    rows = images.flatten(1)
    model = nn.Sequential(InputFirst(64, 32), nn.ReLU(), InputFirst(32, 8))
    init(model, "xavier+lsuv", data=[rows], example_inputs=rows)
    assert abs(model[0](rows).std().item() - 1.0) <= 0.1 and abs(model(rows).std().item() - 1.0) <= 0.1


def test_what_it_cannot_rescale_is_said(images: Tensor) -> None:
    model = Forward(lambda m, x: m.head(m.body(x[:, 0])[0]), body=nn.LSTM(8, 6), head=nn.Linear(6, 4))
    report = init(model, "he+lsuv", data=_batches(images))
    assert any("lsuv: 2 matrices are as they were (body.weight_ih_l0, body.weight_hh_l0)" in n for n in report.notes)


def test_data_with_nan_are_refused(images: Tensor) -> None:
    with pytest.raises(DataError, match="NaN"):
        init(nn.Linear(8, 4), "he+lsuv", data=[images[:, 0] * torch.nan])


def test_autocast_of_the_caller_makes_no_difference(images: Tensor) -> None:
    """It would round the outputs, and hand out a copy of each weight that was made before the division."""
    one, other = (nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(2))
    init(one, "he+lsuv", data=_batches(images))
    with torch.autocast("cpu", torch.bfloat16):
        init(other, "he+lsuv", data=_batches(images))
    for name, value in one.named_parameters():
        assert torch.equal(other.get_parameter(name), value), name
