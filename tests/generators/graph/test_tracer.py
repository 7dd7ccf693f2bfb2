"""`generators.graph.trace`: exact graphs of small nets written by hand, coverage, side effects and errors."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from generators.errors import TraceError
from generators.graph import Graph, trace
from generators.graph.drafts import tensors_in


class Forward(nn.Module):
    """A module whose forward is the function that it is given."""

    def __init__(self, function, **members) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x):
        return self.function(self, x)


def rows(graph: Graph) -> list[tuple]:
    """The graph as (kind, parameters, predecessors) per node."""
    return [(node.kind, node.parameters, graph.predecessors[node.index]) for node in graph.nodes]


def table(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


# ---- exact graphs ---------------------------------------------------------------------------------------------------


def test_residual_block():
    model = Forward(
        lambda m, x: m.head((m.stem(x) + m.bn(m.conv(m.stem(x).relu()))).relu().mean((2, 3))),
        stem=nn.Conv2d(3, 4, 3, 2, 1, bias=False), conv=nn.Conv2d(4, 4, 3, 1, 1), bn=nn.BatchNorm2d(4),
        head=nn.Linear(4, 10),
    )  # fmt: skip
    graph = trace(model, torch.zeros(2, 3, 16, 16))
    assert rows(graph) == [
        ("input", (), ()),
        ("convolution", ("stem.weight",), (0,)),
        ("convolution", ("stem.weight",), (0,)),  # applied twice, so there are two nodes
        ("convolution", ("conv.weight", "conv.bias"), (2,)),
        ("normalisation", ("bn.weight", "bn.bias"), (3,)),
        ("add", (), (1, 4)),
        ("linear", ("head.weight", "head.bias"), (5,)),
        ("output", (), (6,)),
    ]
    assert graph.by_parameter == {
        "stem.weight": 1, "conv.weight": 3, "conv.bias": 3, "bn.weight": 4, "bn.bias": 4, "head.weight": 6,
        "head.bias": 6,
    }  # fmt: skip
    assert graph.unused == () and graph.output_layers == {6}
    stem = graph.nodes[2]
    assert stem.shape == (4, 3, 3, 3)
    assert stem.attributes == {
        "operation": "conv2d", "in_channels": 3, "out_channels": 4, "kernel": (3, 3), "stride": (2, 2), "groups": 1,
        "transposed": False, "resolution": -1.0, "activation": "relu", "to_output": 5,
    }  # fmt: skip
    assert graph.nodes[5].attributes["activation"] == "relu"
    assert graph.nodes[6].attributes["pooled"] and graph.nodes[6].attributes["resolution"] == -4.0


def test_concatenation_pooling_and_in_place_operations():
    def forward(m, x):
        y = m.a(x)
        y.relu_()
        parts = [y, F.max_pool2d(m.b(x), 3, 1, 1)]
        z = torch.zeros(x.shape[0], 6, *x.shape[2:])
        z[:, :4] = torch.cat(parts, 1)
        z += 1
        return m.c(F.dropout(z, 0.5))

    model = Forward(forward, a=nn.Conv2d(1, 2, 1), b=nn.Conv2d(1, 2, 1), c=nn.Conv2d(6, 5, 1, groups=1))
    graph = trace(model, torch.zeros(2, 1, 8, 8))
    assert rows(graph) == [
        ("input", (), ()),
        ("convolution", ("a.weight", "a.bias"), (0,)),
        ("convolution", ("b.weight", "b.bias"), (0,)),
        ("concatenate", (), (1, 2)),
        ("convolution", ("c.weight", "c.bias"), (3,)),
        ("output", (), (4,)),
    ]
    assert graph.nodes[3].attributes["out_channels"] == 4
    assert graph.nodes[1].attributes["activation"] == "relu" and graph.nodes[2].attributes["activation"] == ""


def test_squeeze_and_excitation_multiplies():
    model = Forward(
        lambda m, x: m.b(m.a(x) * m.gate(m.a(x).mean((2, 3), keepdim=True)).sigmoid()),
        a=nn.Conv2d(3, 4, 1), gate=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    assert rows(graph)[3:6] == [
        ("convolution", ("gate.weight", "gate.bias"), (2,)),
        ("multiply", (), (1, 3)),
        ("convolution", ("b.weight", "b.bias"), (4,)),
    ]
    assert graph.nodes[3].attributes["pooled"] and graph.nodes[3].attributes["activation"] == "sigmoid"


def test_gates_of_one_stream_are_contracted_away():
    def once(m, x):
        y = m.a(x)
        return m.b(F.silu(y[:, :4]) * y[:, 4:])

    def twice(m, x):
        return m.b(F.silu(m.a(x)[:, :4]) * m.a(x)[:, 4:])

    layers = {"a": nn.Linear(4, 8), "b": nn.Linear(4, 2)}
    assert [row[0] for row in rows(trace(Forward(once, **layers)))] == ["input", "linear", "linear", "output"]
    assert [row[0] for row in rows(trace(Forward(twice, **layers)))][1:4] == ["linear", "linear", "multiply"]


def test_free_parameters_are_nodes_of_their_own():
    def forward(m, x):
        x = m.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.position
        return m.head((x + m.gamma * m.mlp(x))[:, 0])

    model = Forward(forward, patch=nn.Conv2d(3, 8, 4, 4), token=table(1, 1, 8), position=table(1, 17, 8),
                    gamma=table(8), mlp=nn.Linear(8, 8), head=nn.Linear(8, 3))  # fmt: skip
    graph = trace(model, torch.zeros(2, 3, 16, 16))
    assert rows(graph) == [
        ("input", (), ()),
        ("convolution", ("patch.weight", "patch.bias"), (0,)),
        ("parameter", ("token",), ()),
        ("concatenate", (), (1, 2)),
        ("parameter", ("position",), ()),
        ("add", (), (3, 4)),
        ("linear", ("mlp.weight", "mlp.bias"), (5,)),
        ("parameter", ("gamma",), ()),
        ("multiply", (), (6, 7)),
        ("add", (), (5, 8)),
        ("linear", ("head.weight", "head.bias"), (9,)),
        ("output", (), (10,)),
    ]
    depth = {node.parameters[0]: node.depth for node in graph.nodes if node.kind == "parameter"}
    assert depth["token"] < depth["position"] < depth["gamma"], "a free parameter stands where it is used"


def test_tied_weights_keep_their_names():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    graph = trace(model)
    assert rows(graph)[1:3] == [("embedding", ("0.weight",), (0,)), ("linear", ("1.weight",), (1,))]
    assert graph.by_parameter == {"0.weight": 1, "1.weight": 2} and graph.tied == {"1.weight": "0.weight"}


def test_a_shared_module_has_a_node_per_use():
    layer = nn.Linear(4, 4)
    graph = trace(nn.Sequential(layer, nn.ReLU(), layer))
    assert rows(graph)[1:3] == [("linear", ("0.weight", "0.bias"), (0,)), ("linear", ("0.weight", "0.bias"), (1,))]
    assert graph.by_parameter["2.weight"] == 1 and graph.unused == ()


def test_unused_parameters_are_listed():
    model = Forward(lambda m, x: m.used(x), used=nn.Linear(3, 2), spare=nn.Linear(5, 5), token=table(4))
    assert trace(model).unused == ("token", "spare.weight", "spare.bias")


def test_a_head_of_training_mode_only_is_in_the_graph():
    model = Forward(lambda m, x: (m.a(x), m.aux(x)) if m.training else m.a(x), a=nn.Linear(3, 2), aux=nn.Linear(3, 2))
    graph = trace(model.eval())
    assert graph.unused == () and graph.output_layers == {1, 2}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_weights_made_from_parameters_are_followed_to_their_layer():
    def standardised(m, x):
        return F.conv2d(x, (m.weight - m.weight.mean((1, 2, 3), keepdim=True)) / m.weight.std() * m.gain, padding=1)

    def by_batch_norm(m, x):  # as timm writes it
        weight = F.batch_norm(m.weight.reshape(1, 4, -1), None, None, weight=m.gain.view(-1), training=True)
        return F.conv2d(x, weight.reshape_as(m.weight))

    for function in (standardised, by_batch_norm):
        graph = trace(Forward(function, weight=table(4, 3, 3, 3), gain=table(4, 1, 1, 1)), torch.zeros(1, 3, 8, 8))
        assert rows(graph)[1] == ("convolution", ("weight", "gain"), (0,)) and graph.nodes[1].slots == (
            "weight",
            "gain",
        )
    normalised = (torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.weight_norm)
    for function, names in zip(normalised, (("parametrizations.weight.original1", "parametrizations.weight.original0"),
                                            ("weight_v", "weight_g")), strict=True):  # fmt: skip
        layer = function(nn.Conv1d(3, 8, 5, stride=2))
        before = dict(layer.__dict__)
        graph = trace(layer)
        assert graph.nodes[1].parameters == (*names, "bias") and graph.nodes[1].slots == ("weight", "gain", "bias")
        assert graph.nodes[1].attributes["stride"] == (2,)
        assert layer.__dict__.keys() == before.keys() and not layer.weight.is_meta


def test_layers_written_by_hand():
    def forward(m, x):
        y = F.relu(x.flatten(1) @ m.w + m.b)
        return m.scale * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)) + m.shift

    graph = trace(Forward(forward, w=table(12, 5), b=table(5), scale=table(5), shift=table(5)), torch.zeros(2, 3, 4))
    assert rows(graph)[1:3] == [("linear", ("w", "b"), (0,)), ("normalisation", ("scale", "shift"), (1,))]
    assert graph.nodes[1].attributes["transposed"] and graph.nodes[1].attributes["in_channels"] == 12


def attention_block(fused: bool) -> Forward:
    def forward(m, x):
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in m.qkv(m.norm(x)).chunk(3, -1))
        if fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = F.dropout((q @ k.transpose(-2, -1) * 0.5).softmax(-1), 0.1, m.training) @ v
        return x + m.out(y.transpose(1, 2).flatten(2))

    return Forward(forward, norm=nn.LayerNorm(8), qkv=nn.Linear(8, 24), out=nn.Linear(8, 8))


def test_attention_is_one_node_however_it_is_written():
    fused, by_hand = (trace(attention_block(fused), torch.zeros(2, 5, 8)) for fused in (True, False))
    assert [row[0] for row in rows(fused)] == [
        "input", "normalisation", "linear", "attention", "linear", "add", "output"
    ]  # fmt: skip
    assert fused.signature == by_hand.signature
    assert fused.nodes[3].attributes["out_channels"] == 8 and fused.nodes[3].attributes["resolution"] == 0.0


def test_multi_head_attention_has_its_three_parts():
    class Cross(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(6, options.get("kdim", 8))
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

        def forward(self, x, y):
            return self.attention(self.a(x), self.b(y), self.b(y))[0]

    inputs = torch.zeros(2, 5, 8), torch.zeros(2, 7, 6)
    one = trace(Cross(), inputs)
    assert rows(one)[5:8] == [
        ("linear", ("attention.in_proj_weight", "attention.in_proj_bias"), (2, 3, 4)),
        ("attention", (), (5,)),
        ("linear", ("attention.out_proj.weight", "attention.out_proj.bias"), (6,)),
    ]
    assert one.nodes[5].attributes["projections"] == 3
    apart = trace(Cross(kdim=6, vdim=6, add_bias_kv=True), inputs)
    assert [row[1][:1] for row in rows(apart)[5:8]] == [(f"attention.{key}_proj_weight",) for key in "qkv"]
    assert [row[2] for row in rows(apart)[5:8]] == [(2,), (3,), (4,)]
    assert apart.unused == ()


def test_stacked_recurrent_layers_are_apart():
    model = Forward(lambda m, x: m.rnn(x)[1][0][-1], rnn=nn.LSTM(4, 5, num_layers=2, bidirectional=True, proj_size=3))
    graph = trace(model)
    kinds = ["input", "recurrent", "recurrent", "concatenate", "recurrent", "recurrent", "concatenate", "output"]
    assert [row[0] for row in rows(graph)] == kinds
    assert graph.nodes[5].parameters[0] == "rnn.weight_ih_l1_reverse" and graph.predecessors[5] == (3,)
    assert graph.nodes[5].attributes["in_channels"] == 6 and graph.nodes[5].attributes["out_channels"] == 3
    assert len(trace(nn.GRU(4, 5, bias=False)).nodes[1].parameters) == 2
    assert trace(Forward(lambda m, x: m.cell(x[:, 0])[0], cell=nn.LSTMCell(4, 5)), torch.zeros(2, 3, 4)).unused == ()


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_shapes_are_those_of_a_real_run(layer, batch_first):
    """The tracer does not take the steps of a recurrent layer one by one, so its shapes are checked here."""
    seen = []

    def forward(m, x):
        seen.append([list(value.shape) for value in tensors_in(m.rnn(x))])
        return m.rnn(x)[0]

    options = {"batch_first": batch_first, "bidirectional": batch_first, "num_layers": 2}
    model = Forward(forward, rnn=layer(4, 5, **options, **({"proj_size": 3} if layer is nn.LSTM else {})))
    model(torch.zeros(2, 7, 4))
    trace(model, torch.zeros(2, 7, 4))
    assert len(seen) == 2 and seen[0] == seen[1]


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_packed_sequences(layer):
    def forward(m, packed):
        return m.head(nn.utils.rnn.pad_packed_sequence(m.rnn(packed)[0])[0])

    packed = nn.utils.rnn.pack_sequence([torch.zeros(5, 3), torch.zeros(2, 3)])
    graph = trace(Forward(forward, rnn=layer(3, 4, bidirectional=True), head=nn.Linear(8, 2)), (packed,))
    kinds = [node.kind for node in graph.nodes if node.kind != "input"]
    assert kinds == ["recurrent", "recurrent", "concatenate", "linear", "output"]


def test_fused_products():
    """`addcmul` is a multiply and an add."""
    model = Forward(lambda m, x: x + torch.addcmul(m.beta, m.gamma, m.layer(x)), layer=nn.Linear(4, 4), gamma=table(4),
                    beta=table(4))  # fmt: skip
    assert [row[:2] for row in rows(trace(model))][1:] == [
        ("linear", ("layer.weight", "layer.bias")), ("parameter", ("gamma",)), ("multiply", ()),
        ("parameter", ("beta",)), ("add", ()), ("add", ()), ("output", ()),
    ]  # fmt: skip


def test_compiled_and_wrapped_models():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    expected = [node.kind for node in trace(net).nodes]
    for model in (torch.compile(net), nn.DataParallel(net)):
        graph = trace(model)
        assert [node.kind for node in graph.nodes] == expected and graph.unused == ()
    net.compile()
    assert [node.kind for node in trace(net).nodes] == expected
    assert int(net[1].num_batches_tracked) == 0


def test_parameters_read_by_index():
    """By positions from data it is an embedding, by constant ones a table."""
    model = Forward(lambda m, x: m.words[x] + m.places[torch.arange(x.shape[1])], words=table(9, 4), places=table(9, 4))
    graph = trace(model, torch.zeros(2, 5, dtype=torch.long))
    assert rows(graph)[1:] == [
        ("embedding", ("words",), (0,)), ("parameter", ("places",), ()), ("add", (), (1, 2)), ("output", (), (3,))
    ]  # fmt: skip


def test_scripted_functions_are_seen():
    @torch.jit.script
    def twice(x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x) * 2 + y

    model = Forward(lambda m, x: m.c(twice(m.a(x), m.b(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
    graph = trace(model)
    assert rows(graph)[3:5] == [("add", (), (1, 2)), ("linear", ("c.weight", "c.bias"), (3,))]


# ---- inputs and outputs ---------------------------------------------------------------------------------------------


@dataclass
class Result:
    logits: Tensor
    states: list[Tensor]


def test_several_nested_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(5, 3), nn.Linear(3, 2)

        def forward(self, pair, *, options, flag=None):
            x = self.a(pair[0]) - self.b(options["y"])
            return {"result": Result(self.c(x), [x, pair[1]])}

    inputs = {"pair": (torch.zeros(2, 4), torch.zeros(1)), "options": {"y": torch.zeros(2, 5)}}
    graph = trace(Two(), inputs)
    assert [row[0] for row in rows(graph)] == ["input"] * 3 + ["linear", "linear", "add", "linear", "output"]
    assert graph.predecessors[7] == (6, 5, 1)


def test_pairs_are_guessed():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = (
                nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 8)),
                nn.Linear(16, 1),
            )

        def forward(self, first, second):
            return self.head(torch.cat([self.body(first), self.body(second)], 1))

    assert trace(Pair()).unused == ()


def text_model() -> nn.Module:
    return Forward(lambda m, x: m.head(m.rnn(m.words(x))[0][:, -1]), words=nn.Embedding(50, 16),
                   rnn=nn.LSTM(16, 12, batch_first=True), head=nn.Linear(12, 3))  # fmt: skip


class Transformer(nn.Module):
    """A GPT in small: learned positions, causal attention, tied head."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 8), nn.Embedding(32, 8)
        self.blocks = nn.ModuleList(attention_block(True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 50, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("mask", torch.ones(32, 32).tril().bool())

    def forward(self, ids, targets=None):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)), None if targets is None else F.cross_entropy(x.flatten(0, 1), targets.flatten())


