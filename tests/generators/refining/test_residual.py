"""Fixup, zero-gamma and SkipInit: against rules written out by name, and by what the networks then compute."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from generators import initialiser
from generators.filling import init
from generators.initialiser import Kind, register
from generators.pointwise import HE, Pointwise

timm = pytest.importorskip("timm")
models = pytest.importorskip("torchvision.models")


class Block(nn.Module):
    """A residual block as Fixup wants it: no normalisation, scalar biases, one scalar multiplier."""

    def __init__(self, width: int, layers: int, wrap: Callable = lambda layer: layer) -> None:
        super().__init__()
        self.layers = nn.ModuleList(wrap(nn.Conv2d(width, width, 3, padding=1)) for _ in range(layers))
        self.biases = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(layers))
        self.scale = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for bias, layer in zip(self.biases, self.layers, strict=True):
            y = layer(F.relu(y + bias))
        return x + y * self.scale


class Net(nn.Module):
    """Stem, residual blocks, classifier, for `[N, 1, 8, 8]`."""

    def __init__(self, blocks: int, layers: int, width: int = 8, wrap: Callable = lambda layer: layer) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width, layers, wrap) for _ in range(blocks)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    """32 real handwritten digits, `[N, 1, 8, 8]`, standardised."""
    pixels = torch.tensor(load_digits().images[:32], dtype=torch.float32)[:, None]
    return (pixels - pixels.mean()) / pixels.std()


IMAGE = torch.zeros(2, 1, 8, 8)


@pytest.mark.parametrize(("blocks", "layers"), [(5, 2), (3, 3), (4, 1), (1, 4)])
def test_fixup_by_name(blocks: int, layers: int) -> None:
    """Every tensor is what the rules of the paper make of it, written out for this network."""
    model = Net(blocks, layers)
    init(model, "he", seed=1)
    before = copy.deepcopy(model.state_dict())
    report = init(model, "fixup", example_inputs=IMAGE)
    for name, value in model.state_dict().items():
        if name.endswith("scale"):
            expected = torch.ones(1)
        elif "bias" in name or name == "head.weight" or f"layers.{layers - 1}.weight" in name:
            expected = torch.zeros_like(value)
        elif "layers" in name:
            expected = before[name] * blocks ** (-1 / (2 * layers - 2))
        else:
            expected = before[name]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0, msg=name)
    assert report.figures["fixup"]["branches"] == blocks
    assert not report.notes
    if layers > 1:
        assert report.statistics["blocks.0.layers.0.weight"]["scale"] == pytest.approx(
            blocks ** (-1 / (2 * layers - 2))
        )


def test_fixup_changes_by_the_step_not_by_the_depth(images: Tensor) -> None:
    """One step of SGD moves the outputs about as far with 40 blocks as with 4; from He it explodes."""

    def moved(spec: str, blocks: int) -> float:
        model = Net(blocks, 2)
        init(model, spec, seed=0, example_inputs=IMAGE)
        with torch.no_grad():
            model.head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        outputs = model(images)
        F.cross_entropy(outputs, torch.arange(32) % 10).backward()
        with torch.no_grad():
            for value in model.parameters():
                if value.grad is not None:
                    value -= 1e-4 * value.grad
            return (model(images) - outputs).norm().item()

    assert 0.3 < moved("he+fixup", 40) / moved("he+fixup", 4) < 3
    assert not moved("he", 40) / moved("he", 4) < 1e3


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_fixup_sets_the_gain_where_the_weight_is_normalised(wrap: Callable) -> None:
    """The weight that the layer uses is scaled or 0, finite, and its gradient lives."""
    model = Net(3, 2, wrap=wrap)
    before = [block.layers[0].weight.detach().clone() for block in model.blocks]
    init(model, "fixup", example_inputs=IMAGE)
    model(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))  # old weight norm computes it here
    for block, weight in zip(model.blocks, before, strict=True):
        torch.testing.assert_close(block.layers[0].weight.detach(), weight * 3**-0.5)
        assert block.layers[1].weight.eq(0).all()


def test_fixup_leaves_what_no_factor_comes_through() -> None:
    model = Net(2, 2, wrap=parametrizations.spectral_norm)
    report = init(model, "fixup", example_inputs=IMAGE)
    assert any("computed: blocks.0.layers.0" in note for note in report.notes)
    assert model(IMAGE).isfinite().all()
    assert not any("layers" in name and "weight" in name for name in report.generated)


def test_fixup_leaves_a_tied_classifier() -> None:
    """Zeros for it would be zeros for the embedding."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            return self.head(x + self.layers(x))

    model = Tied()
    before = model.embedding.weight.detach().clone()
    report = init(model, "fixup", example_inputs=torch.zeros(1, 5, dtype=torch.long))
    assert torch.equal(model.embedding.weight, before)
    assert any("tied or computed: " in note for note in report.notes)
    assert model.layers[2].weight.eq(0).all()


