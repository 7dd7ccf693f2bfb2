"""Metrics of stacked members against the mean over images of one member at a time."""

import math

import torch

from collect.metrics import METRIC_NAMES, losses, measure


def test_measure_against_one_image_at_a_time() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 30, 4, generator=generator)
    labels = torch.randint(4, (30,), generator=generator)
    for member, (loss, accuracy) in enumerate(measure(logits, labels).tolist()):
        probabilities = logits[member].softmax(1)
        surprise = [-math.log(probabilities[image, label]) for image, label in enumerate(labels.tolist())]
        hits = [int(probabilities[image].argmax()) == label for image, label in enumerate(labels.tolist())]
        assert math.isclose(loss, sum(surprise) / 30, rel_tol=1e-5)
        assert math.isclose(accuracy, sum(hits) / 30, rel_tol=1e-5)


def test_losses_have_their_own_labels_and_smoothing() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 30, 4, generator=generator)
    labels = torch.randint(4, (2, 30), generator=generator)
    target = torch.nn.functional.one_hot(labels, 4) * 0.9 + 0.1 / 4
    expected = -(target * logits.log_softmax(2)).sum(2).mean(1)
    torch.testing.assert_close(losses(logits, labels, smoothing=0.1), expected)


def test_names() -> None:
    assert METRIC_NAMES[0] == "train_loss"
    assert METRIC_NAMES[-1] == "test_accuracy"
