"""`generators.inventory`: roles, fans and places of parameters, from base classes alone and with a graph."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import prune

from generators.graph import trace
from generators.inventory import Role, inventory


def roles(model: nn.Module, graph=None) -> dict[str, Role]:
    return {info.name: info.role for info in inventory(model, graph)}


class FixedNorm(nn.BatchNorm2d):
    """A subclass, as timm has many."""


class StandardisedConv(nn.Conv2d):
    """A subclass with a parameter of its own."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x):
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, centred * self.gain, self.bias)


# ---- without a graph ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(3, 4, 3), {"weight": Role.CONV_WEIGHT, "bias": Role.CONV_BIAS}),
        (nn.ConvTranspose1d(3, 4, 3), {"weight": Role.CONV_WEIGHT, "bias": Role.CONV_BIAS}),
        (StandardisedConv(3, 4, 3), {"weight": Role.CONV_WEIGHT, "bias": Role.CONV_BIAS, "gain": Role.GAIN}),
        (nn.Linear(3, 4), {"weight": Role.LINEAR_WEIGHT, "bias": Role.LINEAR_BIAS}),
        (nn.Bilinear(3, 3, 5), {"weight": Role.LINEAR_WEIGHT, "bias": Role.LINEAR_BIAS}),
        (FixedNorm(4), {"weight": Role.NORM_SCALE, "bias": Role.NORM_SHIFT}),
        (nn.LayerNorm(4), {"weight": Role.NORM_SCALE, "bias": Role.NORM_SHIFT}),
        (nn.GroupNorm(2, 4), {"weight": Role.NORM_SCALE, "bias": Role.NORM_SHIFT}),
        (nn.InstanceNorm1d(4, affine=True), {"weight": Role.NORM_SCALE, "bias": Role.NORM_SHIFT}),
        (nn.RMSNorm(4), {"weight": Role.NORM_SCALE}),
        (nn.Embedding(5, 3), {"weight": Role.EMBEDDING}),
        (nn.PReLU(), {"weight": Role.SLOPE}),
        (
            nn.MultiheadAttention(4, 2, add_bias_kv=True),
            {
                "in_proj_weight": Role.ATTENTION_WEIGHT, "in_proj_bias": Role.LINEAR_BIAS,
                "out_proj.weight": Role.LINEAR_WEIGHT, "out_proj.bias": Role.LINEAR_BIAS,
                "bias_k": Role.TOKEN, "bias_v": Role.TOKEN,
            },
        ),
        (
            nn.LSTM(3, 4, proj_size=2),
            {
                "weight_ih_l0": Role.RECURRENT_WEIGHT, "weight_hh_l0": Role.RECURRENT_WEIGHT,
                "bias_ih_l0": Role.RECURRENT_BIAS, "bias_hh_l0": Role.RECURRENT_BIAS,
                "weight_hr_l0": Role.RECURRENT_WEIGHT,
            },
        ),
    ],
)  # fmt: skip
def test_roles_of_torch_layers(layer, expected):
    assert roles(layer) == expected
    assert roles(layer, trace(layer)) == expected, "the graph leaves them as they are"


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_parametrised_weights_keep_the_role_of_their_layer():
    parametrised = torch.nn.utils.parametrizations
    model = nn.Sequential(
        parametrised.weight_norm(nn.Conv2d(2, 4, 3)), parametrised.spectral_norm(nn.Linear(4, 4)),
        torch.nn.utils.weight_norm(nn.Linear(4, 4)), parametrised.orthogonal(nn.Linear(4, 4, bias=False)),
    )  # fmt: skip
    prune.identity(model[1], "bias")
    found = roles(model)
    assert found == {
        "0.bias": Role.CONV_BIAS,
        "0.parametrizations.weight.original0": Role.GAIN,
        "0.parametrizations.weight.original1": Role.CONV_WEIGHT,
        "1.bias_orig": Role.LINEAR_BIAS,
        "1.parametrizations.weight.original": Role.LINEAR_WEIGHT,
        "2.bias": Role.LINEAR_BIAS,
        "2.weight_g": Role.GAIN,
        "2.weight_v": Role.LINEAR_WEIGHT,
        "3.parametrizations.weight.original": Role.LINEAR_WEIGHT,
    }
    weight = inventory(model)["0.parametrizations.weight.original1"]
    assert (weight.module, weight.module_type, weight.kernel, weight.fan_in) == ("0", "Conv2d", (3, 3), 18)
    assert [info.order for info in inventory(model) if info.module == "0"] == [0, 0, 0]


