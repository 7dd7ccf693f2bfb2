"""A convolutional variational autoencoder of one weight group's slices, with a learned decoder variance.

Slices `[h, w]` with `d = h w` weights are standardised to `x` `[d]`: mean 0 and covariance 1 over the training split,
by the symmetric root of their covariance, which keeps their axes. What the VAE has to learn is the rest. With the
encoder `q(z|x)`, a normal with mean and log variance per latent, and the decoder `p(x|z) = N(decode(z), diag(noise))`,
whose variance `noise` `[d]` is learned (the sigma-VAE of Rybkin et al., arXiv 2006.13202), the loss per slice is

    sum_j [(x_j - decode(z)_j)^2 / noise_j + log noise_j] / 2  +  beta KL(q(z|x) | N(0, 1))

`noise` is the mean squared error per element of the batch, the best value there is. Two faults of a fixed one are
avoided: one too large for the weights makes the latents useless (posterior collapse: every slice is the same), one too
small drops the directions of low variance. It is at most a quarter of the data's variance, and there are as many
latents as a slice has weights (up to a limit), so every direction of the data pays for its latent.

Samples include the decoder's noise. What mismatch between the moments of prior samples and of the data is left after
fitting is taken out by a linear map (`calibrate`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from generators.local.fidelity import covariance

CHUNK = 256  # slices decoded at a time


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a covariance `[d, d]`; directions without variance get a little, so that roots have an inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(values.max().clamp_min(1e-12) * 1e-6).pow(exponent)) @ vectors.T


class SliceVAE(nn.Module):
    """VAE of slices `[N, h, w]`.

    Args:
        shape: `(h, w)`.
        latent: latent units at most; never more than `h w`.
        channels: channels of the maps of size `h x w`.
        hidden: channels of the map of size 1x1 between encoder and latents, and latents and decoder.
        noise_bounds: least and largest decoder variance, as shares of the data's variance per element.
    """

    noise: Tensor  # [d], decoder variance per element
    mean: Tensor  # [d]
    whiten: Tensor  # [d, d]: standardised = whiten @ (slice - mean)
    shift: Tensor  # [d]
    colour: Tensor  # [d, d]: slice = shift + colour @ (decoded + noise)
    unit_std: Tensor  # std of all generated weights
    zoo_gain: Tensor  # root mean square of the zoo's tensors over He's
    zoo_std: Tensor  # root mean square of the zoo's tensors

    def __init__(
        self, shape: tuple[int, ...], *, latent: int, channels: int, hidden: int, noise_bounds: tuple[float, float]
    ) -> None:
        super().__init__()
        height, width = shape
        self.shape = (height, width)
        size = height * width
        self.latent = min(latent, size)
        self.noise_bounds = noise_bounds
        same = (3 if height > 1 else 1, 3 if width > 1 else 1)
        pad = (same[0] // 2, same[1] // 2)
        self.encoder = nn.Sequential(
            nn.Conv2d(1, channels, same, padding=pad), nn.SiLU(),
            nn.Conv2d(channels, channels, same, padding=pad), nn.SiLU(),
            nn.Conv2d(channels, hidden, self.shape), nn.SiLU(),
            nn.Conv2d(hidden, 2 * self.latent, 1), nn.Flatten(),
        )  # fmt: skip
        # A transposed convolution of a 1x1 map and 1x1 convolutions, written as the matrix products that they are.
        self.decoder = nn.Sequential(
            nn.Linear(self.latent, hidden), nn.SiLU(),
            nn.Linear(hidden, size * channels), nn.SiLU(), nn.Unflatten(1, (size, channels)),
            nn.Linear(channels, channels), nn.SiLU(),
            nn.Linear(channels, 1), nn.Flatten(),
        )  # fmt: skip
        self.register_buffer("noise", torch.ones(size))
        for name in ("mean", "shift"):
            self.register_buffer(name, torch.zeros(size))
        for name in ("whiten", "colour"):
            self.register_buffer(name, torch.eye(size))
        for name in ("unit_std", "zoo_gain", "zoo_std"):
            self.register_buffer(name, torch.ones(()))

    def standardised(self, slices: Tensor) -> Tensor:
        """Slices `[N, h, w]` as the networks see them, `[N, d]`."""
        return (slices.flatten(1) - self.mean) @ self.whiten.T

    def encode(self, standardised: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and log variance `[N, latent]` of standardised slices `[N, d]`."""
        mean, log_variance = self.encoder(standardised.reshape(-1, 1, *self.shape)).chunk(2, dim=1)
        return mean, log_variance.clamp(-10.0, 10.0)

    def loss(self, standardised: Tensor, draws: Tensor, *, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss above (but for a constant) in nats per slice, and its parts: misfit, kl, and noise `[d]`.

        Args:
            standardised: slices `[N, d]`.
            draws: standard normal draws `[N, latent]` for the posterior samples.
            beta: weight of the KL term (warm-up).
        """
        mean, log_variance = self.encode(standardised)
        decoded = self.decoder(mean + torch.exp(0.5 * log_variance) * draws)
        square = (standardised - decoded).square().mean(0)
        noise = square.detach().clamp(*self.noise_bounds)
        misfit = 0.5 * (square / noise + noise.log()).sum()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(1).mean()
        return misfit + beta * divergence, {"misfit": misfit, "kl": divergence, "noise": noise}

    def standardise(self, slices: Tensor) -> None:
        """Record mean and covariance of the training slices `[N, h, w]`."""
        spread = covariance(slices)
        self.mean.copy_(slices.flatten(1).mean(0))
        self.whiten.copy_(_power(spread, -0.5))
        self.shift.copy_(self.mean)
        self.colour.copy_(_power(spread, 0.5))

    def settle(self, standardised: Tensor, draws: Tensor) -> None:
        """Record the decoder variance over slices `[N, d]`, with `draws` `[N, latent]` as in `loss`."""
        _, parts = self.loss(standardised, draws, beta=1.0)
        self.noise.copy_(parts["noise"])

    def _chunks(self, count: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Standardised slices with the decoder's noise `[CHUNK, d]`, until there are at least `count`.

        Draws are made on the CPU and decoded `CHUNK` at a time, the last chunk filled up: a matrix product may round
        otherwise with another number of rows.
        """
        size = len(self.noise)
        draws = torch.randn(count + -count % CHUNK, self.latent + size, generator=generator).to(self.noise.device)
        for chunk in draws.split(CHUNK):
            latents, noise = chunk.split([self.latent, size], dim=1)
            yield self.decoder(latents) + noise * self.noise.sqrt()

    @torch.no_grad()
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` new slices `[count, h, w]` of about unit second moment, bit for bit the same every time."""
        slices = [torch.addmm(self.shift, chunk, self.colour.T) for chunk in self._chunks(count, generator)]
        return torch.cat(slices)[:count].reshape(-1, *self.shape)

    @torch.no_grad()
    def calibrate(self, slices: Tensor, generator: torch.Generator, *, draws: int = 1 << 15) -> None:
        """Give what `draw` makes the mean and covariance of `slices` `[N, h, w]`, by one linear map."""
        ours, mean = torch.cat(list(self._chunks(draws, generator))).double(), slices.flatten(1).double().mean(0)
        target = covariance(slices)
        colour = _power(target, 0.5) @ _power(covariance(ours), -0.5)
        self.colour.copy_(colour)
        self.shift.copy_(mean - colour @ ours.mean(0))
        self.unit_std.copy_((target.diagonal().mean() + mean.var(correction=0)).sqrt())
