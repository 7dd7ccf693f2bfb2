"""GradCosine: ranges, the formula against a slow reference, its properties, and that the model is left as it was."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import generators
from generators.errors import ConfigError, DataError, ModelError
from generators.functional import Functional
from generators.gradients import _by_loop, _by_vmap, cosine_and_norms, norms_of, ranges
from generators.inventory import inventory
from small_digits import deep_mlp, digit_batches, digits

TWO_PARTS = [(0, 76), (51, 128)]  # of 128 examples with an overlap of 0.2, as in the authors' code


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 10)
    )  # fmt: skip


def _gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    return torch.cat([value.grad.flatten() for value in model.parameters()])


def _reference(gradients: list[Tensor]) -> float:
    pairs = list(itertools.permutations(gradients, 2))
    return sum(F.cosine_similarity(first, second, dim=0).item() for first, second in pairs) / len(pairs)


def test_ranges() -> None:
    assert ranges(128, 2, 0.2) == TWO_PARTS
    assert ranges(128, 2, 0.0) == [(0, 64), (64, 128)]
    assert ranges(64, 4, 0.2) == [(0, 19), (12, 35), (28, 51), (44, 64)]  # inner parts reach out on both sides alike
    assert ranges(10, 3, 0.0) == [(0, 3), (3, 6), (6, 10)]
    assert ranges(8, 2, 1.0) == [(0, 8), (0, 8)]


@pytest.mark.parametrize("overlap", [0.0, 0.2])
def test_against_a_loop_of_backward(overlap: float) -> None:
    """Cosine to 1e-5 and norms of two batches, with gradients by `backward` on the model in training mode."""
    model, data = convolutional(), digit_batches(256, 128, flat=False)
    model[3].p = 0.0
    found = generators.grad_cosine(model, data, F.cross_entropy, overlap=overlap)
    parts = TWO_PARTS if overlap else [(0, 64), (64, 128)]
    gradients = [[_gradient(model, x[a:b], y[a:b]) for a, b in parts] for x, y in data]
    assert found.cosine == pytest.approx(sum(map(_reference, gradients)) / 2, abs=1e-5)
    assert found.norms == tuple(
        tuple(pytest.approx(gradient.norm().item(), rel=1e-4) for gradient in batch) for batch in gradients
    )
    assert found.gradient_norm == pytest.approx(sum(map(sum, found.norms)) / 4, rel=1e-5)


def test_properties() -> None:
    """Bounds, symmetry under a swap of parts, 1 for equal parts, invariance to a factor of the loss."""
    model, (images, labels) = deep_mlp(2), digits(64)

    def cosine(images: Tensor, labels: Tensor, factor: float = 1.0) -> float:
        loss = lambda outputs, targets: factor * F.cross_entropy(outputs, targets)  # noqa: E731
        return generators.grad_cosine(model, [(images, labels)], loss).cosine

    found = cosine(images, labels)
    assert -1.0 <= found <= 1.0
    assert cosine(images.roll(32, 0), labels.roll(32, 0)) == pytest.approx(found, abs=1e-6)
    assert cosine(images, labels, 7.0) == pytest.approx(found, abs=1e-6)
    assert cosine(images[:32].repeat(2, 1), labels[:32].repeat(2)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("build", [deep_mlp, convolutional])
def test_examples_by_vmap_and_by_loop(build) -> None:
    """The gradients agree, and so does the public figure with both."""
    torch.manual_seed(0)
    model, batch = build(), digits(20, flat=build is deep_mlp)
    network = Functional(model, F.cross_entropy, inventory(model), "test")
    with network.differentiable():
        weights = {name: value.requires_grad_() for name, value in network.weights.items()}
        fast = torch.cat(list(_by_vmap(network, weights, batch)))
        slow = torch.cat(list(_by_loop(network, weights, batch)))
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-5)
    found = generators.grad_cosine(model, [batch], F.cross_entropy, per_sample=True)
    assert found.cosine == pytest.approx(_reference(list(slow)), abs=1e-5)
    assert len(found.norms[0]) == 20
    assert found.gradient_norm == pytest.approx(slow.norm(dim=1).mean().item(), rel=1e-4)


class Branching(nn.Module):
    """Asks for a value on the way, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.linear(images)
        return hidden if hidden.mean().item() > 0 else -hidden


