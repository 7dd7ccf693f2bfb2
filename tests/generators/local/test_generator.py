"""Local generators as initialisers: every tensor accounted for, known spread, members the same bits anywhere."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn

from collect.architectures import build, parse
from generators.checkpoint import load, save
from generators.errors import ConfigError, UnknownNameError
from generators.filling import init
from generators.inventory import inventory
from generators.local.config import LocalConfig
from generators.local.fidelity import match
from generators.local.generator import LocalGenerator
from generators.local.slice_model import Layer
from generators.seeds import stream

GROUPS = ("conv_weight-3x3-0", "conv_weight-3x3-2", "matrix-1x8-1")


def smooth(count: int, shape: tuple[int, int]) -> torch.Tensor:
    """Correlated slices of unit second moment."""
    slices = torch.randn(count, *shape, generator=stream(1, "smooth")).cumsum(-1).cumsum(-2)
    return slices / slices.square().mean().sqrt()


def generator(groups: tuple[str, ...] = GROUPS, **options) -> LocalGenerator:
    """A generator whose moments are those of `smooth`; the networks are not fitted."""
    made = LocalGenerator(LocalConfig(groups=groups, channels=4, hidden=8, **options))
    for key in made.keys:
        model = made.model(key)
        model.standardise(smooth(4000, key.shape))
        model.calibrate(smooth(4000, key.shape), [Layer(1 << 15)], stream(0, "calibrate"))
        model.zoo_gain.fill_(1.5)
        model.zoo_std.fill_(0.25)
    return made.eval()


def network(name: str = "resnet-8-w8") -> nn.Module:
    return build(parse(name), shape=(1, 8, 8), classes=10)


@pytest.mark.parametrize("name", ["resnet-14-w8", "vgg-4-w8", "mobilenet-4-w16", "mlp-2-w32", "vit-2-w32"])
def test_every_tensor_is_generated_or_a_fallback_with_its_reason(name):
    made = generator()
    model = network(name)
    report = init(model, made, seed=1)  # itself checks that the three parts make up the model
    by_name = {info.name: info for info in inventory(model)}
    for tensor, how in report.generated.items():
        if tensor in by_name:
            info = by_name[tensor]
            assert info.kernel == (3, 3) or (info.kernel in ((), (1, 1)) and len(info.shape) > 1)
            assert "conv-vae: conv_weight-3x3" in how if info.kernel == (3, 3) else "conv-vae: matrix-1x8" in how
    for tensor, why in report.fallbacks.items():
        assert tensor in by_name and why.startswith("he") and "conv-vae" in why
    weights = [info.name for info in by_name.values() if len(info.shape) > 1 and "weight" in info.role.value]
    assert len(report.generated.keys() & set(weights)) >= len(weights) - 2, "all but the output and a ViT's patches"
    classifier = next(info.name for info in by_name.values() if info.output and len(info.shape) == 2)
    assert "leaves the output layer to He" in report.fallbacks[classifier]


@pytest.mark.parametrize("later", ["zero-gamma", "emergence"])
def test_a_later_step_that_needs_the_graph_moves_no_draw(later):
    """Depth is that of the zoo, registration order; on the graph the shortcuts of a ResNet lie elsewhere."""
    plain, chained = torchvision.models.resnet18(), torchvision.models.resnet18()
    first = init(plain, "conv-vae-digits", seed=3)
    second = init(chained, f"conv-vae-digits+{later}", seed=3)
    named = dict(chained.named_parameters())
    for name, how in first.generated.items():
        assert second.generated[name].startswith(how.split(",")[0]), name
        if later == "zero-gamma" and name in named and named[name].ndim > 1:
            assert torch.equal(plain.get_parameter(name), named[name]), name


def test_an_unseen_kernel_size_is_a_named_fallback():
    report = init(torchvision.models.resnet18(), generator(), seed=0)
    assert "fitted on no 7x7 kernels, only on 3x3 kernels, row patches of 8" in report.fallbacks["conv1.weight"]
    assert "conv-vae: matrix-1x8-1" in report.generated["layer2.0.downsample.0.weight"]
    assert "conv-vae" in report.generated["layer4.1.conv2.weight"]
    assert "kernels and matrices only" in report.fallbacks["bn1.weight"]


def test_an_unseen_kernel_size_is_drawn_from_the_nearest_if_it_may_be_stretched():
    model = torchvision.models.resnet18()
    report = init(model, generator(most_stretch=3.0), seed=0)
    assert "conv_weight-3x3-0, resized to 7x7 kernels: the nearest in size" in report.generated["conv1.weight"]
    assert report.statistics["conv1.weight"]["std_ratio"] == pytest.approx(1, abs=0.1)
    slices = model.conv1.weight.detach().flatten(0, 1)
    neighbours = (slices[:, :, 1:] * slices[:, :, :-1]).mean() / slices.square().mean()
    assert neighbours > 0.2, "resized kernels are smooth where those of the group are"


def test_the_report_says_when_another_depth_stands_in():
    report = init(network(), generator(), seed=0)
    named = set(report.generated.values())
    assert "conv-vae: conv_weight-3x3-0" in named
    assert "conv-vae: conv_weight-3x3-0, the nearest in depth to conv_weight-3x3-1" in named


@pytest.mark.parametrize(("scale", "expected"), [("he", 1.0), ("zoo", 1.5), ("none", None)])
def test_spread_is_that_of_the_fan_in_of_the_zoo_or_left_alone(scale, expected):
    model = network("mobilenet-4-w64")
    report = init(model, generator(scale=scale), seed=3)
    by_name = {info.name: info for info in inventory(model)}
    checked = 0
    for name, row in report.statistics.items():
        if name in report.generated and by_name[name].numel >= 2000:
            wanted = expected or 0.25 / by_name[name].he_std
            assert row["std_ratio"] == pytest.approx(wanted, rel=0.15), name
            checked += 1
    assert checked >= 3


def test_generated_kernels_have_the_spatial_covariance_of_the_data():
    made, layer = generator(), nn.Sequential(nn.Conv2d(64, 64, 3), nn.Linear(64, 2))
    init(layer, made, seed=0)
    kernels = layer[0].weight.detach().reshape(-1, 3, 3)
    kernels = kernels / kernels.square().mean().sqrt()
    figures = match(kernels, smooth(20_000, (3, 3)))
    assert figures["covariance_error"] < 0.1 < figures["covariance_error_white"]


def test_member_3_of_5_equals_member_3_of_12_and_what_init_writes():
    made, model = generator(), network()
    five, twelve = made.sample(model, 5, seed=7), made.sample(model, 12, seed=7)
    init(model, made, seed=7, member=3)
    for name, value in model.state_dict().items():
        assert torch.equal(five[name][3], twelve[name][3]) and torch.equal(five[name][3], value)
    weight = five[next(iter(five))]
    assert all(not torch.equal(weight[i], weight[j]) for i in range(5) for j in range(i))


def test_the_draws_of_a_layer_do_not_move_when_others_are_added():
    def conv(inputs: int) -> nn.Module:
        return nn.Conv2d(inputs, 40, 3)

    head = nn.Linear(40, 2)
    small = nn.Sequential(conv(40), head)
    large = nn.Sequential(conv(40), head, conv(40), conv(17))
    made = generator(groups=GROUPS[:1])
    init(small, made, seed=5)
    before = small[0].weight.detach().clone()
    init(large, made, seed=5)
    assert torch.equal(before, large[0].weight)


SCRIPT = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[2]))
from collect.architectures import build, parse
from generators.checkpoint import load
state = load(sys.argv[1]).sample(build(parse("vgg-4-w16"), shape=(1, 8, 8), classes=10), 2, seed=11)
print(hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest())
"""


