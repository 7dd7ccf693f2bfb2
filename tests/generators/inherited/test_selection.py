"""Weight selection: indices against the paper's rule, layers that feed each other, what has no counterpart."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from generators.errors import ConfigError, ModelError
from generators.filling import init
from generators.inherited.selection import WeightSelection, indices
from small_models import Forward, InputFirst, attention_block


def test_uniform_indices() -> None:
    """Every n-th where that divides; else evenly spread from the first to the last element, none twice."""
    assert indices(8, 4).tolist() == [0, 2, 4, 6]
    assert indices(7, 3).tolist() == [0, 3, 6]
    assert indices(10, 4).tolist() == [0, 3, 6, 9]
    assert indices(5, 1).tolist() == [0] and indices(5, 5).tolist() == [0, 1, 2, 3, 4]
    for large in range(1, 40):
        for small in range(1, large + 1):
            found = indices(large, small)
            assert len(set(found.tolist())) == small and found.min() >= 0 and found.max() < large
            if large % small:
                assert (found - torch.linspace(0, large - 1, small, dtype=torch.float64)).abs().max() < 0.5 + 1e-9


def test_other_choices() -> None:
    assert indices(8, 3, "consecutive").tolist() == [0, 1, 2]
    drawn = indices(100, 30, "random", torch.Generator().manual_seed(0))
    assert len(drawn.unique()) == 30 and torch.equal(drawn, drawn.sort().values) and drawn.max() > 30
    assert torch.equal(indices(9, 9, "random", torch.Generator()), torch.arange(9))
    with pytest.raises(ConfigError, match="choose 'uniform', 'consecutive' or 'random'"):
        indices(8, 4, "every other")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot select 5 of 4"):
        indices(4, 5)


# ---- a relative that holds the model: every channel several times -----------------------------------------------


def conv_net(width: int) -> nn.Module:
    """The linear layer reads a flattened grid: 4 positions of each of 2 `width` channels."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(4),
        nn.Conv2d(width, 2 * width, 1), nn.BatchNorm2d(2 * width, affine=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * width, 3 * width), nn.ReLU(), nn.Linear(3 * width, 10),
    )  # fmt: skip


