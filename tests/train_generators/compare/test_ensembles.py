"""Ensemble metrics against slow loops over images, and the draw of members."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from train_generators.compare.ensembles import image_scores, mean_log_probabilities, member_sets, quality

MEMBERS, IMAGES, CLASSES = 4, 60, 5


@pytest.fixture
def logits():
    return 3 * torch.randn(MEMBERS, IMAGES, CLASSES, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels():
    return torch.randint(CLASSES, (IMAGES,), generator=torch.Generator().manual_seed(1))


def test_quality_against_loops_over_images(logits, labels):
    """Every metric from its definition, one image at a time."""
    probabilities = [
        [sum(math.exp(m[i][c]) / sum(map(math.exp, m[i])) for m in logits.tolist()) / MEMBERS for c in range(CLASSES)]
        for i in range(IMAGES)
    ]
    truth = labels.tolist()
    best = [max(range(CLASSES), key=one.__getitem__) for one in probabilities]
    right = [guess == label for guess, label in zip(best, truth, strict=True)]
    nll = sum(-math.log(one[label]) for one, label in zip(probabilities, truth, strict=True)) / IMAGES
    brier = (
        sum(
            sum((p - (c == label)) ** 2 for c, p in enumerate(one))
            for one, label in zip(probabilities, truth, strict=True)
        )
        / IMAGES
    )
    ece = 0.0
    for k in range(15):
        inside = [i for i in range(IMAGES) if k / 15 < max(probabilities[i]) <= (k + 1) / 15]
        if inside:
            gap = sum(right[i] for i in inside) - sum(max(probabilities[i]) for i in inside)
            ece += abs(gap) / IMAGES
    votes = logits.argmax(-1).tolist()
    pairs = list(itertools.combinations(votes, 2))
    disagreement = sum(sum(a != b for a, b in zip(*pair, strict=True)) / IMAGES for pair in pairs) / len(pairs)

    found = quality(logits, labels)
    assert found.accuracy == pytest.approx(sum(right) / IMAGES)
    assert found.nll == pytest.approx(nll)
    assert found.brier == pytest.approx(brier)
    assert found.ece == pytest.approx(ece, abs=1e-6)
    assert found.disagreement == pytest.approx(disagreement)
    alone = [sum(v == t for v, t in zip(one, truth, strict=True)) / IMAGES for one in votes]
    assert found.member_accuracy == pytest.approx(sum(alone) / MEMBERS)


def test_image_scores_average_to_the_quality(logits, labels):
    found = quality(logits, labels)
    for name, values in image_scores(logits, labels).items():
        assert values.shape == (IMAGES,)
        assert float(values.mean()) == pytest.approx(getattr(found, name))


def test_probabilities_are_averaged_not_logits():
    """One member is very sure of class 0, two are fairly sure of class 1: probabilities vote, logits shout."""
    logits = torch.tensor([[[20.0, 0.0]], [[0.0, 5.0]], [[0.0, 5.0]]])
    assert mean_log_probabilities(logits).argmax() == 1
    assert logits.mean(0).argmax() == 0


def test_hopeless_predictions_stay_finite():
    logits = torch.tensor([[[1000.0, 0.0]], [[1000.0, 0.0]]])
    assert quality(logits, torch.tensor([1])).nll == pytest.approx(1000)


def test_equal_members_never_disagree(logits, labels):
    same = logits[:1].expand(3, -1, -1)
    assert quality(same, labels).disagreement == 0
    assert quality(same, labels).accuracy == pytest.approx(quality(same, labels).member_accuracy)


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 0), (2, 1), (5, 1), (6, 6), (7, 10), (25, 10)])
def test_member_sets_are_distinct_and_without_replacement(count, expected):
    sets = member_sets(count, 5, 10, seed=0)
    assert len(sets) == len(set(sets)) == expected
    assert all(len(set(one)) == len(one) == min(5, count) and set(one) <= set(range(count)) for one in sets)
    assert sets == member_sets(count, 5, 10, seed=0)


def test_first_member_sets_are_disjoint():
    first = member_sets(25, 5, 5, seed=3)
    assert sorted(itertools.chain(*first)) == list(range(25))
    assert first != member_sets(25, 5, 5, seed=4)
