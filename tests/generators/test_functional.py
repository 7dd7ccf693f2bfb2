"""A model as a function of its weights: its loss and derivatives against autograd on the model itself."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators.errors import ConfigError, DataError, ModelError
from generators.functional import Functional, cycled, examples, size_of
from generators.inventory import inventory
from small_digits import digits
from small_models import attention_block


def functional(model: nn.Module, loss=F.cross_entropy) -> Functional:
    return Functional(model, loss, inventory(model), "test")


def _wanting_gradients(network: Functional) -> dict[str, Tensor]:
    return {name: value.requires_grad_() for name, value in network.weights.items()}


def convolutional(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10))


class Recurrent(nn.Module):
    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.layer, self.head = layer(8, 12, batch_first=True), nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer(images[:, 0])[0][:, -1])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.layer = attention_block(fused=True), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer(self.block(images[:, 0])).mean(1))


MODELS = {
    "batch norm": lambda: convolutional(nn.BatchNorm2d(4)),
    "instance norm": lambda: convolutional(nn.InstanceNorm2d(4, affine=True)),
    "layer norm": lambda: convolutional(nn.LayerNorm((6, 6))),
    "group norm": lambda: convolutional(nn.GroupNorm(2, 4)),
    "attention": Attending,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("times", [2, 3])
def test_derivatives_against_differences(name: str, times: int) -> None:
    """Derivatives of the gradient's norm along a line in float64, the last one against a central difference to 1e-5."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    images, labels = digits(12, flat=False)
    batch = (images.double(), labels)
    network = functional(model)
    direction = {key: torch.randn_like(value) for key, value in network.weights.items()}

    def along(place: float) -> tuple[float, float]:
        """Norm of the gradient, and its slope along `direction`, at a place of the line."""
        at = torch.tensor(place, dtype=torch.float64, requires_grad=True)
        gradient = network.gradient(
            {key: value + at * direction[key] for key, value in network.weights.items()}, batch, graph=True
        )
        value = gradient.norm()
        slope = network.derivative(value, [at], graph=times > 2)
        if times > 2:
            return slope.item(), network.derivative(slope.sum(), [at]).item()
        return value.item(), slope.item()

    here, step = 0.3, 1e-5  # at 0 equal pixels tie in max pooling
    with network.differentiable(times):
        _, slope = along(here)
        difference = (along(here + step)[0] - along(here - step)[0]) / (2 * step)
    assert slope == pytest.approx(difference, rel=1e-5, abs=1e-6)


def test_composed_norms_agree_with_those_of_torch() -> None:
    """Loss and gradient of the norms made of elementary operations, to 1e-5."""
    batch = digits(32, flat=False)
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm((6, 6))
    for norm in norms:
        network = functional(convolutional(norm))
        weights = _wanting_gradients(network)
        with network.differentiable(2):
            native = network.gradient(weights, batch)
        with network.differentiable(3):
            composed = network.gradient(weights, batch)
        torch.testing.assert_close(native, composed, rtol=1e-4, atol=1e-5)


def test_gradient_is_that_of_the_model() -> None:
    """Against `backward` on the model in training mode, whose batch norm uses the same statistics."""
    model, batch = convolutional(nn.BatchNorm2d(4)), digits(32, flat=False)
    network = functional(model)
    with network.differentiable():
        gradient = network.unflattened(network.gradient(_wanting_gradients(network), batch))
    reference = copy.deepcopy(model)
    F.cross_entropy(reference(batch[0]), batch[1]).backward()
    assert gradient.keys() == dict(reference.named_parameters()).keys()
    for name, value in reference.named_parameters():
        torch.testing.assert_close(gradient[name], value.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_model_is_untouched() -> None:
    model = nn.Sequential(convolutional(nn.BatchNorm2d(4)), nn.Dropout(0.5))
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    network = functional(model)
    with network.differentiable():
        network.gradient(_wanting_gradients(network), digits(32, flat=False))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training for module in model.modules())
    assert all(value.requires_grad and value.grad is None for value in model.parameters())


