"""Ensembles of independently trained runs: how good, how sure, how different.

An ensemble predicts with the mean of its members' probabilities, p(y | x) = 1/M sum_m softmax(logits_m(x))
(Lakshminarayanan et al. 2017). Members are drawn without replacement. Definitions, over N images with labels y_i:

- NLL: mean of -log p(y_i | x_i), natural logarithm.
- Brier: mean over images of sum over classes of (p(c | x_i) - [c = y_i])^2; between 0 and 2 (Brier 1950).
- ECE: |accuracy - confidence| averaged over 15 equal bins of confidence, weighted by their counts (Guo et al. 2017).
- disagreement: share of images on which two members predict different classes, averaged over the pairs of members.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from generators.seeds import stream

ECE_BINS = 15
METRICS = ("accuracy", "nll", "brier", "ece", "disagreement")
TITLES = {
    "accuracy": "accuracy",
    "nll": "NLL (nats)",
    "brier": "Brier score",
    "ece": "ECE",
    "disagreement": "pairwise disagreement",
}


@dataclass(frozen=True)
class Quality:
    """The figures of one ensemble on one test set; `member_accuracy` is the mean accuracy of its members alone."""

    accuracy: float
    nll: float
    brier: float
    ece: float
    disagreement: float
    member_accuracy: float


def member_sets(count: int, size: int, most: int, *, seed: int) -> list[tuple[int, ...]]:
    """Up to `most` different sets of `size` out of `count` runs, none holding a run twice; `[]` if `count` < 2.

    With fewer runs than `size` there is one set of all of them. All sets are listed if there are no more than `most`;
    otherwise disjoint ones come first, by cutting random orders of the runs.
    """
    size = min(size, count)
    if size < 2:
        return []
    if math.comb(count, size) <= most:
        return list(itertools.combinations(range(count), size))
    generator = stream(seed, "ensembles", count, size)
    sets: dict[tuple[int, ...], None] = {}
    while len(sets) < most:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count - size + 1, size):
            sets[tuple(sorted(order[start : start + size]))] = None
    return list(sets)[:most]


def mean_log_probabilities(logits: Tensor) -> Tensor:
    """Logarithm of the members' mean probability: logits `[M, N, C]` to `[N, C]`, without underflow."""
    return torch.logsumexp(logits.double().log_softmax(-1), dim=0) - math.log(len(logits))


def image_scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The metrics that are means over images, image by image: name -> `[N]`, for logits `[M, N, C]`."""
    log_probabilities = mean_log_probabilities(logits)
    one_hot = torch.nn.functional.one_hot(labels, logits.shape[-1]).double()
    return {
        "accuracy": (log_probabilities.argmax(-1) == labels).double(),
        "nll": -log_probabilities.gather(1, labels[:, None])[:, 0],
        "brier": (log_probabilities.exp() - one_hot).square().sum(-1),
    }


def quality(logits: Tensor, labels: Tensor) -> Quality:
    """The quality of the ensemble with the given member logits `[M, N, C]` on images with `labels` `[N]`."""
    scores = {name: float(values.mean()) for name, values in image_scores(logits, labels).items()}
    predictions = logits.argmax(-1)
    pairs = [(one != two).double().mean() for one, two in itertools.combinations(predictions, 2)]
    calibration = multiclass_calibration_error(
        mean_log_probabilities(logits).exp(), labels, num_classes=logits.shape[-1], n_bins=ECE_BINS
    )
    return Quality(
        **scores,
        ece=float(calibration),
        disagreement=float(torch.stack(pairs).mean()),
        member_accuracy=float((predictions == labels).double().mean()),
    )
