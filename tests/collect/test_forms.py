"""The fast forms against the loop, the loop against the modules themselves, and what no form can run."""

import itertools
import math
import os
import shutil
import warnings

import pytest
import torch
from torch import Tensor, nn

from collect import architectures, forms
from collect.data import load
from collect.forms import Form, Loop, Vmap, choose, template
from collect.grouped import Grouped, Tensors, UnsupportedError
from collect.metrics import losses
from collect.population import train
from collect.recipe import Recipe
from generators.filling import init

SHAPE = (1, 8, 8)
NETWORKS = ("resnet-8-w4", "vgg-3-w5", "mobilenet-4-w6", "cnn-3-w8", "mlp-2-w12", "vit-2-w16")
MEMBERS = 3


def _modules(name: str, count: int = MEMBERS, classes: int = 10) -> list[nn.Module]:
    """He-initialised networks whose norm and token parameters are moved away from their special values."""
    modules = [architectures.build(name, shape=SHAPE, classes=classes) for _ in range(count)]
    generator = torch.Generator().manual_seed(1)
    for seed, module in enumerate(modules):
        init(module, "he", seed=seed)
        for value in module.parameters():
            value.data += 0.05 * torch.randn(value.shape, generator=generator)
    return modules


def _state(modules: list[nn.Module]) -> tuple[Tensors, Tensors]:
    parameters = [dict(module.named_parameters()) for module in modules]
    buffers = [dict(module.named_buffers()) for module in modules]
    return (
        {name: torch.stack([own[name].detach() for own in parameters]).requires_grad_() for name in parameters[0]},
        {name: torch.stack([own[name] for own in buffers]) for name in buffers[0]},
    )


