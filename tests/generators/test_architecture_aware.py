"""Variances and learning rates from the graph: in-degrees by hand, paths by enumeration, signals of real digits."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import Tensor, nn

from generators.architecture_aware import architecture_learning_rate, in_degrees, kernel_side, path_sums
from generators.errors import ConfigError, ModelError
from generators.filling import init
from generators.graph import MATRIX_KINDS, Graph, Node, trace
from small_models import Forward, attention_block


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """512 real handwritten digits, `[N, 64]`, scaled to mean square 1."""
    pixels = torch.tensor(load_digits().data[:512], dtype=torch.float32)
    return pixels / pixels.square().mean().sqrt()


# ---- in-degrees

SUMS = {
    "chain": (lambda m, x: m.c(m.b(m.a(x).relu()).relu()), {"a": 1, "b": 1, "c": 1}),
    "residual": (lambda m, x: m.c((y := m.a(x)) + m.b(y.relu())), {"a": 1, "b": 2, "c": 1}),
    "projected": (lambda m, x: m.c(m.a(x) + m.b(x)), {"a": 2, "b": 2, "c": 1}),
    "sum of four": (lambda m, x: m.a(x) + m.b(x).relu() + m.c(x) + x, {"a": 4, "b": 4, "c": 4}),
    "nested sum": (lambda m, x: (m.a(x) + x) + (m.b(x) + m.c(x)), {"a": 4, "b": 4, "c": 4}),
    "two sums": (lambda m, x: (m.a(x) + x).relu() + m.b(x), {"a": 2, "b": 2}),
    "through scales": (lambda m, x: x + m.gain * m.norm(m.a(x)), {"a": 2}),
    "free bias": (lambda m, x: m.norm(m.a(x) + m.gain) + m.b(x), {"a": 2, "b": 2}),
    "free bias alone": (lambda m, x: m.b(m.a(x) + m.gain), {"a": 1, "b": 1}),
    "read twice": (lambda m, x: m.b(y := m.a(x)) + y, {"a": 1, "b": 2}),
    "used twice": (lambda m, x: m.a(m.a(x)) + x, {"a": 2}),
    "product": (lambda m, x: m.a(x) * m.b(x).sigmoid(), {"a": 1, "b": 1}),
    "product in a sum": (lambda m, x: m.a(x) * m.b(x).sigmoid() + x, {"a": 1, "b": 1}),
    "concatenation": (lambda m, x: torch.cat([m.a(x), m.b(x)], -1), {"a": 1, "b": 1}),
}


@pytest.mark.parametrize("name", SUMS)
def test_in_degree_by_hand(name: str) -> None:
    """How many streams meet where each layer's output ends, counted by eye in a line of code."""
    forward, wanted = SUMS[name]
    layers = {key: nn.Linear(4, 4) for key in "abc"}
    model = Forward(forward, **layers, gain=nn.Parameter(torch.ones(4)), norm=nn.LayerNorm(4))
    degrees = in_degrees(trace(model, torch.zeros(2, 4)))
    assert {key: degrees[f"{key}.weight"] for key in wanted} == wanted


def test_in_degrees_of_a_resnet_and_of_attention() -> None:
    """2 for the last convolution of a block and the shortcut beside it; 2 for what attention adds to its stream."""
    degrees = in_degrees(trace(torchvision.models.resnet18()))
    two = {name for name, degree in degrees.items() if degree == 2}
    blocks = [f"layer{stage}.{block}.conv2.weight" for stage in range(1, 5) for block in range(2)]
    assert two == {*blocks, *(f"layer{stage}.0.downsample.0.weight" for stage in range(2, 5))}
    degrees = in_degrees(trace(attention_block(True)))
    assert (degrees["qkv.weight"], degrees["out.weight"]) == (1, 2)


# ---- variances