def test_free_parameters_are_matrices_only_if_they_can_be():
    model = nn.Module()
    for name, shape in {"m": (4, 3), "table": (1, 5, 3), "column": (4, 1), "v": (4,), "s": ()}.items():
        model.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    assert roles(model) == {"m": Role.MATRIX} | dict.fromkeys(("table", "column", "v", "s"), Role.OTHER)


@pytest.mark.parametrize(
    ("layer", "name", "fans"),
    [
        (nn.Conv2d(6, 8, (3, 5), groups=2), "weight", (45, 60)),
        (nn.ConvTranspose2d(6, 8, 3, groups=2), "weight", (27, 36)),
        (nn.Conv2d(6, 6, 3, groups=6), "weight", (9, 9)),
        (nn.Linear(3, 7), "weight", (3, 7)),
        (nn.LSTM(3, 7), "weight_hh_l0", (7, 7)),
        (nn.GRUCell(3, 7), "weight_ih", (3, 7)),
        (nn.MultiheadAttention(6, 2), "in_proj_weight", (6, 6)),
    ],
)
def test_fans(layer, name, fans):
    info = inventory(layer)[name]
    assert (info.fan_in, info.fan_out) == fans


def test_stacked_matrices():
    assert inventory(nn.LSTM(3, 5))["weight_ih_l0"].blocks == 4
    assert inventory(nn.GRU(3, 5))["weight_ih_l0"].blocks == 3
    assert inventory(nn.RNN(3, 6))["weight_ih_l0"].blocks == 1
    assert inventory(nn.LSTM(3, 8, proj_size=4))["weight_hr_l0"].blocks == 1
    assert inventory(nn.MultiheadAttention(6, 2))["in_proj_weight"].blocks == 3
    assert inventory(nn.MultiheadAttention(6, 2, kdim=3))["k_proj_weight"].blocks == 1


def test_tied_and_frozen_parameters_and_look_up():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    found = inventory(model)
    assert len(found) == 3 and found["1.weight"].tied_to == "0.weight" and found["0.weight"].tied_to is None
    assert not found["1.bias"].trainable and [info.name for info in found.where(Role.LINEAR_BIAS)] == ["1.bias"]
    assert "1.bias" in found and "2.bias" not in found
    with pytest.raises(KeyError):
        found["2.bias"]


def test_the_last_linear_layer_is_the_output_without_a_graph():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    found = inventory(model)
    assert {info.name for info in found if info.output} == {"2.bias", "2.parametrizations.weight.original1"}
    assert found["2.parametrizations.weight.original1"].he_std == 0.5 and found["0.bias"].depth == 0.0


def test_lazy_parameters_have_no_shape():
    assert inventory(nn.LazyLinear(3))["weight"].shape == ()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_what_is_no_float_has_a_role_of_its_own(dtype):
    """Whatever its layer is, and whatever consumes it."""
    model = nn.Linear(3, 3)
    model.weight = nn.Parameter(torch.ones(3, 3).to(dtype), requires_grad=False)
    model.forward = lambda x: x @ model.weight.abs().float() + model.bias
    for graph in (None, trace(model, torch.ones(2, 3))):
        assert roles(model, graph) == {"weight": Role.NO_FLOAT, "bias": Role.LINEAR_BIAS}


