"""A vector-quantised VAE of slices: every weight's place in the kernel gets one of K codes (arXiv 1711.00937).

The encoder keeps the axes of the slice: a feature per place, which is replaced by the nearest code. Codes are running
means of the features that they were nearest to; a code that is hardly used starts again at a feature of the batch. The
prior is uniform over codes, independently per place, so a slice costs `d log K` nats. Gradients pass the quantisation
unchanged ("straight through"), and features are drawn to their codes.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from generators.local.config import LocalOptions
from generators.local.slice_model import SliceModel

FEATURES = 4  # numbers of a code
DECAY = 0.95  # of the running means
DEAD = 0.3  # a code used less than this share of the mean use starts again
COMMITMENT = 0.25  # weight of the squared distance of features to their codes


class Codebook(nn.Module):
    """K codes of c numbers as running means.

    Args:
        codes: K.
        features: c.
    """

    codes: Tensor  # [K, c]
    sums: Tensor  # [K, c], running sums of features
    counts: Tensor  # [K], running numbers of features

    def __init__(self, codes: int, features: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(codes, features))
        self.register_buffer("sums", torch.zeros(codes, features))
        self.register_buffer("counts", torch.zeros(codes))

    def nearest(self, features: Tensor) -> Tensor:
        """Index `[N]` of the code nearest to each of the features `[N, c]`."""
        return (self.codes.square().sum(1) - 2.0 * features @ self.codes.T).argmin(1)

    @torch.no_grad()
    def update(self, features: Tensor, generator: torch.Generator) -> None:
        """Move the codes towards the means of their features `[N, c]`. In the first step they start at features."""
        used = nn.functional.one_hot(self.nearest(features), len(self.codes)).to(features)
        self.counts.lerp_(used.sum(0), 1.0 - DECAY)
        self.sums.lerp_(used.T @ features, 1.0 - DECAY)
        usual = self.counts.mean().clamp_min(1e-12)
        fresh = features[torch.randint(len(features), (len(self.codes),), generator=generator)]
        dead = self.counts < DEAD * usual
        self.counts.copy_(torch.where(dead, usual, self.counts))
        self.sums.copy_(torch.where(dead[:, None], fresh * usual, self.sums))
        self.codes.copy_(self.sums / self.counts[:, None])


class VectorQuantisedVAE(SliceModel):
    """Uniform codes. Options: channels, codes. After "VQVAE" of arXiv 2310.16695."""

    summary: ClassVar[str] = "one vector-quantised VAE with uniform codes per weight group (kernel size, role, depth)"
    least_active: ClassVar[int] = 2

    def __init__(self, shape: tuple[int, ...], options: LocalOptions) -> None:
        super().__init__(shape, options)
        self.latent = self.size
        self.codebook = Codebook(options.codes, FEATURES)
        channels = options.channels
        same = (3 if self.grid[0] > 1 else 1, 3 if self.grid[1] > 1 else 1)
        pad = (same[0] // 2, same[1] // 2)
        self.encoder = nn.Sequential(
            nn.Conv2d(1, channels, same, padding=pad), nn.SiLU(),
            nn.Conv2d(channels, channels, 1), nn.SiLU(),
            nn.Conv2d(channels, FEATURES, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(FEATURES, channels, same, padding=pad), nn.SiLU(),
            nn.Conv2d(channels, channels, 1), nn.SiLU(),
            nn.Conv2d(channels, 1, 1), nn.Flatten(),
        )  # fmt: skip

    def features(self, standardised: Tensor) -> Tensor:
        """Features `[N, d, c]` of standardised slices `[N, d]`, one per place."""
        return self.encoder(standardised.reshape(-1, 1, *self.grid)).flatten(2).transpose(1, 2)

    def rebuild(self, features: Tensor) -> Tensor:
        """Slices `[N, d]` from features or codes `[N, d, c]`; the inverse order of axes of `features`."""
        return self.decoder(features.transpose(1, 2).reshape(len(features), FEATURES, *self.grid))

    def rate(self, indices: Tensor) -> Tensor:
        """-log p of code maps `[N, d]` in nats per slice."""
        return torch.full((), self.size * math.log(len(self.codebook.codes)), device=indices.device)

    def indices(self, latents: Tensor) -> Tensor:
        """Code maps `[N, d]` of the prior for standard normal draws `[N, d]`: the inverse distribution function."""
        codes = len(self.codebook.codes)
        return (torch.special.ndtr(latents) * codes).long().clamp_max(codes - 1)

    def decode(self, latents: Tensor) -> Tensor:
        return self.rebuild(self.codebook.codes[self.indices(latents)])

    def loss(self, batch: Tensor, generator: torch.Generator, *, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.features(batch)
        flat = features.flatten(0, 1)
        if self.training:
            self.codebook.update(flat.detach(), generator)
        indices = self.codebook.nearest(flat.detach())
        codes = self.codebook.codes[indices].reshape(features.shape)
        misfit, noise = self.misfit(batch, self.rebuild(features + (codes - features).detach()))
        distance = (features - codes).square().sum((1, 2)).mean()
        rate = self.rate(indices.reshape(batch.shape))
        loss = misfit + beta * rate + COMMITMENT * distance
        return loss, {"misfit": misfit, "rate": rate, "noise": noise, "distance": distance}

    @torch.no_grad()
    def usage(self, batch: Tensor) -> dict[str, float]:
        """Codes in use (active units), of how many, and their perplexity: how many equally used codes say as much."""
        indices = self.codebook.nearest(self.features(batch).flatten(0, 1))
        shares = torch.bincount(indices, minlength=len(self.codebook.codes)) / len(indices)
        perplexity = torch.special.entr(shares).sum().exp().item()
        return {"active_units": int((shares > 0).sum()), "latent_units": len(shares), "perplexity": perplexity}
