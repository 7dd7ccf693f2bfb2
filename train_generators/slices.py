"""Slices of a zoo's trained tensors by weight group: what local generators are fitted on.

Every tensor is divided by its root mean square and cut into slices, so that a group holds the shapes of kernels; how
large a layer's kernels are is set when they are used. Networks are split, never slices. The slices stay in the zoo's
files (`train_generators.slice_source`).
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from collect.flat import MAPS
from collect.zoo import Zoo, depths
from generators.inventory import Role
from generators.local.groups import GroupKey, group_key
from train_generators.slice_source import RAM_LIMIT, Slices, TensorStack, check_fraction

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SliceGroup:
    """The slices of one weight group, on both sides of the split.

    Attributes:
        train: of the networks that a generator is fitted on.
        held_out: of the others.
    """

    train: Slices
    held_out: Slices

    def sides(self) -> tuple[Slices, Slices]:
        """Two sets of networks with none in common, for the two-sample test (`generators.local.two_sample`).

        The two halves of the networks that are held out; with a single one, those to fit on and this one; with none,
        the two halves of those to fit on. Of a single network, the second set is empty.
        """
        if len(self.held_out.networks) == 1 and len(self.train):
            return self.train, self.held_out
        return (self.held_out if len(self.held_out) else self.train).halves()

    @property
    def gain(self) -> float:
        """Root mean square of the training tensors over He's, each tensor once; NaN if no fan-in is known."""
        return _root_mean(power * stack.fan_in / 2 for stack, power in self._powers())

    @property
    def std(self) -> float:
        """Root mean square of the training tensors, each tensor once."""
        return _root_mean(power for _, power in self._powers())

    def _powers(self) -> Iterator[tuple[TensorStack, float]]:
        return ((stack, power) for stack in self.train.stacks for power in stack.powers)


def _root_mean(powers: Iterator[float]) -> float:
    found = list(powers)
    return math.sqrt(sum(found) / len(found)) if found else math.nan


def open_groups(
    zoo: Zoo,
    *,
    patch: int,
    depth_buckets: int,
    slices_per_tensor: int,
    prune: float = 0.0,
    ram_limit: int = RAM_LIMIT,
) -> dict[GroupKey, SliceGroup]:
    """The slices of a zoo by weight group, output layers left out. Reads every weight once, and keeps none.

    Args:
        zoo: the runs to use. Those whose split is "train" are for training (`Zoo.split_of`), all others are held out.
        patch: length of the row patches of matrices.
        depth_buckets: into how many parts of equal depth networks are divided.
        slices_per_tensor: a tensor counts as one of so many slices at most.
        prune: share of the slices of every tensor to leave out, those of the smallest norm (`Slices.pruned`).
        ram_limit: bytes of the slices of one group that are held in RAM at most (`Slices.in_ram`).

    Raises:
        ConfigError: `prune` is not in [0, 1).
    """
    check_fraction(prune)
    stacks: dict[GroupKey, list[TensorStack]] = defaultdict(list)
    populations, runs = zoo.populations, zoo.column("id").tolist()
    mapped = functools.lru_cache(maxsize=MAPS)(lambda number: np.asarray(populations[number].place.state(-1)))
    ends = itertools.accumulate(map(len, populations))
    for number, (population, end) in enumerate(zip(populations, ends, strict=True)):
        networks = tuple(runs[end - len(population) : end])
        for spec, depth in zip(population.layout, depths(population.layout), strict=True):
            role, shape = Role(spec.role), tuple(spec.shape)
            if depth == 1.0 and role is not Role.CONV_WEIGHT:
                continue  # a linear layer that owns the last parameters is the classifier
            key = group_key(role, shape, depth, patch=patch, depth_buckets=depth_buckets)
            if key is not None:
                stack = TensorStack(
                    functools.partial(mapped, number), networks, population.rows, spec.name, shape, spec.offset,
                    depth=depth, fan_in=math.prod(shape[1:]), key=key,
                )  # fmt: skip
                stacks[key].append(stack)
    training = {run for run in runs if zoo.split_of(run) == "train"}
    return gather(stacks, training, slices_per_tensor=slices_per_tensor, prune=prune, ram_limit=ram_limit)


def gather(
    stacks: Mapping[GroupKey, Sequence[TensorStack]],
    training: Collection[str],
    *,
    slices_per_tensor: int,
    prune: float,
    ram_limit: int,
) -> dict[GroupKey, SliceGroup]:
    """Measure the tensors, leave out those that are all zero or not finite, and split by network.

    Args:
        stacks: the tensors of every group.
        training: the networks to fit on; all others are held out.
        slices_per_tensor, prune, ram_limit: as for `open_groups`.
    """
    groups = {}
    for key in sorted(stacks):
        usable = [_usable(stack.measured(prune)) for stack in stacks[key] if stack.count]
        found = [stack for stack in usable if stack.networks]
        slices = Slices(key, found, per_tensor=slices_per_tensor, ram_limit=ram_limit)
        if len(slices):
            train = [network for network in slices.networks if network in training]
            held_out = [network for network in slices.networks if network not in training]
            groups[key] = SliceGroup(slices.of(train), slices.of(held_out))
    return groups


def _usable(stack: TensorStack) -> TensorStack:
    """The networks in which the tensor has a root mean square to divide by."""
    for network, power, scale in zip(stack.networks, stack.powers, stack.scales, strict=True):
        if not scale:
            reason = "not finite" if not math.isfinite(power) else "all zero"
            log.warning("run %s: %s is %s and is left out", network, stack.name, reason)
    return stack.of([index for index, scale in enumerate(stack.scales) if scale])
