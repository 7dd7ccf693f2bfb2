"""The PixelCNN: no place sees what comes after it, all that comes before counts, and sampling equals its slow twin."""

from __future__ import annotations

import pytest
import torch

from generators.local.pixelcnn import PixelCNN
from generators.seeds import stream


def make(codes: int = 6) -> PixelCNN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PixelCNN(codes, channels=4).eval()


@pytest.mark.parametrize("shape", [(3, 3), (1, 8), (5, 4)])
def test_a_place_depends_on_those_before_it_and_on_no_other(shape):
    network, size = make(), shape[0] * shape[1]
    maps = torch.randint(6, (1, *shape), generator=stream(0, "maps"))
    before = network(maps).flatten(2)
    for place in range(size):
        changed = maps.flatten(1).clone()
        changed[0, place] = (changed[0, place] + 1) % 6
        moved = (network(changed.reshape(maps.shape)).flatten(2) - before).abs().amax(1)[0]
        assert (moved[: place + 1] == 0).all()
        if place + 1 < size:
            assert moved[place + 1] > 0


@pytest.mark.parametrize("shape", [(3, 3), (1, 8), (5, 4), (1, 1)])
@torch.no_grad()
def test_sampling_equals_going_over_the_whole_map_for_every_place(shape):
    network = make()
    uniform = torch.rand(40, *shape, generator=stream(0, "uniform"))
    found = torch.zeros(uniform.shape, dtype=torch.long)
    for row in range(shape[0]):
        for column in range(shape[1]):
            cumulated = network(found)[:, :, row, column].softmax(1).cumsum(1)
            found[:, row, column] = (cumulated < uniform[:, row, column, None]).sum(1).clamp_max(5)
    assert torch.equal(network.sample(uniform), found)


@torch.no_grad()
def test_codes_are_as_frequent_as_the_network_says():
    network = make()
    found = network.sample(torch.rand(20_000, 1, 2, generator=stream(0, "uniform")))
    chances = network(torch.zeros(1, 1, 2, dtype=torch.long))[0, :, 0, 0].softmax(0)
    assert torch.allclose(torch.bincount(found[:, 0, 0], minlength=6) / 20_000, chances, atol=0.015)
