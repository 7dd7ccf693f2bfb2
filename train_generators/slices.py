"""Slices of a zoo's trained tensors by weight group: what local generators are fitted on.

Every tensor is divided by its root mean square and cut into slices, so that a group holds the shapes of kernels; how
large a layer's kernels are is set when they are used. Networks are split, never slices.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from collect.zoo import Zoo
from generators.inventory import MATRIX_ROLES, Role
from generators.local.groups import GroupKey, group_key
from generators.seeds import stream

log = logging.getLogger(__name__)


@dataclass
class GroupData:
    """Slices of one weight group, tensors divided by their root mean square; N slices `[h, w]` on each side."""

    train: list[Tensor] = field(default_factory=list)
    held_out: list[Tensor] = field(default_factory=list)
    train_runs: set[str] = field(default_factory=set)
    held_out_runs: set[str] = field(default_factory=set)
    powers: list[tuple[float, float]] = field(default_factory=list)  # of training tensors: mean square, He's

    def add(self, slices: Tensor, *, run: str, held_out: bool, power: float, he_power: float) -> None:
        (self.held_out if held_out else self.train).append(slices)
        (self.held_out_runs if held_out else self.train_runs).add(run)
        if not held_out:
            self.powers.append((power, he_power))

    @property
    def count(self) -> int:
        return sum(map(len, self.train))

    @property
    def gain(self) -> float:
        """Root mean square of the training tensors over He's."""
        return math.sqrt(sum(power / he for power, he in self.powers) / len(self.powers))

    @property
    def std(self) -> float:
        """Root mean square of the training tensors."""
        return math.sqrt(sum(power for power, _ in self.powers) / len(self.powers))


def read_groups(
    zoo: Zoo, *, patch: int, depth_buckets: int, slices_per_tensor: int, seed: int
) -> dict[GroupKey, GroupData]:
    """The slices of a zoo by weight group, output layers left out.

    Args:
        zoo: the runs to use.
        patch: length of the row patches of matrices.
        depth_buckets: into how many parts of equal depth networks are divided.
        slices_per_tensor: slices kept of one tensor at most, chosen at random.
        seed: of this choice.
    """
    groups: dict[GroupKey, GroupData] = {}
    for run, _, spec, depth, values in zoo.tensors():
        role = Role(spec.role)
        if role not in MATRIX_ROLES or (depth == 1.0 and role is not Role.CONV_WEIGHT):
            continue  # a linear layer that owns the last parameters is the classifier
        key = group_key(role, tuple(spec.shape), depth, patch=patch, depth_buckets=depth_buckets)
        if key is None or len(key.shape) != 2:
            continue
        tensor = torch.from_numpy(values.copy())
        power = tensor.square().mean().item()
        if not 0 < power < math.inf:
            log.warning("run %s: %s is %s and is left out", run, spec.name, "all zero" if power == 0 else "not finite")
            continue
        slices = key.cut(tensor / math.sqrt(power))
        if len(slices) > slices_per_tensor:
            order = torch.randperm(len(slices), generator=stream(seed, "slices", run, spec.name))
            slices = slices[order[:slices_per_tensor]]
        if len(slices):
            groups.setdefault(key, GroupData()).add(
                slices, run=run, held_out=zoo.split_of(run) != "train", power=power,
                he_power=2.0 / math.prod(spec.shape[1:]),
            )  # fmt: skip
    return {key: groups[key] for key in sorted(groups)}
