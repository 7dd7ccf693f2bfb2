"""The block decoders against convolutions and loops, as the papers write them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from generators.ghn.block import BlockDecoder, FanInBlockDecoder
from generators.ghn.decoder import DecoderSettings
from generators.ghn.plan import Group

WIDTH, SIDE, BLOCK = 6, 5, 8


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def group(outputs, inputs, kernel=(), *, output=False) -> Group:
    return Group(
        names=("a", "b"), blocks=(0, 1), nodes=torch.tensor([1, 0]), outputs=outputs, inputs=inputs, kernel=kernel,
        fan_in=inputs * math.prod(kernel), output=output,
    )  # fmt: skip


def make(kind=BlockDecoder) -> BlockDecoder:
    settings = DecoderSettings(node_width=WIDTH, classes=10, block=BLOCK, block_kernel=SIDE)
    return kind(settings, generator=rng(1)).double()


def reference(net: BlockDecoder, target: Group, node: torch.Tensor) -> torch.Tensor:
    """One target `[O, I, h, w]` of one node vector: the whole kernel, real convolutions, tiles by `Tensor.repeat`."""
    height, width = (1, 1, *target.kernel)[-2:]
    x = F.relu(net.positions(node)).reshape(1, 4 * WIDTH, SIDE, SIDE)
    top, left = max(0, (SIDE - height) // 2), max(0, (SIDE - width) // 2)
    x = x[:, :, top : top + height, left : left + width]
    x = F.relu(F.conv2d(x, net.mix.weight[:, :, None, None], net.mix.bias))
    x = F.conv2d(x, net.blocks.weight[:, :, None, None], net.blocks.bias)
    x = x.reshape(BLOCK, BLOCK, *x.shape[2:])
    if x.shape[2:] != (height, width):
        x = F.interpolate(x, (height, width), mode="bilinear")
    if target.output:
        x = torch.stack([sum(code[r] * F.relu(x[r]) for r in range(BLOCK)) for code in net.class_codes])
    times = math.ceil(target.outputs / x.shape[0]), math.ceil(target.inputs / BLOCK)
    return x.repeat(*times, 1, 1)[: target.outputs, : target.inputs]


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3), (5, 5), (7, 7), (3,), (1, 3), (2, 2), (7, 3)])
@pytest.mark.parametrize("outputs, inputs", [(3, 5), (8, 8), (20, 1), (17, 30)])
def test_against_convolutions(outputs, inputs, kernel):
    """Cut and tiled, all kernels: fan-in scaled as it is, or brought to unit spread."""
    target, nodes = group(outputs, inputs, kernel), torch.randn(3, 2, WIDTH, generator=rng(2)).double()
    for kind in (BlockDecoder, FanInBlockDecoder):
        net = make(kind)
        found = net(target, nodes)
        for member in range(3):
            for index, (block, place) in enumerate(zip(target.blocks, target.nodes, strict=True)):
                wanted = reference(net, target, nodes[member, place] + net.block_codes[block])
                if kind is BlockDecoder:
                    wanted = wanted / wanted.square().mean().sqrt()
                elif (1, 1, *kernel)[-2] < (1, 1, *kernel)[-1] or (inputs == 1 and kernel):
                    wanted = wanted * math.sqrt(0.5)  # beta is 1 where He has 2
                torch.testing.assert_close(found[member, index], wanted.reshape(target.shape))


def test_classifier_against_loops():
    """A head of its own with a row per class; the reference gives it beta 2, where ours has gain 1."""
    target, nodes = group(10, 30, output=True), torch.randn(1, 2, WIDTH, generator=rng(2)).double()
    net = make(FanInBlockDecoder)
    wanted = reference(net, target, nodes[0, 1] + net.block_codes[0])[:, :, 0, 0] * math.sqrt(2)
    torch.testing.assert_close(net(target, nodes)[0, 0], wanted)


def test_start_is_of_unit_spread_on_average():
    """Over nodes of unit second moment, for the decoder that does not normalise: plain and classifier."""
    settings = DecoderSettings(node_width=32, classes=10, block=16, block_kernel=3)
    net, nodes = FanInBlockDecoder(settings, generator=rng(3)), torch.randn(64, 2, 32, generator=rng(4))
    for target, wanted in ((group(16, 16, (3, 3)), 1.0), (group(10, 16, output=True), math.sqrt(2))):
        rms = net(target, nodes).square().mean().sqrt().item()
        assert 0.7 * wanted < rms < 1.4 * wanted
