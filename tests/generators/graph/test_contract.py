"""Contraction while tracing: exact graphs of small nets, written by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators.graph import trace
from generators.graph.drafts import tensors_in
from small_models import Forward, attention_block, rows


def table(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


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


@pytest.mark.parametrize(
    ("product", "input_first"),
    [
        (lambda x, w: x @ w, True),
        (lambda x, w: x @ w.T, False),
        (lambda x, w: torch.addmm(x[:1], x, w), True),
        (lambda x, w: torch.mm(x, w.t()), False),
        (lambda x, w: F.linear(x, w), False),
        (lambda x, w: F.linear(x, w.T), True),
        (lambda x, w: (w @ x.T).T, False),
    ],
)
def test_which_axis_of_a_square_weight_are_its_inputs(product, input_first):
    graph = trace(Forward(lambda m, x: product(x, m.w), w=table(6, 6)), torch.zeros(2, 6))
    assert graph.nodes[1].kind == "linear" and graph.nodes[1].attributes["transposed"] is input_first


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


def test_tensors_inside_vmap_are_followed():
    model = Forward(lambda m, x: m.b(torch.vmap(lambda row: m.a(row).relu() + row, 1, 1)(m.c(x))), a=nn.Linear(2, 2),
                    b=nn.Linear(3, 2), c=nn.Linear(3, 3))  # fmt: skip
    graph = trace(model, torch.zeros(2, 3))
    assert [(row[0], row[2]) for row in rows(graph)] == [
        ("input", ()), ("linear", (0,)), ("linear", (1,)), ("add", (2, 1)), ("linear", (3,)), ("output", (4,))
    ]  # fmt: skip


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


@pytest.mark.parametrize("fused", [True, False])
def test_attention_tells_its_heads(fused: bool) -> None:
    """Vectors of length 4 are compared, and the values are the last third of 24 channels."""
    graph = trace(attention_block(fused), torch.zeros(1, 5, 8))
    (node,) = (node for node in graph.nodes if node.kind == "attention")
    assert (node.attributes["head_width"], node.attributes["values_at"]) == (4, 16)
    graph = trace(nn.TransformerEncoderLayer(8, 2, 16), torch.zeros(5, 1, 8))
    (node,) = (node for node in graph.nodes if node.kind == "attention")
    assert (node.attributes["head_width"], node.attributes["values_at"]) == (4, 16)
