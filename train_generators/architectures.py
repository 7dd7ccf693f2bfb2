"""Which architectures a GHN is trained on, and which are held out: named, drawn from families, of a zoo, or a mixture.

Held out by hash means by the name alone: the same architecture is held out of every training that asks for the share,
whatever else it is trained on.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from collect.architectures import FAMILIES, Architecture, families
from collect.data import ImageSet
from collect.forms import choose
from collect.zoo import Zoo
from generators.errors import ConfigError, unknown_name
from generators.seeds import stream

if TYPE_CHECKING:
    from train_generators.ghn_config import GHNTrainingConfig


@dataclass(frozen=True)
class Pool:
    """Architectures drawn at random from families.

    Attributes:
        families: Such as resnet vgg; () draws none.
        depths: Smallest and largest depth; what a depth is depends on the family, and impossible ones are passed over.
        widths: Smallest and largest width, likewise.
        count: How many are drawn in all; fewer if there are no more.
    """

    families: tuple[str, ...] = ()
    depths: tuple[int, int] = (3, 14)
    widths: tuple[int, int] = (8, 20)
    count: int = 32

    def __post_init__(self) -> None:
        for name in self.families:
            if name not in FAMILIES:
                raise unknown_name("family of architectures", name, families())
        for field in ("depths", "widths"):
            low, high = getattr(self, field)
            if not 1 <= low <= high:
                raise ConfigError(f"pool: {field} are the smallest and the largest, at least 1, got {low} {high}")
        if self.count < 1:
            raise ConfigError(f"pool: count must be at least 1, got {self.count}")
        bounds = (tuple(self.depths), tuple(self.widths), self.count)
        if not self.families and bounds != (Pool.depths, Pool.widths, Pool.count):
            raise ConfigError(
                "pool: depths, widths and count are of architectures drawn from families, and there are none; give "
                "--pool.families resnet vgg, or leave --pool.* alone"
            )

    def draw(self, images: ImageSet, *, seed: int) -> tuple[str, ...]:
        """`count` different architectures that take `images`, the same ones for a seed."""
        depths, widths = (range(low, high + 1) for low, high in (self.depths, self.widths))
        every = [str(Architecture(*parts)) for parts in itertools.product(self.families, depths, widths)]
        order = torch.randperm(len(every), generator=stream(seed, "architectures")).tolist()
        possible = (every[index] for index in order if _fits(every[index], images))
        return tuple(sorted(itertools.islice(possible, self.count)))


def _fits(name: str, images: ImageSet) -> bool:
    try:
        choose(name, shape=images.shape, classes=len(images.classes))
    except ConfigError:
        return False
    return True


def held_by_hash(name: str, share: float) -> bool:
    """Whether an architecture is among the `share` that is held out, from its name alone."""
    place = int.from_bytes(hashlib.blake2b(f"architecture:{name}".encode(), digest_size=8).digest(), "big") / 2**64
    return place < share


def resolve(config: GHNTrainingConfig, zoo: Zoo | None, images: ImageSet) -> GHNTrainingConfig:
    """`config` with all architectures to train on and all held-out ones by name.

    Named ones are on the side where they are named; drawn ones and those of the zoo are divided by hash.

    Raises:
        ConfigError: nothing is left to train on, or an architecture cannot take the images.
    """
    pool = config.pool
    if config.mix_zoo and zoo is None:
        raise ConfigError("mix_zoo adds the architectures of a zoo; give one with --zoo, or leave --mix-zoo out")
    found = set(pool.draw(images, seed=config.seed))
    if pool.families and not found:
        raise ConfigError(
            f"pool: no {' or '.join(pool.families)} has depth {pool.depths[0]} to {pool.depths[1]} and width "
            f"{pool.widths[0]} to {pool.widths[1]}; widen --pool.depths and --pool.widths"
        )
    if zoo is not None and (config.mix_zoo or not (config.architectures or found)):
        found |= {str(run["architecture"]) for run in zoo.runs}
    others = sorted(found - {*config.architectures, *config.held_out})
    held = {name for name in others if held_by_hash(name, config.hold_out)}
    trained = (*dict.fromkeys(config.architectures), *(name for name in others if name not in held))
    if not trained:
        raise ConfigError(
            f"all of {', '.join(others)} are held out by hash; lower --hold-out"
            if others
            else "no architectures to train on; name some (--architectures resnet-8-w8 vgg-3-w8), draw some "
            "(--pool.families resnet vgg) or give a --zoo"
        )
    if config.hold_out and not found:
        raise ConfigError(
            "hold_out is a share of the architectures that are drawn or taken from a zoo, and all are named; draw some "
            "(--pool.families resnet vgg), add those of a --zoo (--mix-zoo), or leave --hold-out at 0"
        )
    every = (*dict.fromkeys(config.held_out), *sorted(held))
    for name in (*trained, *every):  # one that does not fit the images is found now, not at the first evaluation
        choose(name, shape=images.shape, classes=len(images.classes))
    return replace(config, architectures=trained, held_out=every)
