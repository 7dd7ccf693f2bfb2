"""The two-sample test on slices of which is known whether they can be told apart; its curve against scikit-learn's."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from generators.local.two_sample import auroc, told_apart, two_sample_auroc
from generators.seeds import stream


def correlated(name: str, count: int = 6000, shape: tuple[int, ...] = (3, 3)) -> Tensor:
    """Slices with heavy tails and a spatial correlation, of unit second moment."""
    generator = stream(0, name)
    slices = torch.randn(count, *shape, generator=generator).cumsum(-1)
    slices = slices * torch.randn(count, *(1 for _ in shape), generator=generator).mul(0.5).exp()
    return slices / slices.square().mean().sqrt()


def gaussian(name: str, like: Tensor) -> Tensor:
    """Normal slices of the same covariance."""
    root = torch.linalg.cholesky(torch.cov(like.flatten(1).T))
    return (torch.randn(len(like), len(root), generator=stream(0, name)) @ root.T).reshape(like.shape)


FIRST, SECOND = correlated("first"), correlated("second")


def test_the_area_is_that_of_scikit_learn_ties_included():
    positive = torch.randn(300, generator=stream(0, "positive")).add(0.5).mul(4).round()
    negative = torch.randn(500, generator=stream(0, "negative")).mul(4).round()
    labels = [1] * 300 + [0] * 500
    assert auroc(positive, negative) == pytest.approx(roc_auc_score(labels, torch.cat([positive, negative])))
    assert auroc(torch.ones(3), torch.zeros(4)) == 1 and auroc(torch.ones(3), torch.ones(4)) == 0.5


def test_real_slices_are_not_told_from_real_ones():
    """White noise is, by its covariance; a normal of the same covariance is too, by its tails, but less easily."""
    figures = told_apart(correlated("third"), FIRST, SECOND, seed=0)
    assert figures["auroc"] == pytest.approx(0.5, abs=0.03)
    assert figures["auroc_he"] > 0.8
    assert figures["auroc"] + 0.05 < figures["auroc_normal"] < figures["auroc_he"] - 0.05


@pytest.mark.parametrize("shape", [(1, 8), (5,), (2, 3, 3), (7, 7)])
def test_white_noise_is_told_from_slices_of_every_shape(shape):
    first, second = (correlated(name, 3000, shape) for name in ("first", "second"))
    figures = told_apart(correlated("third", 3000, shape), first, second, seed=0)
    assert figures["auroc_he"] > 0.9 > 0.55 > figures["auroc"]


@pytest.mark.parametrize(
    ("fault", "least"),
    [
        (lambda slices: slices.mean(0).expand_as(slices), 0.95),  # a collapsed decoder: every slice is the same
        (lambda slices: slices.mean((1, 2), keepdim=True).expand_as(slices), 0.95),  # one number per slice
        (lambda slices: 1.5 * slices, 0.6),
        (lambda slices: gaussian("normal", slices), 0.65),  # the right moments, no tails
        (lambda slices: slices.abs(), 0.9),
        (lambda slices: slices.transpose(1, 2), 0.9),
    ],
    ids=["collapsed", "flat", "too large", "normal", "positive", "transposed"],
)
def test_what_is_wrong_with_slices_is_found(fault, least):
    assert two_sample_auroc(fault(correlated("third")), FIRST, SECOND, seed=0) > least


def test_a_generator_that_knows_the_networks_by_heart_is_judged_on_others():
    """Copies of the slices that the classifier learns from teach it nothing about those of other networks."""
    assert two_sample_auroc(torch.cat([FIRST, correlated("more")]), FIRST, SECOND, seed=0) == pytest.approx(
        0.5, abs=0.03
    )


def test_it_depends_on_the_seed_only():
    arguments = correlated("third", 1000), FIRST[:600], SECOND[:600]
    state = torch.get_rng_state()
    with torch.no_grad():
        once = two_sample_auroc(*arguments, seed=1)
    assert once == two_sample_auroc(*arguments, seed=1) != two_sample_auroc(*arguments, seed=2)
    assert torch.equal(state, torch.get_rng_state())