# ---- with a graph ---------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """A transformer-like net whose parameters are all free."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {
            "patch": (8, 3, 4, 4), "patch_shift": (8, 1, 1), "class_token": (1, 1, 8), "places": (1, 17, 8),
            "scale": (8,), "shift": (8,), "qkv": (8, 24), "biases": (2, 17, 17), "heat": (2, 1, 1), "out": (8, 8),
            "gamma": (8,), "expand": (32, 8), "slope": (32,), "contract": (8, 32), "strength": (), "head": (8, 5),
            "head_bias": (5,), "logit_scale": (),
        }  # fmt: skip
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))

    def forward(self, x):
        x = F.conv2d(x, self.patch, stride=4) + self.patch_shift
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.places
        y = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) * self.scale + self.shift
        q, k, v = ((y @ self.qkv).unflatten(-1, (3, 2, 4))).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT) * self.heat.exp() + self.biases).softmax(-1) @ v
        x = x + self.gamma * F.linear(y.transpose(1, 2).flatten(2), self.out)
        x = x + F.linear(F.prelu(F.linear(x, self.expand).mT, self.slope).mT, self.contract)
        x = x * self.strength
        return (x[:, 0] @ self.head + self.head_bias) * self.logit_scale.exp()


def test_roles_by_use():
    model = Everything()
    graph = trace(model, torch.zeros(2, 3, 16, 16))
    found = inventory(model, graph)
    assert {info.name: info.role for info in found} == {
        "patch": Role.CONV_WEIGHT, "patch_shift": Role.CONV_BIAS, "class_token": Role.TOKEN,
        "places": Role.POSITION_TABLE, "scale": Role.NORM_SCALE, "shift": Role.NORM_SHIFT, "qkv": Role.LINEAR_WEIGHT,
        "biases": Role.RELATIVE_BIAS, "heat": Role.TEMPERATURE, "out": Role.LINEAR_WEIGHT, "gamma": Role.LAYER_SCALE,
        "expand": Role.LINEAR_WEIGHT, "slope": Role.SLOPE, "contract": Role.LINEAR_WEIGHT, "strength": Role.GAIN,
        "head": Role.LINEAR_WEIGHT, "head_bias": Role.LINEAR_BIAS, "logit_scale": Role.TEMPERATURE,
    }  # fmt: skip
    assert (found["patch"].fan_in, found["patch"].kernel) == (48, (4, 4))
    assert (found["head"].fan_in, found["head"].fan_out, found["head"].transposed) == (8, 5, True)
    assert (found["contract"].fan_in, found["contract"].transposed) == (32, False)
    qkv = found["qkv"]
    assert (qkv.blocks, qkv.block_axis, qkv.fan_in, qkv.fan_out, qkv.transposed) == (3, 1, 8, 8, True)
    assert {info.name for info in found if info.output} == {"head", "head_bias"}
    consumers = {name: found[name].consumer for name in ("patch", "places", "class_token", "gamma", "slope")}
    assert consumers == {
        "patch": "convolution", "places": "add", "class_token": "concatenate", "gamma": "multiply",
        "slope": "activation",
    }  # fmt: skip
    depths = [found[name].depth for name in ("patch", "places", "qkv", "out", "expand", "contract", "head")]
    assert depths == sorted(set(depths)) and found["patch"].depth > 0


@pytest.mark.parametrize(
    ("name", "leaf", "role", "count"),
    [
        ("vit_b_16", "class_token", Role.TOKEN, 1),
        ("vit_b_16", "pos_embedding", Role.POSITION_TABLE, 1),
        ("convnext_tiny", "layer_scale", Role.LAYER_SCALE, 18),
        ("swin_t", "relative_position_bias_table", Role.RELATIVE_BIAS, 12),
        ("swin_v2_t", "logit_scale", Role.TEMPERATURE, 12),
    ],
)
def test_free_parameters_of_torchvision_models(name, leaf, role, count):
    with torch.device("meta"):  # saves the time of filling it
        model = torchvision.models.get_model(name)
    found = inventory(model, trace(model))
    assert [info.role for info in found if info.name.endswith(leaf)] == [role] * count
    assert not found.where(Role.MATRIX, Role.OTHER), "every parameter has a known role"
    stacked = {"vit_b_16": 12, "swin_t": 12, "swin_v2_t": 12, "convnext_tiny": 0}
    assert sum(info.blocks == 3 for info in found) == stacked[name], "query-key-value projections are recognised"


