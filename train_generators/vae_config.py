"""How local generators are fitted: one configuration for every kind."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from generators.errors import ConfigError
from generators.local.config import LocalConfig, LocalOptions
from train_generators.slice_source import RAM_LIMIT


@dataclass(frozen=True)
class VAEConfig(LocalOptions):
    """How the slice models are fitted, with their options.

    Attributes:
        steps: Optimiser steps per weight group.
        batch_size: Slices per step.
        lr: Highest learning rate of Adam; rises over the first 50 steps, then falls to 0 linearly.
        warm_up: Share of the steps over which the weight of the latents' cost (the KL term) rises from 0 to 1.
        init: Only networks that started from this initialiser are used, lest a generator be fitted on its own
            offspring; "any" uses all.
        slices_per_tensor: Slices used of one tensor at most, chosen at random.
        prune: Share of the slices of every tensor that are left out, those of the smallest norm.
        least_slices: Groups with fewer training slices are left out, and the card says so.
        save_every: Steps between two states to resume from.
        ram_limit: Bytes of the slices of one group that are held in RAM at most; of more than that a random share is
            measured. Training reads them from the files.
        name: What reports call the generator; its kind if empty.
    """

    most_stretch: float = 3.0
    steps: int = 400
    batch_size: int = 128
    lr: float = 1e-2
    warm_up: float = 0.3
    init: str = "he"
    slices_per_tensor: int = 4096
    prune: float = 0.0
    least_slices: int = 256
    save_every: int = 200
    ram_limit: int = RAM_LIMIT
    name: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch_size", "slices_per_tensor", "least_slices", "save_every", "ram_limit"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0 or not 0 <= self.warm_up <= 1:
            raise ConfigError(f"lr must be above 0 and warm_up in [0, 1], got {self.lr} and {self.warm_up}")
        if self.prune and self.kind == "filter-vae":
            raise ConfigError("a filter-vae learns from whole filters: leave out --prune, or choose another --kind")

    def generator(self, groups: tuple[str, ...]) -> LocalConfig:
        """The configuration of the generator that is fitted."""
        shared = {each.name: getattr(self, each.name) for each in dataclasses.fields(LocalOptions)}
        return LocalConfig(groups=groups, **shared)
