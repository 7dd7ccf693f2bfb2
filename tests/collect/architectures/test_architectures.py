"""Every family builds for small and large images; names round-trip; impossible networks are refused with a way out."""

import pytest
import torch
from torch import nn

from collect import architectures
from collect.architectures import FAMILIES, Architecture
from collect.architectures.resnet import BareBlock, Shortcut
from collect.architectures.vit import HEAD_SIZE, Mix
from generators.errors import ConfigError, UnknownNameError


@pytest.mark.parametrize("family", architectures.families())
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_family_builds_runs_and_trains(family: str, shape: tuple[int, int, int]) -> None:
    """Contract of the registry: finite logits of the right shape, and a gradient for every parameter."""
    model = architectures.build(FAMILIES[family].example, shape=shape, classes=7)
    logits = model(torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (4, 7)
    assert logits.isfinite().all()
    gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("family", architectures.families())
def test_name_round_trips_and_depth_and_width_are_free(family: str) -> None:
    architecture = architectures.parse(FAMILIES[family].example)
    assert architecture.family == family
    assert architectures.parse(str(architecture)) == architecture

    def count(depth: int, width: int) -> int:
        model = architectures.build(Architecture(family, depth, width), shape=(1, 8, 8), classes=10)
        return sum(value.numel() for value in model.parameters())

    small = count(architecture.depth, architecture.width)
    assert count(architecture.depth + 6, architecture.width) > small
    assert count(architecture.depth, architecture.width + 16) > small


def test_resnet_20_is_the_one_of_the_paper() -> None:
    """He et al. 2016: 19 3x3 convolutions and 0.27 million parameters; option A shortcuts have none of them."""
    model = architectures.build("resnet-20-w16", shape=(3, 32, 32), classes=10)
    kernels = [module.kernel_size for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert kernels == [(3, 3)] * 19
    assert sum(value.numel() for value in model.parameters()) == 269_722


def test_bare_resnet_has_the_kernels_of_the_other_and_no_normalisation() -> None:
    """Same convolutions, with biases; its branches end with a gain, and without it they add nothing."""
    bare, other = (
        architectures.build(f"{name}-8-w4", shape=(1, 8, 8), classes=10) for name in ("bare-resnet", "resnet")
    )
    kernels = [
        [tuple(part.weight.shape) for part in model.modules() if isinstance(part, nn.Conv2d)] for model in (bare, other)
    ]
    assert kernels[0] == kernels[1]
    assert not [part for part in bare.modules() if isinstance(part, nn.BatchNorm2d)]
    images = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    block = next(part for part in bare.modules() if isinstance(part, BareBlock))
    *branch, gain = block.body
    torch.testing.assert_close(block(images), (nn.Sequential(*branch)(images) + images).relu())
    nn.init.zeros_(gain.gain)
    torch.testing.assert_close(block(images), images)


def test_cnn_is_the_one_of_the_small_cnn_zoo_on_one_colour() -> None:
    """Unterthiner et al. 2020: three convolutions of 16 channels and a linear layer, 4,970 numbers in all."""
    model = architectures.build("cnn-3-w16", shape=(1, 8, 8), classes=10)
    assert sum(value.numel() for value in model.parameters()) == 4_970
    assert [part.stride for part in model if isinstance(part, nn.Conv2d)] == [(1, 1), (2, 2), (2, 2)]


def test_shortcut_takes_every_second_pixel_and_adds_zero_channels() -> None:
    images = torch.arange(2 * 3 * 5 * 5.0).view(2, 3, 5, 5)
    found = Shortcut(3, 6, stride=2)(images)
    assert found.shape == (2, 6, 3, 3)
    for channel in range(6):
        inside = 1 <= channel < 4  # one zero channel before, two after
        expected = images[:, channel - 1, ::2, ::2] if inside else torch.zeros(2, 3, 3)
        assert torch.equal(found[:, channel], expected)


def test_attention_against_one_head_at_a_time() -> None:
    projected = torch.randn(2, 5, 3 * 2 * HEAD_SIZE, generator=torch.Generator().manual_seed(0))
    query, key, value = projected.chunk(3, dim=-1)
    heads = []
    for head in range(2):
        part = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / HEAD_SIZE**0.5
        heads.append(scores.softmax(-1) @ value[..., part])
    torch.testing.assert_close(Mix(2)(projected), torch.cat(heads, dim=-1))


def test_building_is_repeatable_and_leaves_the_global_random_state() -> None:
    before = torch.get_rng_state()
    first, second = (architectures.build("mlp-1-w8", shape=(1, 8, 8), classes=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_unknown_family_suggests_the_near_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'resnet-20-w16'"):
        architectures.parse("resnt-20-w16")


@pytest.mark.parametrize(
    "name", ["resnet20", "resnet-20", "resnet-20-16", "resnet-x-w16", "resnet-08-w16", "mlp-1-w٤", ""]
)
def test_malformed_name_shows_the_form(name: str) -> None:
    with pytest.raises(ConfigError, match="FAMILY-DEPTH-wWIDTH"):
        architectures.parse(name)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("resnet-19-w4", (1, 8, 8), "try 14 or 20"),
        ("resnet-2-w4", (1, 8, 8), "try 8 or 14"),
        ("resnet-20-w0", (1, 8, 8), "at least 1"),
        ("mlp-0-w4", (1, 8, 8), "depth must be at least 1"),
        ("mlp-1-w20000", (1, 8, 8), "width must be .* at most 10000"),
        ("vgg-2-w4", (1, 8, 8), "at least 3"),
        ("mobilenet-3-w4", (1, 3, 8), "at least 4x4"),
        ("vit-2-w20", (1, 8, 8), "try 16 or 32"),
        ("vit-2-w16", (1, 29, 29), "common divisor"),
    ],
)
def test_impossible_network_is_refused_with_a_way_out(name: str, shape: tuple[int, int, int], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        architectures.build(name, shape=shape, classes=10)


def test_one_class_is_no_classifier() -> None:
    with pytest.raises(ConfigError, match="at least 2 classes"):
        architectures.build("mlp-1-w8", shape=(1, 8, 8), classes=1)