class Branches(nn.Module):
    """Layers in each of which so many branches are summed, without biases."""

    def __init__(self, degree: int, layers: int = 5, width: int = 512) -> None:
        super().__init__()
        self.first = nn.Linear(64, width, bias=False)
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(degree)) for _ in range(layers)
        )
        self.head = nn.Linear(width, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        for branches in self.layers:
            hidden = sum(branch(hidden.relu()) for branch in branches)
        return self.head(hidden.relu())


@pytest.mark.parametrize("degree", [1, 3])
def test_signals_keep_their_size_whatever_the_number_of_branches(degree: int, digits: Tensor) -> None:
    """Mean square of the fifth sum over that of the first layer: 1 within a quarter; degree^5 by he."""

    def growth(name: str) -> float:
        model = Branches(degree)
        init(model, name, seed=1)
        first = model.first(digits)
        hidden = first
        for branches in model.layers:
            hidden = sum(branch(hidden.relu()) for branch in branches)
        return (hidden.square().mean() / first.square().mean()).item()

    assert growth("architecture-aware") == pytest.approx(1.0, rel=0.25)
    assert growth("he") == pytest.approx(degree**5, rel=0.25)


def test_weights_are_those_of_he_divided_by_the_root_of_the_in_degree() -> None:
    """One draw: a chain gets the very bits of he. The report tells in-degrees, and he's rule makes the rest."""
    model, he = torchvision.models.resnet18(), torchvision.models.resnet18()
    report = init(model, "architecture-aware", seed=7)
    init(he, "he", seed=7)
    for name, value in he.named_parameters():
        degree = report.statistics.get(name, {}).get("in_degree", 1.0)
        torch.testing.assert_close(model.get_parameter(name), value / math.sqrt(degree), rtol=1e-5, atol=1e-7)
        assert degree > 1 or torch.equal(model.get_parameter(name), value)
    assert report.generated["layer1.0.conv2.weight"] == "architecture-aware: in-degree 2"
    assert not report.fallbacks


MODELS = {
    "lstm": lambda: nn.LSTM(5, 7, num_layers=2, bidirectional=True),
    "transformer": lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
    "half": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2)).half(),
    "parametrised": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2)),
    "vit": lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10),
}


@pytest.mark.parametrize("name", MODELS)
def test_any_model(name: str) -> None:
    """All matrices are made, others by he's rules; the same seed gives the same bits from another start."""
    first, second = MODELS[name](), MODELS[name]()
    report = init(first, "architecture-aware", seed=2)
    init(second, "architecture-aware", seed=2)
    assert report.generated and not report.fallbacks
    assert 0 < report.figures["architecture-aware"]["learning_rate_factor"] < 1
    for key in report.generated:
        assert torch.equal(first.state_dict()[key], second.state_dict()[key]), key


# ---- paths and learning rates


def enumerated(graph: Graph) -> tuple[int, int, int, int]:
    """The sums path by path, each walked from an input to the output."""
    depths: list[int] = []

    def walk(index: int, depth: int) -> None:
        depth += graph.nodes[index].kind in MATRIX_KINDS
        if index == len(graph) - 1:
            depths.append(depth)
        for following in graph.successors[index]:
            walk(following, depth)

    for node in graph.nodes:
        if node.kind == "input":
            walk(node.index, 0)
    count, first, second, third = (sum(depth**power for depth in depths) for power in range(4))
    return count, first, second, third


def random_graph(seed: int, size: int = 14) -> Graph:
    """Nodes of random kinds, each fed by random nodes before it; with free parameters, which no path starts at."""
    draw = torch.Generator().manual_seed(seed)
    kinds = ["linear", "convolution", "add", "normalisation", "parameter", "input"]
    nodes = [Node(0, "input")]
    edges: list[tuple[int, int]] = []
    for index in range(1, size):
        kind = kinds[int(torch.randint(len(kinds), (), generator=draw))] if index < size - 1 else "output"
        nodes.append(Node(index, kind))
        if kind not in ("parameter", "input"):
            sources = torch.randperm(index, generator=draw)[: 1 + int(torch.randint(3, (), generator=draw))]
            edges += [(int(source), index) for source in sources.sort().values]
    return Graph(tuple(nodes), torch.tensor(edges).T)


@pytest.mark.parametrize("seed", range(20))
def test_sums_over_paths_are_those_of_an_enumeration(seed: int) -> None:
    graph = random_graph(seed)
    assert path_sums(graph) == enumerated(graph)


