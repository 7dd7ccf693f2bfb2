"""Stratified splits that are a function of the data's digest and a seed, so that no run ever sees another split."""

from __future__ import annotations

import torch
from torch import Tensor

from generators.errors import DataError
from generators.seeds import stream


def stratified(labels: Tensor, fraction: float, *, digest: str, purpose: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Hold out `fraction` of every class.

    Args:
        labels: int64 `[N]`, N images.
        fraction: share to hold out, in (0, 1); every class keeps and gives at least one image.
        digest: of the data that is split.
        purpose: what is held out ("test", "validation"); splits for different purposes are independent.
        seed: the split seed; other seeds give other splits of the same data.

    Returns:
        Sorted indices of the images that are kept, and of those held out; together every index once.

    Raises:
        DataError: a class has a single image, so that it cannot be on both sides.
    """
    generator = stream(seed, "split", digest, purpose)
    held = []
    for label in labels.unique(sorted=True):
        members = (labels == label).nonzero().squeeze(1)
        if len(members) < 2:
            raise DataError(
                f"class {int(label)} has a single image, so no {purpose} part can be held out; "
                "give every class at least 3 images"
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held.append(members[torch.randperm(len(members), generator=generator)[:count]])
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.cat(held)] = True
    return (~chosen).nonzero().squeeze(1), chosen.nonzero().squeeze(1)
