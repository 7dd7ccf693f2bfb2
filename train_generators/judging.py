"""What the networks that a GHN generates are worth before any training, and how much they vary."""

from __future__ import annotations

import torch

from collect.architectures import build, parse
from collect.data import ImageSet
from collect.stacked import CALIBRATION_IMAGES, predict
from generators.ghn.ghn import GHN
from generators.initialiser import Request
from generators.inventory import inventory
from generators.statistics import measure

JUDGED_MEMBERS = 3  # members per architecture in an evaluation


def zero_shot(ghn: GHN, name: str, images: ImageSet, split: str, *, members: int = JUDGED_MEMBERS) -> dict[str, float]:
    """Accuracy before any training of generated networks, batch-norm statistics from training images.

    Returns:
        `accuracy` (mean over members) and `disagreement` (share of images on which two members differ, mean of pairs).
    """
    module = build(parse(name), shape=images.shape, classes=len(images.classes))
    states = ghn.sample(module, members, seed=0, example_inputs=torch.zeros(1, *images.shape))
    part = getattr(images, split)
    logits = predict(
        name, states, part.images, shape=images.shape, classes=len(images.classes),
        calibration=images.train.images[:CALIBRATION_IMAGES],
    )  # fmt: skip
    votes = logits.argmax(dim=-1)
    pairs = [(i, j) for i in range(members) for j in range(i)]
    return {
        "accuracy": (votes == part.labels).float().mean().item(),
        "disagreement": sum((votes[i] != votes[j]).float().mean().item() for i, j in pairs) / max(len(pairs), 1),
    }


def variety(ghn: GHN, name: str, images: ImageSet) -> dict[str, float]:
    """Least stable rank, distinct share and both ends of the std ratio over the decoded tensors of one network."""
    module = build(parse(name), shape=images.shape, classes=len(images.classes))
    request = Request(inventory(module), example_inputs=torch.zeros(1, *images.shape))
    proposal = ghn.propose(module, request)
    spread = {group_name: group.target_std for group in ghn.plan(module, request.example_inputs).groups
              for group_name in group.names}  # fmt: skip
    rows = [measure(proposal.values[name], target) for name, target in spread.items()]
    return {
        "least_stable_rank": min(row.stable_rank for row in rows if row.rank_limit > 1),
        "least_distinct_share": min(row.distinct_share for row in rows),
        "least_std_ratio": min(row.std_ratio for row in rows),
        "greatest_std_ratio": max(row.std_ratio for row in rows),
    }