def test_sums_over_paths_of_real_networks_are_those_of_an_enumeration() -> None:
    """Residual, transformer and inception-like networks, the last with 6,561 paths and more."""
    for model in (
        torchvision.models.resnet18(),
        torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=10),
        Branches(3, layers=8, width=2),
        torchvision.models.googlenet(init_weights=False, aux_logits=False).inception3a,
    ):
        graph = trace(model, torch.zeros(2, 192, 8, 8) if hasattr(model, "branch1") else None)
        assert path_sums(graph) == enumerated(graph)
        assert path_sums(graph)[0] > 1


@pytest.mark.parametrize("blocks", [0, 1, 50, 600])
def test_sums_over_paths_of_residual_blocks_have_a_closed_form(blocks: int) -> None:
    """Stem, n blocks of two layers, head: C(n, k) paths of depth 2 + 2 k. 2^600 paths are too many for a walk."""
    nodes, edges = [Node(0, "input"), Node(1, "linear")], [(0, 1)]
    for _ in range(blocks):
        last = len(nodes)
        nodes += [Node(last, "linear"), Node(last + 1, "linear"), Node(last + 2, "add")]
        edges += [(last - 1, last), (last, last + 1), (last - 1, last + 2), (last + 1, last + 2)]
    nodes += [Node(len(nodes), "linear"), Node(len(nodes) + 1, "output")]
    edges += [(len(nodes) - 3, len(nodes) - 2), (len(nodes) - 2, len(nodes) - 1)]
    graph = Graph(tuple(nodes), torch.tensor(edges).T)
    wanted = sum(math.comb(blocks, k) * (2 + 2 * k) ** 3 for k in range(blocks + 1))
    assert path_sums(graph)[3] == wanted
    assert architecture_learning_rate(graph) == pytest.approx(math.exp(-0.5 * math.log(wanted)))


def chain(layers: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))


def plain(kernel: int, layers: int = 3) -> nn.Sequential:
    return nn.Sequential(*(nn.Conv2d(3, 3, kernel, padding=kernel // 2) for _ in range(layers)))


def test_learning_rate_of_chains() -> None:
    """L^(-3/2) for L layers, 1 / q for kernels of side q; relative to a base, whatever that was trained with."""
    assert architecture_learning_rate(chain(4)) == pytest.approx(4**-1.5)
    assert architecture_learning_rate(chain(9), base=chain(4), learning_rate=0.3) == pytest.approx(0.3 * (4 / 9) ** 1.5)
    assert architecture_learning_rate(plain(5), base=plain(3), learning_rate=0.1) == pytest.approx(0.1 * 3 / 5)
    assert architecture_learning_rate(trace(chain(4)), base=chain(4), learning_rate=0.2) == pytest.approx(0.2)


def test_kernel_side_is_a_geometric_mean() -> None:
    mixed = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 9, padding=4), nn.Conv2d(3, 3, (1, 9), padding=(0, 4)))
    assert kernel_side(trace(mixed)) == pytest.approx(3.0)
    assert kernel_side(trace(chain(2))) == 1.0


def test_the_report_has_the_factor() -> None:
    figures = init(plain(3), "architecture-aware").figures["architecture-aware"]
    assert figures["learning_rate_factor"] == pytest.approx(architecture_learning_rate(plain(3)))
    assert figures == pytest.approx(
        {"learning_rate_factor": 3**-1.5 / 3, "kernel_side": 3.0, "mean_depth": 3.0, "log10_paths": 0.0}
    )


def test_no_path_and_no_learning_rate() -> None:
    """A scale alone has no depth: the learning rate is refused, the weights are made all the same, with a note."""
    scale = Forward(lambda m, x: m.scale * x, scale=nn.Parameter(torch.ones(4)))
    with pytest.raises(ModelError, match="no path from an input to the output"):
        architecture_learning_rate(scale, example_inputs=torch.zeros(2, 4))
    report = init(scale, "architecture-aware", example_inputs=torch.zeros(2, 4))
    assert "no learning rate" in report.notes[0] and not report.figures


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf])
def test_bad_learning_rates(value: float) -> None:
    with pytest.raises(ConfigError, match="positive number"):
        architecture_learning_rate(chain(2), base=chain(1), learning_rate=value)