ENCODER = {"d_model": 16, "nhead": 4, "dim_feedforward": 32, "batch_first": True}
COVERED = {
    "resnet18": (lambda: torchvision.models.resnet18(), 51),
    "vit_b_16": (lambda: torchvision.models.vit_b_16(), 117),
    "convnext_tiny": (lambda: torchvision.models.convnext_tiny(), 138),
    "efficientnet_b0": (lambda: torchvision.models.efficientnet_b0(), 158),
    "densenet121": (lambda: torchvision.models.densenet121(), 302),
    "swin_t": (lambda: torchvision.models.swin_t(), 156),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(), 105),
    "googlenet": (lambda: torchvision.models.googlenet(init_weights=False), 134),
    "inception_v3": (lambda: torchvision.models.inception_v3(init_weights=False), 211),
    "text": (text_model, 5),
    "gpt": (Transformer, 17),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**ENCODER), 2), 20),
    "transformer": (lambda: nn.Transformer(16, 4, 1, 1, 32), 28),
    "signal": (lambda: nn.Sequential(nn.Conv1d(2, 8, 9, 4), nn.BatchNorm1d(8), nn.PReLU(), nn.AdaptiveAvgPool1d(1),
                                     nn.Flatten(), nn.Linear(8, 5)), 6),
    "volume": (lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.InstanceNorm3d(4, affine=True)), 4),
    "digits": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 10)), 4),
    "decoder": (lambda: nn.Sequential(nn.Linear(5, 32), nn.Unflatten(1, (8, 2, 2)), nn.ConvTranspose2d(8, 4, 4)), 4),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 2)), 4),
    "bilinear": (lambda: nn.Bilinear(3, 3, 5), 4),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:torch.nn.modules.transformer")
