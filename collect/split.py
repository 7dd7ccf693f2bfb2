"""Splits that nothing moves: of images by the data's digest and a seed, of runs by their ids."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from generators.errors import DataError
from generators.seeds import stream

SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}  # of the runs of a zoo


def split_of(run: str) -> str:
    """The split of a run: "train", "validation" or "test".

    A pure function of the run's id: growing a zoo, or keeping it on another machine, never moves a run.
    """
    place = int.from_bytes(hashlib.blake2b(f"split:{run}".encode(), digest_size=8).digest(), "big") / 2**64
    for name, share in SPLITS.items():
        place -= share
        if place < 0:
            return name
    return "test"  # shares may add up to a rounding error below 1


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
