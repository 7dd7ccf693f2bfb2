"""Codes keep their places, the codebook is its running means, and uniform draws use every code alike."""

from __future__ import annotations

import math

import pytest
import torch

from generators.local.config import LocalOptions
from generators.local.vector_quantised import DECAY, Codebook, VectorQuantisedVAE
from generators.seeds import stream


def make(shape=(5, 5)) -> VectorQuantisedVAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VectorQuantisedVAE(shape, LocalOptions(kind="vq-vae", channels=4, codes=8))
        model.codebook.codes.normal_()
        return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 7, 12, 23])
def test_a_code_moves_the_weights_around_its_place_and_a_weight_the_features_around_its_own(place):
    """The fault of the paper's code: a view in place of a transposition scattered each code over the slice."""
    model, row, column = make(), place // 5, place % 5
    near = [abs(j // 5 - row) <= 1 and abs(j % 5 - column) <= 1 for j in range(25)]
    indices = torch.randint(8, (1, 25), generator=stream(0, "indices"))
    changed = indices.clone()
    changed[0, place] = (changed[0, place] + 1) % 8
    first, second = (model.rebuild(model.codebook.codes[each])[0] for each in (indices, changed))
    assert (first != second).tolist() == near
    slices = torch.randn(1, 25, generator=stream(0, "slices"))
    moved = slices.clone()
    moved[0, place] += 1.0
    assert (model.features(slices) != model.features(moved)).any(2)[0].tolist() == near


def test_features_go_to_the_code_at_the_least_distance():
    book = Codebook(7, 3)
    book.codes.normal_(generator=stream(0, "codes"))
    features = torch.randn(50, 3, generator=stream(0, "features"))
    assert torch.equal(book.nearest(features), torch.cdist(features, book.codes).argmin(1))


def test_codes_are_running_means_and_unused_ones_start_again_at_features():
    book = Codebook(3, 2)
    book.codes.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [90.0, 90.0]]))
    book.counts.fill_(1.0)
    book.sums.copy_(book.codes)
    features = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [9.0, 0.0]])
    for _ in range(40):
        book.update(features, stream(0, "update"))
    assert all((features - code).norm(dim=1).min() < 1.5 for code in book.codes), "the far code has been given up"
    assert 0 < DECAY < 1
    once = Codebook(2, 1)
    once.counts.fill_(1.0)
    once.codes.copy_(torch.tensor([[0.0], [4.0]]))
    once.sums.copy_(once.codes)
    once.update(torch.tensor([[1.0], [4.0]]), stream(0, "update"))
    assert torch.allclose(once.codes, torch.tensor([[1 - DECAY], [4.0]]))


def test_every_code_is_as_likely_and_the_rate_says_so():
    model = make((1, 4))
    indices = model.indices(torch.randn(40_000, 4, generator=stream(0, "latents")))
    shares = torch.bincount(indices.flatten(), minlength=8) / indices.numel()
    assert torch.allclose(shares, torch.full((8,), 1 / 8), atol=0.005)
    assert model.rate(indices).item() == pytest.approx(4 * math.log(8))
    assert model.indices(torch.tensor([[-40.0, 40.0, 0.1, -0.1]])).tolist() == [[0, 7, 4, 3]]