@pytest.mark.parametrize("name", COVERED)
def test_coverage(name):
    """Inputs are guessed, every parameter has a node, every node is connected."""
    build, size = COVERED[name]
    model = build()
    graph = trace(model)
    named = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert graph.unused == () and sorted(graph.by_parameter) == sorted(named)
    assert len(graph) == size
    assert all(node.attributes["to_output"] >= 0 for node in graph.nodes)
    fed = [node.index for node in graph.nodes if not graph.predecessors[node.index]]
    assert all(
        graph.nodes[i].kind in ("input", "parameter") or i == graph.by_parameter.get("places.weight") for i in fed
    )


def test_resnet50_is_fast():
    """Processor time, best of five: the machine may be shared."""
    model = torchvision.models.resnet50()
    trace(model)
    times = []
    for _ in range(5):
        start = time.process_time()
        trace(model)
        times.append(time.process_time() - start)
    assert min(times) < 0.2


# ---- side effects ---------------------------------------------------------------------------------------------------


class Restless(nn.Module):
    """Does in its forward whatever could leave traces."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer, self.dropout = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.cache, self.count, self.plain = [], 0, torch.zeros(3)
        self.hidden = [nn.BatchNorm1d(4)]

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.cache.append(x)
        self.plain[0] += 1
        self.last = x
        self.training = not self.training
        noise = torch.rand(4) * random.random() * float(np.random.rand())
        return self.dropout(self.hidden[0](self.layer(self.norm(x)))) + noise


def test_the_model_and_the_random_states_are_untouched():
    model = Restless()
    model.layer.eval()
    called = []
    model.layer.register_forward_hook(lambda *_: called.append(1))
    model.layer.register_forward_pre_hook(lambda *_: called.append(1))
    keys = [set(module.__dict__) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    objects = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    inputs = torch.zeros(3, 4)
    for example in (inputs, None):
        assert trace(model, example).unused == ()
    assert called == [] and model.count == 0 and model.cache == [] and model.plain.tolist() == [0, 0, 0]
    assert [set(module.__dict__) for module in model.modules()] == keys
    assert [module.training for module in model.modules()] == flags
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == objects
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert int(model.hidden[0].num_batches_tracked) == 0 and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_states[0]) and random.getstate() == random_states[1]
    assert np.random.get_state()[1].tolist() == random_states[2] and torch.is_grad_enabled()


def test_a_model_on_the_meta_device_and_in_half_precision():
    with torch.device("meta"):
        graph = trace(torchvision.models.resnet18())
    assert graph.signature == trace(torchvision.models.resnet18().bfloat16()).signature


def test_hooks_that_call_the_original_module_and_bound_methods():
    """Code that holds on to the user's own parameters or methods still leads to the right nodes."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    weight = model[0].weight
    model[1].forward = lambda x, own=model[1].forward: own(F.linear(x, weight))
    graph = trace(model)
    assert [row[1] for row in rows(graph)][1:-1] == [("0.weight", "0.bias"), ("0.weight",), ("1.weight", "1.bias")]


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_the_error_carries_the_models_own_exception_and_line():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), Forward(lambda m, x: m.fc(x), fc=nn.Linear(77, 2)))
    with pytest.raises(TraceError) as caught:
        trace(model)
    message = str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError) and str(caught.value.__cause__) in message
    assert "test_tracer.py:" in message and "Linear(77, 2)" in message and "in module 2.fc (Linear)" in message
    assert "`example_inputs=`" in message and "guessed" in message
    with pytest.raises(TraceError, match=r"float32 \[2, 5\].*pass inputs that the model accepts"):
        trace(nn.Linear(3, 2), torch.zeros(2, 5))