def depthwise_net(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.Conv2d(width, width, 3, groups=width), nn.GroupNorm(1, width),
        nn.ConvTranspose2d(width, 2 * width, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip


def recurrent_net(width: int) -> nn.Module:
    return Forward(
        lambda m, x: m.head(m.body(x.flatten(1, 2))[0][:, -1]),
        body=nn.LSTM(8, width, 2, batch_first=True), head=nn.Linear(width, 10),
    )  # fmt: skip


def transformer(width: int) -> nn.Module:
    """Torch's own encoder, and a block with one linear layer for query, key and value whose width the graph tells."""
    layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
    return Forward(
        lambda m, x: m.head(m.body(m.stem(x.flatten(1, 2)) + m.table).mean(1)),
        stem=nn.Linear(8, width), table=nn.Parameter(torch.randn(1, 8, width)), body=layer, head=nn.Linear(width, 10),
    )  # fmt: skip


NETS = {"conv": conv_net, "depthwise": depthwise_net, "recurrent": recurrent_net, "transformer": transformer}


def repeated(value: Tensor, wanted: torch.Size, blocks: int, positions: int) -> Tensor:
    """`value` with every channel several times in a row, up to the shape `wanted`; slow and by hand.

    The first axis holds `blocks` stacked matrices, a second axis `positions` numbers per channel.
    """
    for axis, size in enumerate(wanted):
        times = size // value.shape[axis]
        inner = positions if axis == 1 else 1
        outer = blocks if axis == 0 and value.shape[0] % blocks == 0 else 1
        parts = value.unflatten(axis, (outer, -1, inner)).repeat_interleave(times, dim=axis + 1)
        value = parts.flatten(axis, axis + 2)
    return value


@pytest.mark.parametrize(("name", "blocks"), [("conv", 1), ("depthwise", 1), ("recurrent", 4), ("transformer", 3)])
@pytest.mark.parametrize("times", [2, 3])
def test_a_relative_with_repeated_channels_gives_back_the_model(name: str, blocks: int, times: int) -> None:
    """All tensors bit for bit: channels are chosen alike wherever they feed each other, running statistics too."""
    model, relative = NETS[name](4), NETS[name](4 * times)
    for value in filter(torch.is_floating_point, model.state_dict().values()):
        nn.init.normal_(value)
    stacked = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "in_proj")
    state = {}
    for key, wanted in relative.state_dict().items():
        inner = 4 if (name, key) == ("conv", "8.weight") else 1
        outer = blocks if any(word in key for word in stacked) else 1
        state[key] = repeated(model.state_dict()[key], wanted.shape, outer, inner)
    relative.load_state_dict(state)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    init(model, "he")
    report = init(model, "weight-selection", relative=relative, example_inputs=torch.zeros(2, 1, 8, 8))
    assert report.coverage == 1 and not any("running statistics" in note for note in report.notes)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("linear", [nn.Linear, InputFirst])
def test_query_key_and_value_of_a_linear_layer_are_chosen_one_by_one(linear: Any) -> None:
    """The graph tells that the layer is stacked; choosing from its 3 x 8 outputs at once would mix them."""
    relative, model = (attention_block(fused=True, width=width, linear=linear) for width in (8, 6))
    turned = linear is InputFirst
    with torch.no_grad():
        stack = torch.arange(24.0)[:, None].expand(24, 8)
        relative.qkv.weight.copy_(stack.T if turned else stack)
        relative.qkv.bias.copy_(torch.arange(24))
    inputs = torch.zeros(2, 3, 1)
    init(_with_head(model, 6), "weight-selection", relative=_with_head(relative, 8), example_inputs=inputs)
    chosen = indices(8, 6).tolist()
    assert len(set(chosen)) == 6
    assert model.qkv.bias.tolist() == [8 * block + row for block in range(3) for row in chosen]
    assert (model.qkv.weight[0] if turned else model.qkv.weight[:, 0]).tolist() == model.qkv.bias.tolist()
    assert torch.equal(model.out.weight, relative.out.weight[chosen][:, chosen])


def _with_head(block: nn.Module, width: int) -> nn.Module:
    stem, head = nn.Linear(1, width), nn.Linear(width, 2)
    return Forward(lambda m, x: m.head(m.block(m.stem(x)).mean(1)), stem=stem, block=block, head=head)


def test_channels_of_widths_that_do_not_divide() -> None:
    """Outputs, norm, running statistics and inputs of the next layers are chosen with one set of indices."""
    model, relative = conv_net(5), conv_net(7)
    for value in relative.buffers():
        nn.init.uniform_(value) if value.is_floating_point() else value.fill_(17)
    init(model, "weight-selection", relative=relative, example_inputs=torch.zeros(2, 1, 8, 8))
    first, second, third = indices(7, 5), indices(14, 10), indices(21, 15)
    assert torch.equal(model[0].weight, relative[0].weight[first])
    assert torch.equal(model[1].running_var, relative[1].running_var[first])
    assert torch.equal(model[5].running_mean, relative[5].running_mean[second]) and model[5].num_batches_tracked == 17
    assert torch.equal(model[4].weight, relative[4].weight[second][:, first])
    grid = relative[8].weight.unflatten(1, (14, 4))[third][:, second]
    assert torch.equal(model[8].weight, grid.flatten(1))
    assert torch.equal(model[10].weight, relative[10].weight[:, third])


# ---- which layer stands behind which ----------------------------------------------------------------------------


def staged(depths: tuple[int, int], width: int, *, named: bool) -> nn.Module:
    """Two stages of residual-free convolutions; with `named`, layer k of a stage has the same path at any depth."""
    stages = []
    channels = 1
    for stage, depth in enumerate(depths):
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width << stage, 3, padding=1), nn.ReLU()]
            channels = width << stage
        stages += [nn.Sequential(*layers, nn.MaxPool2d(2)) if named else nn.Sequential(*layers), nn.MaxPool2d(2)]
    layers = [layer for stage in stages for layer in (stage if isinstance(stage, nn.Sequential) else [stage])]
    body = nn.Sequential(*stages) if named else nn.Sequential(*layers)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    return nn.Sequential(body, head) if named else nn.Sequential(*body, *head)


@pytest.mark.parametrize("named", [True, False])
def test_the_first_layers_of_each_stage(named: bool) -> None:
    """With paths that agree, and with numbers that mean other layers in the deeper relative."""
    model, relative = staged((2, 2), 4, named=named), staged((3, 4), 8, named=named)
    init(model, "weight-selection", relative=relative, example_inputs=torch.zeros(2, 1, 32, 32))
    ours, theirs = ([m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)] for net in (model, relative))
    for layer, index in zip(ours, (0, 1, 3, 4, 7), strict=True):
        source = theirs[index].weight
        for axis, size in enumerate(layer.weight.shape):
            source = source.index_select(axis, indices(source.shape[axis], size))
        assert torch.equal(layer.weight, source)


def test_what_has_no_counterpart_goes_to_he_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    relative = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 10))
    report = init(model, "weight-selection", relative=relative)
    assert report.generated.keys() == {"0.weight", "0.bias"}
    assert "no layer of this kind is left" in report.fallbacks["2.weight"]
    assert "classes or words: 4.weight (3, 8), in the relative 2.weight (10, 16)" in report.fallbacks["4.bias"]
    assert report.fallbacks["2.weight"].startswith("he") and model[4].bias.eq(0).all()
    assert any("1 of 3 layers have a counterpart" in note for note in report.notes)
    wide = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 10))
    deeper = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))
    report = init(wide, "weight-selection", relative=deeper)
    assert "too small a counterpart: 0.weight (32, 6), in the relative 0.weight (16, 6)" in report.fallbacks["0.weight"]
    assert "2.weight" in report.generated