def test_tied_frozen_and_half_precision_weights() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    model[2].weight = model[0].weight
    model[4].bias.requires_grad_(False)
    network = functional(model.bfloat16())
    assert set(network.weights) == {"0.weight", "0.bias", "2.bias", "4.weight"}
    assert all(value.dtype is torch.float32 for value in network.weights.values())
    images, labels = digits(32)
    with network.differentiable():
        gradient = network.unflattened(network.gradient(_wanting_gradients(network), (images.bfloat16(), labels)))
    reference = copy.deepcopy(model).float()
    F.cross_entropy(reference(images.bfloat16().float()), labels).backward()
    torch.testing.assert_close(gradient["0.weight"], reference[0].weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_modes_of_the_caller(mode) -> None:
    model = nn.Linear(64, 10)
    expected = torch.autograd.grad(F.cross_entropy(model(digits(8)[0]), digits(8)[1]), list(model.parameters()))
    with mode():
        network = functional(model)
        with network.differentiable():
            gradient = network.gradient(_wanting_gradients(network), digits(8))
    torch.testing.assert_close(gradient, torch.cat([part.flatten() for part in expected]))


def test_cutting_batches() -> None:
    """Tensors without the axis of examples, such as masks, are passed on whole."""
    mask = torch.eye(3)
    batch = ({"tokens": torch.arange(12).reshape(4, 3), "mask": mask}, torch.arange(4))
    assert size_of(batch) == 4
    cut = examples(batch, 1, 3)
    assert torch.equal(cut[0]["tokens"], batch[0]["tokens"][1:3]) and cut[0]["mask"] is mask
    assert cut[1].tolist() == [1, 2]
    with pytest.raises(DataError, match="no tensor with an axis of examples"):
        size_of((torch.tensor(1.0), None))


def test_batches_come_round_again() -> None:
    batches = cycled([1, 2], "test")
    assert [next(batches) for _ in range(5)] == [1, 2, 1, 2, 1]
    with pytest.raises(DataError, match="test needs data, but the data passed is empty"):
        next(cycled([], "test"))


def _connectionist(outputs: Tensor, labels: Tensor) -> Tensor:
    """The loss of torch that has one derivative, over one step of time."""
    ones = torch.ones(len(labels), dtype=torch.long)
    return F.ctc_loss(outputs.log_softmax(1)[None], labels.clamp_min(1)[:, None], ones, ones)


def test_a_loss_with_one_derivative_is_refused() -> None:
    network = functional(nn.Linear(64, 10), _connectionist)
    weights = _wanting_gradients(network)
    with network.differentiable():
        gradient = network.gradient(weights, digits(8), graph=True)
        with pytest.raises(ModelError, match="no derivative of the order that is needed .*not implemented"):
            network.derivative(gradient.norm(), list(weights.values()))


@pytest.mark.parametrize(
    ("batch", "loss", "error", "words"),
    [
        (digits(8), lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="none"), ModelError,
         r"scalar tensor, got shape \(8,\); take the mean"),
        (digits(8), lambda outputs, labels: 1.0, ModelError, "scalar tensor, got float"),
        (digits(8), lambda outputs, labels: (outputs.argmax(1) == labels).float().mean(), ModelError,
         "not differentiable with respect to any weight"),
        (digits(8), lambda outputs, labels: outputs.sum() * torch.inf, ModelError,
         r"sane scale first, as in 'he\+lsuv\+test'"),
        (digits(8), lambda outputs: outputs.sum(), DataError, "loss cannot be taken"),
        (digits(8, flat=False), F.cross_entropy, ModelError, "Linear cannot be run on a batch of the data"),
        ((digits(8)[0], torch.zeros(3, dtype=torch.long)), F.cross_entropy, DataError, "loss cannot be taken"),
        (digits(8)[0], F.cross_entropy, DataError, r"needs batches \(inputs, targets\), got Tensor"),
    ],
)  # fmt: skip
def test_what_is_refused(batch, loss, error: type[Exception], words: str) -> None:
    network = functional(nn.Linear(64, 10), loss)
    with network.differentiable(), pytest.raises(error, match=words):
        network.gradient(_wanting_gradients(network), batch)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, "cross_entropy", None])
def test_a_loss_that_is_no_function(loss) -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(ConfigError, match=r"needs a function loss\(outputs, targets\), got .*CrossEntropyLoss\(\)"):
        Functional(model, loss, inventory(model), "nio")


def test_hard_sigmoid_has_a_second_derivative() -> None:
    """Torch's has none, and MobileNets are full of them; the stand-in has its values and its first derivative."""
    model = nn.Sequential(nn.Linear(64, 16), nn.Hardsigmoid(), nn.Linear(16, 10))
    network = functional(model)
    weights = {name: value.requires_grad_() for name, value in network.weights.items()}
    first = torch.autograd.grad(F.cross_entropy(model(digits(8)[0]), digits(8)[1]), list(model.parameters()))
    with network.differentiable():
        gradient = network.gradient(weights, digits(8), graph=True)
        assert network.derivative(gradient.square().sum(), list(weights.values())).any()
    torch.testing.assert_close(gradient.detach(), torch.cat([part.flatten() for part in first]))