def test_fixup_on_networks_that_it_was_not_made_for() -> None:
    """Normalisation and missing scalars are told; branches are scaled all the same."""
    model = models.resnet18(num_classes=10)
    before = model.layer2[0].conv1.weight.detach().clone()
    report = init(model, "fixup")
    assert any("20 layers of it" in note for note in report.notes)
    assert sum("none were added" in note for note in report.notes) == 2
    torch.testing.assert_close(model.layer2[0].conv1.weight.detach(), before * 8**-0.5)
    assert model.layer2[0].conv2.weight.eq(0).all() and model.fc.weight.eq(0).all()
    assert "layer2.0.downsample.0.weight" in report.kept and "bn1.weight" in report.kept


@pytest.mark.parametrize("make", [models.resnet18, models.resnet50])
def test_zero_gamma_is_what_torchvision_can_do(make: Callable) -> None:
    """The same tensors are 0 as with torchvision's own zero_init_residual."""
    model, theirs = make(num_classes=2), make(num_classes=2, zero_init_residual=True)
    before = copy.deepcopy(model.state_dict())
    report = init(model, "zero-gamma")
    for name, value in model.state_dict().items():
        scale = name.endswith("weight") and value.ndim == 1
        zeros = scale and theirs.get_parameter(name).eq(0).all()
        assert torch.equal(value, torch.zeros_like(value) if zeros else before[name]), name
        assert (name in report.generated) == bool(zeros)
    assert not report.notes


def test_zero_gamma_makes_blocks_identities() -> None:
    """Blocks of MobileNetV2 with a shortcut hand their input on, those without do not."""
    model = models.mobilenet_v2(num_classes=2)
    init(model, "he+zero-gamma", seed=0)
    draws = torch.Generator().manual_seed(0)
    for block in model.features[1:-1]:
        x = torch.randn(2, block.conv[0][0].in_channels, 8, 8, generator=draws)
        assert torch.equal(block(x), x) if block.use_res_connect else not block(x).eq(0).all()


@pytest.mark.parametrize(
    ("make", "zeroed", "note"),
    [
        (lambda: timm.create_model("convnext_atto", num_classes=2), 12, ""),  # layer scales
        (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=2, depth=2), 0, "4 of 4 branches"),
        (lambda: timm.create_model("seresnet18", num_classes=2), 8, ""),
        (lambda: timm.create_model("resnetv2_50", num_classes=2, layers=(1, 1, 1, 1)), 0, "4 of 4 branches"),
    ],
)
def test_zero_gamma_elsewhere(make: Callable, zeroed: int, note: str) -> None:
    report = init(make(), "zero-gamma")
    assert len(report.generated) == zeroed
    assert note in " ".join(report.notes) and bool(note) == bool(report.notes)


def test_skipinit(images: Tensor) -> None:
    """The number at the end of each branch is 0, so the blocks hand their input on; nothing else moves."""
    model = Net(3, 2)
    before = copy.deepcopy(model.state_dict())
    report = init(model, "skipinit", example_inputs=IMAGE)
    assert set(report.generated) == {f"blocks.{index}.scale" for index in range(3)} and not report.notes
    for name, value in model.state_dict().items():
        assert torch.equal(value, torch.zeros(1) if name.endswith("scale") else before[name])
    stem = model.stem(images)
    assert torch.equal(model.blocks(stem), stem)
    report = init(models.resnet18(num_classes=2), "skipinit")
    assert not report.generated and "8 of 8 branches have no number" in report.notes[0]


@pytest.mark.parametrize("name", ["fixup", "zero-gamma", "skipinit"])
def test_models_without_branches(name: str) -> None:
    """Nothing is changed, and a note says why."""
    for model, inputs in (
        (models.squeezenet1_1(num_classes=2), None),
        (nn.LSTM(4, 4), torch.zeros(3, 2, 4)),
        (timm.create_model("densenet121", growth_rate=4, block_config=(2, 2), num_classes=2), None),
    ):
        before = copy.deepcopy(model.state_dict())
        report = init(model, name, example_inputs=inputs)
        assert not report.generated and "no residual branches" in report.notes[0]
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["fixup", "zero-gamma", "skipinit"])
def test_half_precision_and_frozen(name: str) -> None:
    model = Net(2, 2).bfloat16()
    model.blocks[0].requires_grad_(False)
    before = copy.deepcopy(model.blocks[0].state_dict())
    report = init(model, f"he+{name}", example_inputs=IMAGE.bfloat16())
    assert all(value.dtype == torch.bfloat16 for value in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.blocks[0].state_dict().items())
    assert not any(key.startswith("blocks.0") for key in report.generated)


def test_zeros_after_a_generator_are_no_collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialiser, "_REGISTRY", dict(initialiser._REGISTRY))
    initialiser.list_initialisers()
    register("learned", kind=Kind.GLOBAL)(lambda: Pointwise("learned", HE.draw, kind=Kind.GLOBAL))
    model = Net(2, 2)
    init(model, "learned+fixup", example_inputs=IMAGE)
    assert model.head.weight.eq(0).all() and model.blocks[0].layers[0].weight.std() > 0