@pytest.mark.parametrize("linear_inherits", [True, False])
def test_a_linear_layer_and_a_pointwise_convolution_are_of_one_kind(linear_inherits: bool) -> None:
    """As in ConvNeXts of timm, whose smaller ones have convolutions where the larger ones have linear layers."""

    def net(width: int, linear: bool) -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            x = m.stem(x)
            return m.head((m.body(x.movedim(1, -1)).movedim(-1, 1) if linear else m.body(x)).mean((2, 3)))

        layer = nn.Linear(width, 2 * width) if linear else nn.Conv2d(width, 2 * width, 1)
        return Forward(
            forward, stem=nn.Conv2d(1, width, 3), body=layer, head=nn.Linear(2 * width, 10),
        )  # fmt: skip

    model, relative = net(4, linear_inherits), net(8, not linear_inherits)
    report = init(model, "weight-selection", relative=relative, example_inputs=torch.zeros(2, 1, 8, 8))
    assert report.coverage == 1
    assert torch.equal(model.body.weight.flatten(), relative.body.weight[::2, ::2].flatten())
    assert torch.equal(model.body.bias, relative.body.bias[::2])


def test_vocabularies_are_not_chosen_from() -> None:
    def net(words: int, width: int) -> nn.Module:
        return Forward(
            lambda m, x: m.head(m.table(x).mean(1)), table=nn.Embedding(words, width), head=nn.Linear(width, 3)
        )

    tokens = torch.zeros(2, 4, dtype=torch.int64)
    model, relative = net(9, 4), net(9, 8)
    init(model, "weight-selection", relative=relative, example_inputs=tokens)
    assert torch.equal(model.table.weight, relative.table.weight[:, ::2])
    report = init(net(7, 4), "weight-selection", relative=relative, example_inputs=tokens)
    assert "classes or words" in report.fallbacks["table.weight"] and "head.weight" in report.generated


def test_frozen_layers_keep_their_statistics() -> None:
    model, relative = conv_net(4), conv_net(8)
    relative[1].running_mean.fill_(3.0)
    model[1].requires_grad_(False)
    report = init(model, "weight-selection", relative=relative, example_inputs=torch.zeros(2, 1, 8, 8))
    assert report.kept.keys() == {f"1.{leaf}" for leaf in
        ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}  # fmt: skip
    assert model[1].running_mean.eq(0).all() and model[5].running_mean.shape == (8,)


def test_precision_and_the_relative_itself() -> None:
    """A relative in half precision serves a model in double; it is neither changed nor shared with."""
    model, relative = conv_net(4).double(), conv_net(8).half().requires_grad_(False)
    before = copy.deepcopy(relative.state_dict())
    init(model, "weight-selection", relative=relative, example_inputs=torch.zeros(2, 1, 8, 8).double())
    assert torch.equal(model[0].weight, relative[0].weight[::2].double())
    nn.init.zeros_(model[10].bias)
    assert all(torch.equal(value, before[key]) for key, value in relative.state_dict().items())
    assert model[0].weight.requires_grad and not relative[0].weight.requires_grad


def test_random_choices_are_consistent_and_belong_to_the_member() -> None:
    relative, found = conv_net(8), []
    for member in (0, 0, 1):
        model = conv_net(4)
        init(model, WeightSelection("random"), relative=relative, member=member,
             example_inputs=torch.zeros(2, 1, 8, 8))  # fmt: skip
        rows = [row for row in range(8) if any(torch.equal(relative[0].weight[row], w) for w in model[0].weight)]
        columns = relative[4].weight[:, rows]
        assert len(rows) == 4 and all(any(torch.equal(w, c) for c in columns) for w in model[4].weight)
        found.append(rows)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("relative", "error", "words"),
    [
        (None, ConfigError, "weight-selection needs relative; pass relative=model"),
        ("resnet", ModelError, "the relative cannot be inherited from: expected a torch.nn.Module, got str"),
        (nn.Linear(4, 4, device="meta"), ModelError, "the relative .*to_empty"),
        (nn.Conv2d(1, 4, 3), ConfigError, "no layer of Linear has a counterpart in the relative Conv2d; pass a larger"),
    ],
)
def test_relatives_that_do_not_serve(relative: Any, error: type[Exception], words: str) -> None:
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    with pytest.raises(error, match=words):
        init(model, "weight-selection", relative=relative)
    assert torch.equal(model.weight, before)


# ---- what it is for ---------------------------------------------------------------------------------------------


def test_a_selected_model_learns_digits_faster_than_he() -> None:
    """Two seeds, 30 steps of 100 on real digits: the mean loss is below that of He by a quarter."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    images, targets = (images - images.mean()) / images.std(), torch.tensor(digits.target)

    def train(model: nn.Module, steps: int, seed: int) -> list[float]:
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        losses = []
        for step in range(steps):
            batch = order[step * 100 % 1700 :][:100]
            loss = F.cross_entropy(model(images[batch]), targets[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        return losses

    relative = conv_net(16)
    init(relative, "he", seed=5)
    train(relative, 100, seed=5)
    means = {}
    for spec in ("he", "weight-selection"):
        losses = []
        for seed in range(2):
            model = conv_net(8)
            init(model, spec, seed=seed, relative=relative, example_inputs=images[:2])
            losses += train(model, 30, seed)
        means[spec] = sum(losses) / len(losses)
    assert means["weight-selection"] < 0.75 * means["he"], means