def test_examples_of_a_model_that_vmap_refuses() -> None:
    model, batch = Branching(), digits(6)
    found = generators.grad_cosine(model, [batch], F.cross_entropy, per_sample=True)
    slow = [_gradient(model, x[None], y[None]) for x, y in zip(*batch, strict=True)]
    assert found.cosine == pytest.approx(_reference(slow), abs=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = convolutional()
    model[4].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*digits(64, flat=False)), batch_size=16, shuffle=True
    )
    for per_sample in (False, True):
        first = generators.grad_cosine(model, loader, F.cross_entropy, per_sample=per_sample, batches=2)
        assert first == generators.grad_cosine(model, loader, F.cross_entropy, per_sample=per_sample, batches=2)
        assert len(first.norms) == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model] == [True, True, True, True, False, True]
    assert all(value.grad is None and value.requires_grad for value in model.parameters())


def test_norms_of_huge_and_zero_vectors() -> None:
    rows = torch.tensor([[3e30, 4e30], [0.0, 0.0], [3.0, -4.0]])
    torch.testing.assert_close(norms_of(rows), torch.tensor([5e30, 0.0, 5.0]))
    torch.testing.assert_close(norms_of(rows, 1.0), torch.tensor([7e30, 0.0, 7.0]))
    assert cosine_and_norms(torch.zeros(2, 3))[0] == 0.0


@pytest.mark.parametrize(
    ("data", "settings", "error", "words"),
    [
        ([], {}, DataError, "data passed is empty"),
        (digit_batches(3, 3), dict(parts=4), DataError, "batch of 3 cannot be cut into 4 parts; use larger batches"),
        (digit_batches(1, 1), dict(per_sample=True), DataError, "batch of 1 cannot be cut into 2"),
        (digit_batches(8, 8), dict(parts=1), ConfigError, "2 or more parts"),
        (digit_batches(8, 8), dict(overlap=1.5), ConfigError, "overlap by 0 to 1"),
        (digit_batches(8, 8, flat=False), {}, ModelError, "cannot be run on a batch"),
    ],
)
def test_what_is_refused(data: list, settings: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        generators.grad_cosine(deep_mlp(1), data, F.cross_entropy, **settings)


def test_frozen_models_have_no_gradient() -> None:
    with pytest.raises(ModelError, match="no parameter of the model is trainable"):
        generators.grad_cosine(deep_mlp(1).requires_grad_(False), digit_batches(8, 8), F.cross_entropy)


def test_recurrent_layers_are_taken_example_by_example_without_a_warning() -> None:
    """Warnings are errors here; torch has no batching rule for recurrent layers and would say so."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 10)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.lstm(images.flatten(1).unflatten(1, (8, 8)))[0][:, -1])

    (batch,) = digit_batches(4, 4)
    found = generators.grad_cosine(Reader(), [batch], F.cross_entropy, per_sample=True)
    assert len(found.norms[0]) == 4 and -1 <= found.cosine <= 1
    assert found.gradient_norm > 0


def test_batches_that_are_mappings_with_a_loss_that_looks_into_them() -> None:
    """As the models of transformers have it: labels among the inputs, the loss among the outputs."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.layer(pixels.flatten(1))
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    (batch,), model = digit_batches(8, 8), Own()
    inside = generators.grad_cosine(
        model, [{"pixels": batch[0], "labels": batch[1]}], lambda outputs, _: outputs["loss"]
    )
    plain = nn.Sequential(nn.Flatten(), model.layer)
    outside = generators.grad_cosine(plain, [batch], F.cross_entropy)
    assert inside.cosine == pytest.approx(outside.cosine, rel=1e-5)
