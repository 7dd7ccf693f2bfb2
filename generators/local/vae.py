"""Variational autoencoders of single slices: convolutional and of linear layers.

The encoder `q(z|x)` is a normal with mean and log variance per latent, the prior `N(0, 1)`. There are as many latents
as a slice has weights (up to a limit), so that every direction of the data can have one.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from generators.local.config import LocalOptions
from generators.local.fidelity import active_units
from generators.local.slice_model import SliceModel


class GaussianVAE(SliceModel):
    """A VAE with normal latents; subclasses give `encoder` and `decoder`."""

    encoder: nn.Module
    decoder: nn.Module

    def encode(self, standardised: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log variance `[N, latent]` of standardised slices `[N, d]`."""
        mean, log_variance = self.encoder(standardised.reshape(-1, 1, *self.grid)).chunk(2, dim=1)
        return mean, log_variance.clamp(-10.0, 10.0)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)

    def loss(self, batch: Tensor, generator: torch.Generator, *, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
        mean, log_variance = self.encode(batch)
        draws = torch.randn(len(batch), self.latent, generator=generator)
        misfit, noise = self.misfit(batch, self.decode(mean + torch.exp(0.5 * log_variance) * draws))
        rate = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(1).mean()
        return misfit + beta * rate, {"misfit": misfit, "rate": rate, "noise": noise}

    @torch.no_grad()
    def usage(self, batch: Tensor) -> dict[str, float]:
        return {"active_units": active_units(self.encode(batch)[0]), "latent_units": self.latent}


class ConvVAE(GaussianVAE):
    """Convolutions of the slice as an image. Options: latent, channels, hidden. After "CVAE" of arXiv 2310.16695."""

    summary: ClassVar[str] = "one convolutional VAE per weight group (kernel size, role, depth)"

    def __init__(self, shape: tuple[int, ...], options: LocalOptions) -> None:
        super().__init__(shape, options)
        channels, hidden = options.channels, options.hidden
        same = (3 if self.grid[0] > 1 else 1, 3 if self.grid[1] > 1 else 1)
        pad = (same[0] // 2, same[1] // 2)
        self.encoder = nn.Sequential(
            nn.Conv2d(1, channels, same, padding=pad), nn.SiLU(),
            nn.Conv2d(channels, channels, same, padding=pad), nn.SiLU(),
            nn.Conv2d(channels, hidden, self.grid), nn.SiLU(),
            nn.Conv2d(hidden, 2 * self.latent, 1), nn.Flatten(),
        )  # fmt: skip
        # A transposed convolution of a 1x1 map and 1x1 convolutions, written as the matrix products that they are.
        self.decoder = nn.Sequential(
            nn.Linear(self.latent, hidden), nn.SiLU(inplace=True),
            nn.Linear(hidden, self.size * channels), nn.SiLU(inplace=True), nn.Unflatten(1, (self.size, channels)),
            nn.Linear(channels, channels), nn.SiLU(inplace=True),
            nn.Linear(channels, 1), nn.Flatten(),
        )  # fmt: skip


class LinearVAE(GaussianVAE):
    """Linear layers of the slice as a vector. Options: latent, hidden. After "LVAE" of arXiv 2310.16695."""

    summary: ClassVar[str] = "one VAE of linear layers per weight group (kernel size, role, depth)"

    def __init__(self, shape: tuple[int, ...], options: LocalOptions) -> None:
        super().__init__(shape, options)
        hidden = options.hidden
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(self.size, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, 2 * self.latent),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(self.latent, hidden), nn.SiLU(inplace=True), nn.Linear(hidden, hidden), nn.SiLU(inplace=True),
            nn.Linear(hidden, self.size),
        )  # fmt: skip
