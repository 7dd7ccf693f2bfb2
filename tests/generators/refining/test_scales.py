"""The scale optimiser: what holds for every objective, its Adam and its gradient against slow references."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators.errors import ConfigError, DataError, ModelError
from generators.filling import init
from generators.functional import Functional
from generators.inventory import inventory
from generators.refining.gradinit import GradInit
from generators.refining.metainit import MetaInit
from generators.refining.nio import NIO
from generators.refining.scales import Point, ScaleOptimiser, SharedAdam
from small_digits import deep_mlp, digit_batches, digits
from small_models import attention_block

METHODS: dict[str, ScaleOptimiser] = {
    "nio": NIO(iterations=4), "gradinit": GradInit(iterations=4), "metainit": MetaInit(iterations=4, learning_rate=0.05)
}  # fmt: skip
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10)
    )  # fmt: skip


def _exploding(factor: float) -> nn.Sequential:
    """He weights of a deep network, all times `factor`."""
    model = deep_mlp()
    init(model, "he", seed=0)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(factor)
    return model


@every_method
def test_only_scales_change(method: ScaleOptimiser) -> None:
    """Each tensor is parallel to its start to 1e-6, by the scale in the report, within the bounds; zeros stay zeros."""
    model, data = convolutional(), digit_batches(128, 64, flat=False)
    init(model, "he", seed=0)
    with torch.no_grad():
        model[0].bias.normal_(generator=torch.Generator().manual_seed(0))
    model[0].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = init(model, replace(method, learning_rate=0.5), data=data, loss=F.cross_entropy)
    for name, value in model.state_dict().items():
        if name not in report.generated or not before[name].any():
            assert torch.equal(value, before[name]), name
            continue
        row = report.statistics[name]
        torch.testing.assert_close(value, before[name] * row["scale"])
        assert row["scale"] >= (0.0 if name.endswith("bias") else 0.01 - 1e-8)
        if row["scale"]:
            cosine = F.cosine_similarity(value.flatten().double(), before[name].flatten().double(), dim=0)
            assert cosine == pytest.approx(1.0, abs=1e-6)
        assert row["std_before"] == pytest.approx(before[name].std().item(), rel=1e-5, abs=1e-6)
        assert row["std_after"] == pytest.approx(value.std().item(), rel=1e-5, abs=1e-6)
    assert {"0.weight", "0.bias", "1.weight", "5.weight"} == set(report.generated)
    assert any(abs(row["scale"] - 1) > 0.1 for row in report.statistics.values())
    assert report.kept["5.bias"] == f"zero, which {method.name} cannot scale"
    assert [module.training for module in model] == [False, True, True, True, True, True]
    assert all(value.grad is None and value.requires_grad for value in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert set(report.figures[method.name]) == {
        "iterations", "constraint_iterations", "grad_cosine_before", "grad_cosine_after",
        "gradient_norm_before", "gradient_norm_after",
    }  # fmt: skip
    assert report.figures[method.name]["iterations"] == 4


@every_method
def test_deterministic_in_the_seed(method: ScaleOptimiser) -> None:
    """With a loader that shuffles: the same seed gives the same bits, another one others unless clipping hides it."""
    dataset = torch.utils.data.TensorDataset(*digits(96))
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)

    def made(seed: int) -> Tensor:
        model = deep_mlp(2)
        init(model, "he", seed=0)
        init(model, replace(method, clip=1e9), seed=seed, data=loader, loss=F.cross_entropy)
        return model[2].weight.detach()

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))


@every_method
def test_gradient_of_the_scales(method: ScaleOptimiser) -> None:
    """Autograd through `alpha theta0` against `<dF/dtheta, theta> |theta0| / |theta|` to 1e-5, away from 1."""
    torch.manual_seed(0)
    model = deep_mlp(2)
    network = Functional(model, F.cross_entropy, inventory(model), "test")
    start = network.weights
    first, second = digit_batches(128, 64)
    scales = torch.linspace(0.7, 1.4, len(start)).requires_grad_()

    def value(weights: dict[str, Tensor]) -> Tensor:
        point = Point(network, weights, first, second)
        return method.value(point, method.gradients(point))

    with network.differentiable(method.derivatives):
        weights = {key: scale * start[key] for key, scale in zip(start, scales.unbind(), strict=True)}
        slope = network.derivative(value(weights), [scales])
        leaves = {key: weight.detach().requires_grad_() for key, weight in weights.items()}
        by_weight = network.unflattened(network.derivative(value(leaves), list(leaves.values())))
    formula = [
        (by_weight[key] * leaf).sum() * start[key].norm() / leaf.norm() for key, leaf in leaves.items()
    ]  # fmt: skip
    torch.testing.assert_close(slope, torch.stack(formula).detach(), rtol=1e-5, atol=1e-5)


@every_method
def test_optimisers_built_before_stay_valid(method: ScaleOptimiser) -> None:
    model, (images, labels) = deep_mlp(2), digits(64)
    leaves = list(model.parameters())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    init(model, method, data=[(images, labels)], loss=F.cross_entropy)
    assert all(now is then for now, then in zip(model.parameters(), leaves, strict=True))
    assert all(isinstance(leaf, nn.Parameter) and leaf.is_leaf for leaf in leaves)
    before = [leaf.detach().clone() for leaf in leaves]
    F.cross_entropy(model(images), labels).backward()
    optimiser.step()
    assert all(not torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.layer = attention_block(fused=True), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.lstm(self.layer(self.block(images[:, 0])))[0][:, -1])


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_attention_recurrence_and_precision(method: ScaleOptimiser, dtype: torch.dtype) -> None:
    """Fused kernels with one derivative are avoided; half precision is fitted in float32 and written back."""
    model = Attending().to(dtype)
    images, labels = digits(16, flat=False)
    report = init(model, method, data=[(images.to(dtype), labels)], loss=F.cross_entropy)
    assert all(value.dtype is dtype for value in model.parameters())
    scales = [row["scale"] for row in report.statistics.values()]
    assert len(scales) > 10 and all(scale != 1.0 for scale in scales)


@every_method
def test_tied_and_frozen_weights(method: ScaleOptimiser) -> None:
    model = deep_mlp(3)
    model[4].weight = model[2].weight
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    report = init(model, method, data=digit_batches(64, 64), loss=F.cross_entropy)
    assert torch.equal(model[0].weight, before["0.weight"]) and "0.weight" in report.kept
    assert "2.weight" in report.generated and "4.weight" in report.kept
    assert model[4].weight is model[2].weight
    torch.testing.assert_close(model[4].weight, before["2.weight"] * report.statistics["2.weight"]["scale"])


@every_method
def test_a_dead_network_is_said_to_be(method: ScaleOptimiser) -> None:
    model = deep_mlp(1)
    with torch.no_grad():
        model[2].weight.mul_(0.0)
        model[2].bias.fill_(1.0)
    loss = lambda outputs, labels: (outputs - 1.0).square().mean()  # noqa: E731
    report = init(model, method, data=digit_batches(64, 64), loss=loss)
    assert report.notes == (f"{method.name}: the gradient is zero at the start, so nothing was done",)
    assert all(row["scale"] == 1.0 for row in report.statistics.values())


@pytest.mark.parametrize("method", [NIO(), GradInit(learning_rate=0.05, iterations=100)], ids=["nio", "gradinit"])
def test_an_explosive_start_is_rescued(method: ScaleOptimiser) -> None:
    """He weights times 4 in ten layers: gradients of 10^6 and more come within the bound."""
    model = _exploding(4.0)
    figures = init(model, method, data=digit_batches(512, 128), loss=F.cross_entropy).figures[method.name]
    assert figures["gradient_norm_before"] > 1e6
    assert figures["gradient_norm_after"] < 2 * method.gamma
    assert 10 < figures["constraint_iterations"] < 100


def _softmax(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels)


def _zeros() -> nn.Sequential:
    """Only what is frozen is not zero."""
    model = deep_mlp(1)
    model[0].requires_grad_(False)
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(not value.requires_grad)
    return model


@every_method
@pytest.mark.parametrize(
    ("build", "data", "loss", "error", "words"),
    [
        (deep_mlp, digit_batches(64, 64), lambda outputs, labels: outputs, ModelError, "scalar tensor, got shape"),
        (deep_mlp, digit_batches(64, 64), lambda outputs, labels: outputs.detach().sum(), ModelError,
         "not differentiable with respect to any weight"),
        (deep_mlp, digit_batches(1, 1), _softmax, DataError, "batch of 1 cannot be cut into 2 parts"),
        (_zeros, digit_batches(64, 64), _softmax, ModelError, "every trainable tensor of the model is zero.*'he[+]"),
        (deep_mlp, digit_batches(64, 64, flat=False), _softmax, ModelError, "cannot be run on a batch of the data"),
        (deep_mlp, [], _softmax, DataError, "data passed is empty"),
        (lambda: _exploding(1e6), digit_batches(64, 64), _softmax, ModelError, "loss is nan.*as in 'he[+]lsuv[+]"),
    ],
    ids=["no scalar", "no gradient", "small batch", "zeros", "misfit", "empty", "not finite"],
)  # fmt: skip
def test_what_is_refused(
    method: ScaleOptimiser, build: Callable, data: list, loss: Callable, error: type[Exception], words: str
) -> None:
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        init(model, method, data=data, loss=loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "make",
    [lambda: NIO(iterations=0), lambda: NIO(learning_rate=0.0), lambda: NIO(parts=1), lambda: GradInit(overlap=-0.1)],
)
def test_settings_that_make_no_sense(make: Callable) -> None:
    with pytest.raises(ConfigError):
        make()


def test_adam_of_one_kind_is_torchs() -> None:
    gradients = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.zeros(5), nn.Parameter(torch.zeros(5))
    adam, reference = SharedAdam(0.05, 1.0, (0.9, 0.999)), torch.optim.Adam([theirs], lr=0.05)
    for gradient in gradients:
        ours = ours - adam.step(gradient, constraint=False)
        theirs.grad = gradient.clamp(-1.0, 1.0)
        reference.step()
    torch.testing.assert_close(ours, theirs.detach())


def test_adam_of_two_kinds() -> None:
    """First moments and counters apart, one second moment, corrected by the sum of the counters; written out."""
    gradients = [0.5, -0.3, 0.9, 0.1, -0.8]
    kinds = [True, False, True, True, False]
    adam = SharedAdam(0.1, 1.0, (0.9, 0.99))
    first, count, second = {True: 0.0, False: 0.0}, {True: 0, False: 0}, 0.0
    for gradient, kind in zip(gradients, kinds, strict=True):
        count[kind] += 1
        first[kind] = 0.9 * first[kind] + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        spread = (second / (1 - 0.99 ** (count[True] + count[False]))) ** 0.5
        expected = 0.1 * first[kind] / (1 - 0.9 ** count[kind]) / (spread + 1e-8)
        assert adam.step(torch.tensor([gradient]), constraint=kind).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", [NIO(), GradInit(), MetaInit()], ids=lambda method: method.name)
def test_a_frozen_model_is_said_to_be(method: ScaleOptimiser) -> None:
    """Its tensors are not zero, they are not to be changed."""
    model = nn.Linear(64, 10).requires_grad_(False)
    with pytest.raises(ModelError, match="no parameter of the model is trainable.*frozen=True"):
        init(model, method, data=[digits(8)], loss=F.cross_entropy)
