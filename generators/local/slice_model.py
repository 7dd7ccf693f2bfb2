"""What all models of slices share: standardisation, decoder variance, sampling, calibration.

Slices of any shape, with `d` weights, are standardised to `x` `[d]`: mean 0 and covariance 1 over the training split,
by the symmetric root of their covariance, which keeps their axes. What a model has to learn is the rest. Its decoder
`p(x|z) = N(decode(z), diag(noise))` has a learned variance `noise` `[d]` (the sigma-VAE of Rybkin et al.,
arXiv 2006.13202), and the loss per slice is

    misfit + beta rate,   misfit = sum_j [(x_j - decode(z)_j)^2 / noise_j + log noise_j] / 2

where the rate is what the latents of the slice cost, in nats: `KL(q(z|x) | p(z))`. But for a constant, it is a bound on
-log p(x). `noise` is the mean squared error per element of the batch, the best value there is. Two faults of a fixed
one are avoided: one too large for the weights makes the latents useless (posterior collapse: every slice is the same),
one too small drops the directions of low variance. It is at most a quarter of the data's variance, so every direction
of the data pays for its latent.

Every prior is a map of standard normal draws, so that a sample is `decode(draws)` plus the decoder's noise, whatever
the model. What mismatch between the moments of prior samples and of the data is left after fitting is taken out by a
linear map (`calibrate`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from generators.local.config import LocalOptions
from generators.local.fidelity import covariance
from generators.local.groups import GroupKey

CHUNK = 512  # slices decoded at a time


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a covariance `[d, d]`; directions without variance get a little, so that roots have an inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(values.max().clamp_min(1e-12) * 1e-6).pow(exponent)) @ vectors.T


@dataclass(frozen=True)
class Layer:
    """A tensor as its slices see it: filters (rows) of equally many slices, one after the other.

    Attributes:
        rows: filters, the first axis of the tensor.
        length: slices of a filter: input channels of a convolution, patches of a matrix row.
        fan_in: weights of a filter.
        fan_out: weights of an input channel.
        depth: place in the network, 0 (input) to 1 (output).
    """

    rows: int
    length: int = 1
    fan_in: int = 1
    fan_out: int = 1
    depth: float = 0.5

    @classmethod
    def of(cls, key: GroupKey, shape: tuple[int, ...], depth: float) -> Layer:
        """The layer of a tensor of `shape` `[outputs, inputs, ...]` in group `key`."""
        fan_out = shape[0] * math.prod(shape[2:])
        return cls(shape[0], key.count(shape) // shape[0], math.prod(shape[1:]), fan_out, depth)

    @property
    def count(self) -> int:
        return self.rows * self.length


class SliceModel(nn.Module, ABC):
    """Base of all models of slices `[N, *shape]`. A subclass has an encoder, a decoder, `loss`, `decode` and `usage`.

    Args:
        shape: of a slice: of one axis, two `(h, w)` or three.
        options: sizes; `noise_bounds` are the least and largest decoder variance.

    Attributes:
        grid: `(h, w)` as convolutions see a slice: one of one axis as a row, one of three with the last two in a row.
        latent: numbers that a slice is decoded from; the first `normal` of them are standard normal.
        summary, paper: for the card of a generator.
        whole_layers: it learns from whole layers, not from single slices; then `batch` below is something else.
        least_active: with fewer active units, or codes, samples cannot differ: the model has collapsed.
    """

    summary: ClassVar[str]
    paper: ClassVar[str] = "arXiv 2310.16695"
    whole_layers: ClassVar[bool] = False
    least_active: ClassVar[int] = 1

    noise: Tensor  # [d], decoder variance per element
    mean: Tensor  # [d]
    whiten: Tensor  # [d, d]: standardised = whiten @ (slice - mean)
    shift: Tensor  # [d]
    colour: Tensor  # [d, d]: slice = shift + colour @ (decoded + noise)
    unit_std: Tensor  # std of all generated weights
    zoo_gain: Tensor  # root mean square of the zoo's tensors over He's
    zoo_std: Tensor  # root mean square of the zoo's tensors

    def __init__(self, shape: tuple[int, ...], options: LocalOptions) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.size = math.prod(shape)
        height = shape[0] if len(shape) > 1 else 1
        self.grid = (height, self.size // height)
        self.latent = min(options.latent, self.size)
        self.noise_bounds = options.noise_bounds
        self.register_buffer("noise", torch.ones(self.size))
        for name in ("mean", "shift"):
            self.register_buffer(name, torch.zeros(self.size))
        for name in ("whiten", "colour"):
            self.register_buffer(name, torch.eye(self.size))
        for name in ("unit_std", "zoo_gain", "zoo_std"):
            self.register_buffer(name, torch.ones(()))

    @property
    def normal(self) -> int:
        """How many of the `latent` numbers are draws."""
        return self.latent

    @abstractmethod
    def loss(self, batch: Any, generator: torch.Generator, *, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss above in nats per slice, and its parts: at least misfit, rate, and noise `[d]`.

        Args:
            batch: standardised slices `[N, d]`.
            generator: of the posterior samples.
            beta: weight of the rate (warm-up).
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Mean of the decoder `[N, d]` for standard normal draws `[N, latent]`."""

    @abstractmethod
    def usage(self, batch: Any) -> dict[str, float]:
        """What of the latents carries anything about the slices of `batch`: at least active_units and latent_units."""

    def standardised(self, slices: Tensor) -> Tensor:
        """Slices `[N, *shape]` as the networks see them, `[N, d]`."""
        return (slices.flatten(1) - self.mean) @ self.whiten.T

    def misfit(self, standardised: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor]:
        """Misfit in nats per slice, and the decoder variance `[d]` it is taken with, for `[N, d]` and `[N, d]`."""
        square = (standardised - decoded).square().mean(0)
        noise = square.detach().clamp(*self.noise_bounds)
        return 0.5 * (square / noise + noise.log()).sum(), noise

    def standardise(self, slices: Tensor) -> None:
        """Record mean and covariance of the training slices `[N, *shape]`."""
        spread = covariance(slices)
        self.mean.copy_(slices.flatten(1).mean(0))
        self.whiten.copy_(_power(spread, -0.5))
        self.shift.copy_(self.mean)
        self.colour.copy_(_power(spread, 0.5))

    @torch.no_grad()
    def settle(self, batch: Any, generator: torch.Generator) -> None:
        """Record the decoder variance over a batch, as in `loss`."""
        self.noise.copy_(self.loss(batch, generator, beta=1.0)[1]["noise"])

    def prior(self, layer: Layer, count: int, generator: torch.Generator) -> Tensor:
        """Draws `[count, latent + d]`, latents and decoder noise, for the slices of a layer and what fills a chunk."""
        return torch.randn(count, self.latent + self.size, generator=generator)

    def _chunks(self, layer: Layer, generator: torch.Generator) -> Iterator[Tensor]:
        """Standardised slices with the decoder's noise `[CHUNK, d]`, until there are at least those of `layer`.

        Draws are made on the CPU and decoded `CHUNK` at a time, the last chunk filled up: a matrix product may round
        otherwise with another number of rows.
        """
        draws = self.prior(layer, layer.count + -layer.count % CHUNK, generator).to(self.noise.device)
        for chunk in draws.split(CHUNK):
            latents, noise = chunk.split([self.latent, self.size], dim=1)
            yield self.decode(latents) + noise * self.noise.sqrt()

    @torch.no_grad()
    def draw(self, layer: Layer, generator: torch.Generator) -> Tensor:
        """New slices `[count, *shape]` for a layer, of about unit second moment, bit for bit the same every time."""
        slices = [torch.addmm(self.shift, chunk, self.colour.T) for chunk in self._chunks(layer, generator)]
        return torch.cat(slices)[: layer.count].reshape(-1, *self.shape)

    @torch.no_grad()
    def calibrate(self, slices: Tensor, layers: Iterable[Layer], generator: torch.Generator) -> None:
        """Give what `draw` makes for `layers` the mean and covariance of `slices` `[N, *shape]`, by one linear map."""
        ours = torch.cat([torch.cat([*self._chunks(each, generator)])[: each.count] for each in layers]).double()
        target, mean = covariance(slices), slices.flatten(1).double().mean(0)
        colour = _power(target, 0.5) @ _power(covariance(ours), -0.5)
        self.colour.copy_(colour)
        self.shift.copy_(mean - colour @ ours.mean(0))
        self.unit_std.copy_((target.diagonal().mean() + mean.var(correction=0)).sqrt())
