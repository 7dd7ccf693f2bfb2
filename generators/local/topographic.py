"""A topographic VAE of slices: latents in capsules whose units share their scale (arXiv 2109.01394).

Two encoders give normal posteriors of `z` and `u`, both with prior N(0, 1). The decoder sees

    s = (z + m) / sqrt(W u^2 + eps)

where `W u^2` sums a unit's own and its two neighbours' `u^2` around the circle of its capsule, and `m` is learned:
scale mixtures with heavy tails, in which neighbours are large or small together.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from generators.local.config import LocalOptions
from generators.local.vae import GaussianVAE

CAPSULE = 4  # units on a circle
EPSILON = 0.1  # keeps s within a few dozen: a sample with a tiny W u^2 would be larger than all others together


class TopographicVAE(GaussianVAE):
    """Options: latent (units of s, in whole capsules), channels, hidden. After "TVAE" of arXiv 2310.16695."""

    summary: ClassVar[str] = "one topographic VAE per weight group (kernel size, role, depth)"

    def __init__(self, shape: tuple[int, ...], options: LocalOptions) -> None:
        super().__init__(shape, options)
        self.units = math.ceil(self.latent / CAPSULE) * CAPSULE
        self.latent = 2 * self.units
        channels, hidden = options.channels, options.hidden
        same = (3 if self.grid[0] > 1 else 1, 3 if self.grid[1] > 1 else 1)
        pad = (same[0] // 2, same[1] // 2)

        def encoder() -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(1, channels, same, padding=pad), nn.SiLU(),
                nn.Conv2d(channels, hidden, self.grid), nn.SiLU(),
                nn.Conv2d(hidden, 2 * self.units, 1), nn.Flatten(),
            )  # fmt: skip

        self.encoder, self.encoder_u = encoder(), encoder()
        self.location = nn.Parameter(torch.zeros(self.units))
        self.decoder = nn.Sequential(
            nn.Linear(self.units, hidden), nn.SiLU(inplace=True),
            nn.Linear(hidden, self.size * channels), nn.SiLU(inplace=True), nn.Unflatten(1, (self.size, channels)),
            nn.Linear(channels, 1), nn.Flatten(),
        )  # fmt: skip

    def encode(self, standardised: Tensor) -> tuple[Tensor, Tensor]:
        maps = standardised.reshape(-1, 1, *self.grid)
        (mean, log_variance), (mean_u, log_variance_u) = (
            encoder(maps).chunk(2, dim=1) for encoder in (self.encoder, self.encoder_u)
        )
        return torch.cat([mean, mean_u], 1), torch.cat([log_variance, log_variance_u], 1).clamp(-10.0, 10.0)

    def decode(self, latents: Tensor) -> Tensor:
        z, u = latents.chunk(2, dim=1)
        squares = u.square().unflatten(1, (-1, CAPSULE))
        energy = (squares + squares.roll(1, 2) + squares.roll(-1, 2)).flatten(1)
        return self.decoder((z + self.location) * (energy + EPSILON).rsqrt())
