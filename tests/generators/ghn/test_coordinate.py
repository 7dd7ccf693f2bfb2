"""The coordinate decoder against loops, and the bounds that it promises for its spectrum."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from generators.ghn.coordinate import CoordinateDecoder, cosines
from generators.ghn.core import kernel_basis
from generators.ghn.decoder import DecoderSettings
from generators.ghn.plan import Group
from generators.ghn.spectrum import equalise


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def group(outputs, inputs, kernel=(), *, output=False) -> Group:
    return Group(
        names=("a",), blocks=(0,), nodes=torch.tensor([0]), outputs=outputs, inputs=inputs, kernel=kernel,
        fan_in=inputs * math.prod(kernel), output=output,
    )  # fmt: skip


def make(rank=6, cells=8, classes=10) -> CoordinateDecoder:
    settings = DecoderSettings(node_width=7, classes=classes, width=9, rank=rank, cells=cells)
    made = CoordinateDecoder(settings, generator=rng(1)).double()
    with torch.no_grad():
        made.spectrum.weight.normal_(0, 3, generator=rng(2))
    return made


@pytest.mark.parametrize("count", [1, 3, 7, 16, 300])
def test_cosines_are_orthogonal_over_any_number_of_places(count):
    """As many as there are places; the others are 0; and each is the formula."""
    waves = cosines(count, 16).double()
    gram = waves.T @ waves / count
    wanted = torch.eye(16).double() * (torch.arange(16) < count)
    torch.testing.assert_close(gram, wanted, rtol=0, atol=1e-4)
    for place in range(min(count, 5)):
        for frequency in range(1, min(count, 16)):
            value = math.sqrt(2) * math.cos(math.pi * frequency * (place + 0.5) / count)
            assert waves[place, frequency].item() == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("inputs, kernel", [(5, (3, 3)), (1, (3, 3)), (12, ()), (4, (5,))])
def test_factors_against_loops(inputs, kernel, output):
    """Number by number up to the two factors, then U diag(s) V^T at unit spread."""
    net, target = make(), group(10, inputs, kernel, output=output)
    vector = torch.randn(1, 1, 7, generator=rng(3)).double()
    hidden = F.gelu(net.hidden(vector[0, 0] + net.block_codes[0]))
    rank = min(6, 10, target.fan_in)
    row_gate, column_gate = net.row_gate(hidden), net.column_gate(hidden)
    places = net.class_codes if output else cosines(10, 16).double()
    left = torch.stack([
        sum((places[o] @ net.rows[:, w]) * row_gate[w] * net.row_base[w, :rank] for w in range(9)) for o in range(10)
    ])  # fmt: skip
    waves, basis = cosines(inputs, 16).double(), kernel_basis(kernel).double()
    right = torch.stack([
        sum((waves[i] @ net.columns[:, w]) * (basis[s] @ net.kernel[:, w]) * column_gate[w] * net.column_base[w, :rank]
            for w in range(9))
        for i in range(inputs) for s in range(len(basis))
    ])  # fmt: skip
    gains = torch.exp(torch.tanh(net.spectrum(hidden)[:rank]))
    wanted = equalise(left, 5) @ torch.diag(gains) @ equalise(right, 5).T
    wanted = wanted / wanted.square().mean().sqrt()
    torch.testing.assert_close(net(target, vector)[0, 0].flatten(1), wanted)


@pytest.mark.parametrize("outputs, inputs, kernel", [(48, 48, (3, 3)), (300, 64, ()), (32, 100, (1, 1))])
def test_spectrum_is_within_its_bounds(outputs, inputs, kernel):
    """All R singular values within e^2 of each other, with some room for factors that are only nearly orthogonal."""
    settings = DecoderSettings(node_width=7, classes=10, width=64, rank=24, cells=32)
    net = CoordinateDecoder(settings, generator=rng(1))
    with torch.no_grad():
        net.spectrum.weight.normal_(0, 10, generator=rng(2))
    weight = net(group(outputs, inputs, kernel), torch.randn(3, 1, 7, generator=rng(3)))[:, 0].detach()
    values = torch.linalg.svdvals(weight.flatten(2).flatten(1, 1))[:, :24]
    assert (values[:, 0] / values[:, -1] < 3 * math.e**2).all()