def test_the_same_bits_in_other_processes_with_other_numbers_of_threads(tmp_path):
    save(generator(), tmp_path / "made")
    state = load(tmp_path / "made").sample(network("vgg-4-w16"), 2, seed=11)
    here = hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()
    for threads in ("1", "2"):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "made"), threads]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == here


def test_a_saved_generator_is_the_same_generator(tmp_path):
    made = generator(scale="zoo")
    made.card["metrics"] = {"conv_weight-3x3-0": {"active_units": 9}}
    found = load(save(made, tmp_path / "made"))
    assert found.config == made.config and found.card == made.card
    model = network()
    first, second = made.sample(model, 1, seed=2), found.sample(model, 1, seed=2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    json.dumps(found.card)


def test_the_callers_random_state_is_untouched():
    before = torch.get_rng_state()
    init(network_without_draws(), generator(), seed=0)
    assert torch.equal(before, torch.get_rng_state())


def network_without_draws() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return network()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(scale="hee"), "did you mean 'he'"),
        (dict(kind="conv-vea"), "unknown kind 'conv-vea': did you mean 'conv-vae'"),
        (dict(latent=0), "latent must be at least 1"),
        (dict(noise_bounds=(0.5, 0.1)), "noise_bounds"),
        (dict(most_stretch=0.5), "most_stretch must be at least 1"),
        (dict(groups=("3x3",)), "conv_weight-3x3-0"),
    ],
)
def test_configurations_that_make_no_sense(options, message):
    with pytest.raises((ConfigError, UnknownNameError), match=message):
        LocalConfig(**{"groups": GROUPS, **options})