def _images(count: int, *, seed: int = 0, members: int | None = None) -> Tensor:
    shape = (count, *SHAPE) if members is None else (members, count, *SHAPE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", [Grouped, Vmap])
@pytest.mark.parametrize("name", NETWORKS)
def test_form_is_the_loop(name: str, kind: type[Form]) -> None:
    """Logits, gradients (to 1e-6 of the largest) and running statistics in float32, each member with its own images."""
    modules, images = _modules(name), _images(16, members=MEMBERS)
    labels = torch.randint(10, (MEMBERS, 16), generator=torch.Generator().manual_seed(2))
    results = []
    for form in (kind(template(name, shape=SHAPE, classes=10)), Loop(template(name, shape=SHAPE, classes=10))):
        parameters, buffers = _state(modules)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")  # pooling under vmap
            logits = form(parameters, buffers, images, training=True)
        gradients = torch.autograd.grad(losses(logits, labels).sum(), list(parameters.values()))
        results.append((logits, gradients, buffers))
    (logits, gradients, buffers), (slow_logits, slow_gradients, slow_buffers) = results
    torch.testing.assert_close(logits, slow_logits, rtol=1e-5, atol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in slow_gradients)
    for gradient, slow in zip(gradients, slow_gradients, strict=True):
        assert float((gradient - slow).abs().max()) <= 1e-6 * max(1.0, largest)
    for key, value in buffers.items():
        torch.testing.assert_close(value, slow_buffers[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_loop_is_the_module(name: str) -> None:
    """The reference of the test above against plain calls, in training and in evaluation."""
    modules, images = _modules(name), _images(16, members=MEMBERS)
    parameters, buffers = _state(modules)
    loop = Loop(template(name, shape=SHAPE, classes=10))
    for training in (True, False):
        found = loop(parameters, buffers, images, training=training)
        for member, module in enumerate(modules):
            torch.testing.assert_close(found[member], module.train(training)(images[member]), rtol=1e-5, atol=1e-5)
    for member, module in enumerate(modules):
        for key, value in module.named_buffers():
            torch.testing.assert_close(buffers[key][member], value)


@pytest.mark.parametrize("name", [family.example for family in architectures.FAMILIES.values()])
def test_every_family_gets_the_grouped_form_on_small_images(name: str) -> None:
    """Large feature maps leave the cache, so the loop is faster there; an mlp has none, a vit has few patches."""
    assert choose(name, shape=SHAPE, classes=10).name == "grouped"
    assert choose(name, shape=(3, 32, 32), classes=10).name == (
        "grouped" if name.startswith(("mlp", "vit")) else "loop"
    )


def _step(loop: Loop, members: int, name: str = "vgg-3-w5") -> tuple[Tensor, list[Tensor], Tensors]:
    """Logits, gradients and buffers after one training pass of `members` members."""
    modules, images = _modules(name, members), _images(16, members=members)
    labels = torch.randint(10, (members, 16), generator=torch.Generator().manual_seed(2))
    parameters, buffers = _state(modules)
    logits = loop(parameters, buffers, images, training=True)
    gradients = torch.autograd.grad(losses(logits, labels).sum(), list(parameters.values()))
    return logits.detach(), list(gradients), buffers


def test_compiled_steps_are_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    """Logits, gradients and running statistics, to the rounding of fused sums."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler")
    module = template("vgg-3-w5", shape=SHAPE, classes=10)
    compiled = Loop(module, compiled=True)
    logits, gradients, buffers = _step(compiled, 1)
    assert compiled.name == "compiled"
    assert not [record for record in caplog.records if record.name.startswith("collect")]
    slow_logits, slow_gradients, slow_buffers = _step(Loop(module), 1)
    torch.testing.assert_close(logits, slow_logits, rtol=1e-4, atol=1e-4)
    for gradient, slow in zip(gradients, slow_gradients, strict=True):
        torch.testing.assert_close(gradient, slow, rtol=1e-3, atol=1e-5)
    for key, value in buffers.items():
        torch.testing.assert_close(value, slow_buffers[key], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_compiled_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **options: refuse)
    module = template("vgg-3-w5", shape=SHAPE, classes=10)
    loop = Loop(module, compiled=True)
    assert loop.name == "compiled"
    logits, gradients, _ = _step(loop, 1)
    assert "no compiler" in caplog.text and loop.name == "loop"
    slow_logits, slow_gradients, _ = _step(Loop(module), 1)
    assert torch.equal(logits, slow_logits)
    assert all(torch.equal(*pair) for pair in zip(gradients, slow_gradients, strict=True))


def test_bfloat16_is_near_single_precision_and_leaves_weights_and_logits_in_it() -> None:
    """bfloat16 has 8 bits: relative errors of products are up to 2^-8, and they average out."""
    module = template("vgg-3-w5", shape=SHAPE, classes=10)
    logits, gradients, buffers = _step(Loop(module, precision="bfloat16"), 2)
    slow_logits, slow_gradients, slow_buffers = _step(Loop(module), 2)
    tensors = [logits, *gradients, *(value for value in buffers.values() if value.is_floating_point())]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    error = (logits - slow_logits).norm() / slow_logits.norm()
    assert 1e-4 < error < 0.03
    for gradient, slow in zip(gradients, slow_gradients, strict=True):
        assert torch.cosine_similarity(gradient.flatten(), slow.flatten(), dim=0) > 0.95
    for key, value in buffers.items():
        torch.testing.assert_close(value, slow_buffers[key], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, "grouped"), ({"precision": "bfloat16"}, "loop"), ({"precision": "bfloat16", "compiled": True}, "compiled")],
)
def test_precision_and_compiling_are_for_the_loop(options: dict, expected: str) -> None:
    form = choose("vgg-3-w5", shape=SHAPE, classes=10, **options)
    assert form.name == expected and getattr(form, "precision", "float32") == options.get("precision", "float32")


class _Wrong(Grouped):
    """A form whose members leak into each other by one millionth."""

    name = "wrong"

    def __call__(self, parameters: Tensors, buffers: Tensors, images: Tensor, *, training: bool) -> Tensor:
        logits = super().__call__(parameters, buffers, images, training=training)
        return logits + 1e-6 * logits.flip(0)


def test_a_form_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    choose.cache_clear()
    monkeypatch.setattr(forms, "FORMS", (_Wrong, Vmap))
    assert choose("mlp-2-w12", shape=SHAPE, classes=10).name == "vmap"
    monkeypatch.setattr(forms, "FORMS", (_Wrong,))
    assert choose("mlp-3-w12", shape=SHAPE, classes=10).name == "loop"
    choose.cache_clear()


class _Branching(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images if images.sum() > 0 else -images


class _Multiplying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images) * 2


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (_Branching(), "not traceable"),
        (_Multiplying(), "operation"),
        (nn.Sequential(nn.Flatten(), nn.Tanh(), nn.Linear(64, 10)), "operation"),
    ],
)
def test_grouped_form_refuses_what_it_has_no_rule_for(module: nn.Module, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        Grouped(module)


def test_convolution_with_other_padding_is_refused_when_run() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"))
    parameters, buffers = _state([module, module])
    with pytest.raises(UnsupportedError, match="reflect"):
        Grouped(module)(parameters, buffers, _images(2, members=2), training=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # pooling under vmap
def test_the_three_forms_train_networks_of_equal_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test accuracies of eight seeds after three epochs: means within two standard errors of each other."""
    recipe, images = Recipe(architecture="cnn-3-w8", epochs=3, lr=0.1), load("digits")
    reached = {}
    for kinds in ((Grouped,), (Vmap,), ()):
        choose.cache_clear()
        monkeypatch.setattr(forms, "FORMS", kinds)
        used = choose(recipe.architecture, shape=images.shape, classes=10).name
        population = train(recipe, range(8), images, stack=8)
        reached[used] = population.metrics[:, -1, population.metric_names.index("test_accuracy")]
    choose.cache_clear()
    assert reached.keys() == {"grouped", "vmap", "loop"}
    for one, other in itertools.combinations(reached.values(), 2):
        error = math.sqrt((one.var(ddof=1) + other.var(ddof=1)) / len(one))
        assert abs(one.mean() - other.mean()) <= 2 * error, reached
    assert min(accuracies.mean() for accuracies in reached.values()) > 0.5, "they have learned something"
