"""What is measured of every member at every evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PARTS = ("train", "validation", "test")
METRIC_NAMES = tuple(f"{part}_{metric}" for part in PARTS for metric in ("loss", "accuracy"))


def losses(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of each member.

    Args:
        logits: `[K, N, classes]` of K members on N images.
        labels: int64 `[K, N]`.
        smoothing: label smoothing.

    Returns:
        `[K]`, in nats.
    """
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=smoothing)
    return each.view(labels.shape).mean(1)


def measure(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss and accuracy `[K, 2]` of K members with `logits` `[K, N, classes]` against `labels` `[N]`."""
    hits = (logits.argmax(2) == labels).float().mean(1)
    return torch.stack([losses(logits, labels.expand(len(logits), -1)), hits], dim=1)