def test_activations_with_numbers_of_their_own():
    """MetaFormer's StarReLU: one gain and one offset for all channels, which keep the values of their constructor."""
    model = nn.Sequential(nn.Linear(3, 4))
    model.scale, model.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(()))
    model.forward = lambda x: model.scale * model[0](x).relu() ** 2 + model.bias
    found = roles(model, trace(model))
    assert (found["scale"], found["bias"]) == (Role.GAIN, Role.OFFSET)


def test_embeddings_at_constant_places_are_position_tables():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places, self.query = nn.Embedding(9, 4), nn.Embedding(9, 4), nn.Embedding(3, 4)

        def forward(self, ids):
            return self.words(ids) + self.places(torch.arange(3)) + self.query.weight

    model = Model()
    found = roles(model, trace(model, torch.zeros(2, 3, dtype=torch.long)))
    assert list(found.values()) == [Role.EMBEDDING, Role.POSITION_TABLE, Role.POSITION_TABLE]


def test_every_head_is_an_output_and_a_tied_one_is_told_from_its_embedding():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.body = nn.Embedding(9, 4), nn.Linear(4, 4)
            self.first, self.second = nn.Linear(4, 2), nn.Linear(4, 9, bias=False)
            self.second.weight = self.words.weight

        def forward(self, ids):
            x = self.body(self.words(ids)).relu()
            return self.first(x), self.second(x)

    model = Model()
    found = inventory(model, trace(model))
    assert [info.name for info in found if info.output] == ["first.weight", "first.bias", "second.weight"]
    assert found["words.weight"].consumer == "embedding" and found["second.weight"].consumer == "linear"


def test_a_tied_bias_that_is_read_under_its_other_name():
    model = nn.Sequential(nn.Linear(3, 4))
    model.bias = model[0].bias
    model.forward = lambda x: model[0](x)
    found = inventory(model, trace(model))
    assert [(info.name, info.role) for info in found if info.shape == (4,)] == [
        ("bias", Role.LINEAR_BIAS), ("0.bias", Role.LINEAR_BIAS)
    ]  # fmt: skip


def test_stacked_experts():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 8, 5))

        def forward(self, x):
            return torch.bmm(x.expand(3, -1, -1), self.weight)

    model = Experts()
    info = inventory(model, trace(model, torch.zeros(4, 8)))["weight"]
    assert (info.role, info.blocks, info.fan_in, info.fan_out) == (Role.LINEAR_WEIGHT, 3, 8, 5)


def test_a_convolutional_classifier_is_the_output():
    model = torchvision.models.squeezenet1_1()
    found = inventory(model, trace(model))
    assert [info.name for info in found if info.output] == ["classifier.1.weight", "classifier.1.bias"]


def test_unused_parameters_stay_as_they_were():
    model = nn.Sequential(nn.Linear(3, 2))
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: model[0](x)
    found = inventory(model, trace(model))
    assert found["spare.weight"].consumer is None and found["spare.weight"].role is Role.LINEAR_WEIGHT
    assert not found["spare.weight"].output and found["0.weight"].output


def test_low_rank_updates_are_part_of_the_weight():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(8, 8)
            self.a, self.b = nn.Parameter(torch.zeros(2, 8)), nn.Parameter(torch.zeros(8, 2))

        def forward(self, x):
            return F.linear(x, self.base.weight + self.b @ self.a, self.base.bias)

    model = Adapted()
    assert list(roles(model, trace(model, torch.zeros(3, 8))).values()) == [
        Role.LINEAR_WEIGHT, Role.MATRIX, Role.LINEAR_WEIGHT, Role.LINEAR_BIAS
    ], "the first has the inputs of the layer"  # fmt: skip