def test_values_that_steer_the_forward_need_real_inputs():
    model = Forward(lambda m, x: m.a(x) if x.sum() > 0 else m.b(x), a=nn.Linear(3, 2), b=nn.Linear(3, 2))
    with pytest.raises(TraceError, match=r"x.sum\(\) > 0.*depends on values.*real inputs as `example_inputs=`"):
        trace(model)
    assert trace(model, torch.ones(2, 3)).unused == ("b.weight", "b.bias")
    assert trace(model, -torch.ones(2, 3)).unused == ("a.weight", "a.bias")


class Steered(Restless):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def test_a_real_run_is_that_of_a_copy():
    model, inputs = Steered(), torch.ones(3, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert "layer.weight" in trace(model, inputs).by_parameter
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert inputs.tolist() == [[1.0] * 4] * 3 and model.plain.tolist() == [0, 0, 0] and model.count == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.LazyLinear(4), "weight is a lazy parameter"),
        (Forward(lambda m, x: "text", a=nn.Linear(3, 2)), "returned no tensor but str"),
        (Forward(lambda m, x: 1 / 0, a=nn.Linear(3, 2)), "ZeroDivisionError: division by zero"),
        ("resnet18", "expected a torch.nn.Module, got str"),
    ],
)
def test_models_that_cannot_be_traced(model, message):
    with pytest.raises(TraceError, match=message):
        trace(model)


def test_scripted_modules_are_refused():
    with pytest.raises(TraceError, match="scripted module"):
        trace(torch.jit.script(nn.Sequential(nn.Linear(3, 2))))