def test_layers_without_weights_and_odd_widths():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 3, 3), nn.ConvTranspose2d(3, 5, 3), nn.Linear(5, 2))
    report = init(model, generator(), seed=0)
    assert {"0.weight", "1.weight", "2.weight"} <= report.generated.keys()
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_the_published_conv_vae_draws_what_its_weights_say():
    """A checkpoint from before there were other kinds, against its formulas written out on the plain tensors."""
    made = load("conv-vae-digits")
    assert made.kind_name == made.config.kind == "conv-vae"
    weight = made.sample(nn.Sequential(nn.Conv2d(3, 70, 3), nn.Linear(1, 2)), 2, seed=4)["0.weight"][1]
    tensors = {
        name.removeprefix("groups.conv_weight-3x3-0."): value
        for name, value in made.state_dict().items()
        if name.startswith("groups.conv_weight-3x3-0.")
    }

    def layer(number: int, values: torch.Tensor) -> torch.Tensor:
        return values @ tensors[f"decoder.{number}.weight"].T + tensors[f"decoder.{number}.bias"]

    silu = nn.functional.silu
    latents, noise = torch.randn(256, 18, generator=stream(4, "conv-vae", 1, "0.weight"))[:210].split(9, dim=1)
    maps = silu(layer(2, silu(layer(0, latents)))).unflatten(1, (9, 16))
    slices = layer(7, silu(layer(5, maps)))[..., 0] + noise * tensors["noise"].sqrt()
    expected = (tensors["shift"] + slices @ tensors["colour"].T) / tensors["unit_std"] * (2 / 27) ** 0.5
    assert torch.allclose(weight.reshape(210, 9), expected, atol=1e-6)


def test_what_is_stored_input_first_is_drawn_as_its_filters():
    """A transposed convolution gets the draws of the convolution with the same name and fans, its axes swapped."""
    plain, swapped = nn.Sequential(nn.Conv2d(6, 4, 3)), nn.Sequential(nn.ConvTranspose2d(6, 4, 3))
    for kind in ("conv-vae", "filter-vae"):
        made = generator(kind=kind)
        for model in (plain, swapped):
            assert init(model, made, seed=1).generated["0.weight"].startswith(kind)
        assert plain[0].weight.equal(swapped[0].weight.transpose(0, 1)), kind
    grouped = nn.Sequential(nn.ConvTranspose2d(6, 4, 3, groups=2))
    init(grouped, generator(), seed=1)
    assert grouped[0].weight.shape == (6, 2, 3, 3) and grouped[0].weight.is_contiguous()
