"""A VAE of whole layers: slices of a filter, and of an input channel, depend on each other.

A network stays the same function when its hidden channels change places, so the slices x_oi of a layer, o an output and
i an input channel, are an array whose rows and columns may be exchanged. By the theorem of Aldous and Hoover (1981) any
such array, if it can be continued for ever, is a function of independent draws for every row, every column and every
entry, and this model learns the function:

    x_oi = decode(row_o, column_i, own_oi, facts) + noise,   all latents N(0, 1)

`facts` are fan-in, fan-out and depth of the layer. Layers of any size are drawn with it. Posteriors of row and column
latents see the mean of an embedding over the slices of the row or column, that of `own_oi` what these leave of the
slice; the model is fitted on patches of some rows and some columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from generators.local.config import LocalOptions
from generators.local.fidelity import active_units
from generators.local.slice_model import Layer, SliceModel

FACTS = 3


def facts_of(layer: Layer) -> Tensor:
    """What the model is told of a layer, `[3]`: fan-in, fan-out and depth, of order 1."""
    return torch.tensor([math.log(layer.fan_in) / 2 - 2.5, math.log(layer.fan_out) / 2 - 2.5, 2.0 * layer.depth - 1.0])


@dataclass(frozen=True)
class Patches:
    """Standardised slices of some rows and columns of some layers.

    Attributes:
        slices: `[N, d]`.
        row, column: which of R rows and C columns each slice is in, `[N]`; those of two layers are never the same.
        facts: of the layers of the slices, `[N, 3]`.
    """

    slices: Tensor
    row: Tensor
    column: Tensor
    facts: Tensor

    @classmethod
    def of(cls, patches: list[tuple[Tensor, Layer]]) -> Patches:
        """From standardised slices `[rows, columns, d]` and the layer of each patch."""
        rows, columns, first_row, first_column = [], [], 0, 0
        for slices, _ in patches:
            height, width, _ = slices.shape
            rows.append((first_row + torch.arange(height)).repeat_interleave(width))
            columns.append((first_column + torch.arange(width)).repeat(height))
            first_row, first_column = first_row + height, first_column + width
        return cls(
            torch.cat([slices.flatten(0, 1) for slices, _ in patches]), torch.cat(rows), torch.cat(columns),
            torch.cat([facts_of(layer).expand(len(row), FACTS) for (_, layer), row in zip(patches, rows, strict=True)]),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.slices)


class Network(nn.Module):
    """Two hidden layers beside a linear map: weak linear dependences, of which filters have many, are learned first."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.rest = nn.Sequential(
            nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs)
        )

    def forward(self, values: Tensor) -> Tensor:
        return self.linear(values) + self.rest(values)


def _mean_by(values: Tensor, index: Tensor) -> Tensor:
    """Means of `values` `[N, c]` over equal `index` `[N]`, with the logarithm of how many, `[R, c + 1]`."""
    count = torch.bincount(index).to(values)
    total = values.new_zeros(len(count), values.shape[1]).index_add(0, index, values)
    return torch.cat([total / count[:, None], count.log()[:, None]], dim=1)


def _posterior(parameters: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Samples and means `[N, latent]` of normals `[N, 2 latent]`, and the sum of their divergences from N(0, 1)."""
    mean, log_variance = parameters.chunk(2, dim=1)
    log_variance = log_variance.clamp(-10.0, 10.0)
    draws = torch.randn(mean.shape, generator=generator)
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum()
    return mean + torch.exp(0.5 * log_variance) * draws, mean, divergence


class FilterVAE(SliceModel):
    """Row, column and own latents. Options: latent (of each of the three), hidden."""

    summary: ClassVar[str] = "one VAE of whole layers per weight group: slices share latents of their filter and input"
    paper: ClassVar[str] = "beyond arXiv 2310.16695"
    whole_layers: ClassVar[bool] = True

    least_facts: Tensor  # [3], of the layers it has seen, and at most 0; those of other layers are brought in between
    most_facts: Tensor  # [3], and at least 0

    def __init__(self, shape: tuple[int, ...], options: LocalOptions) -> None:
        super().__init__(shape, options)
        self.each = self.latent
        self.latent = 3 * self.each + FACTS
        hidden = options.hidden
        self.embedding = Network(self.size + 1 + FACTS, hidden, hidden)
        self.row = Network(hidden + 1, hidden, 2 * self.each)
        self.column = Network(hidden + 1, hidden, 2 * self.each)
        self.common = Network(2 * self.each + FACTS, hidden, self.size + 1)
        self.own = Network(self.size + 2 * self.each + FACTS, hidden, 2 * self.each)
        self.decoder = Network(self.latent, hidden, self.size)
        self.register_buffer("least_facts", torch.zeros(FACTS))
        self.register_buffer("most_facts", torch.zeros(FACTS))

    @property
    def normal(self) -> int:
        return self.latent - FACTS

    def encode(self, batch: Patches, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Posterior samples `[N, latent]`, means of each kind of latents, and their cost in nats per slice."""
        energy = batch.slices.square().mean(1, keepdim=True)
        embedded = self.embedding(torch.cat([batch.slices, energy, batch.facts], 1))
        rows, row_means, row_cost = _posterior(self.row(_mean_by(embedded, batch.row)), generator)
        columns, column_means, column_cost = _posterior(self.column(_mean_by(embedded, batch.column)), generator)
        shared = torch.cat([rows[batch.row], columns[batch.column], batch.facts], 1)
        base, gain = self.shared(shared)
        own, own_means, own_cost = _posterior(self.own(torch.cat([(batch.slices - base) / gain, shared], 1)), generator)
        means = {"row": row_means, "column": column_means, "own": own_means}
        return torch.cat([shared, own], 1), means, (row_cost + column_cost + own_cost) / len(batch)

    def shared(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What row and column make of a slice: its mean `[N, d]`, and the gain `[N, 1]` of what is its own."""
        base, gain = self.common(latents).split([self.size, 1], dim=1)
        return base, gain.tanh().exp()

    def decode(self, latents: Tensor) -> Tensor:
        base, gain = self.shared(latents[:, : -self.each])
        return base + gain * self.decoder(latents)

    def loss(self, batch: Patches, generator: torch.Generator, *, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
        if self.training:
            self.least_facts.copy_(torch.minimum(self.least_facts, batch.facts.amin(0)))
            self.most_facts.copy_(torch.maximum(self.most_facts, batch.facts.amax(0)))
        latents, _, rate = self.encode(batch, generator)
        misfit, noise = self.misfit(batch.slices, self.decode(latents))
        return misfit + beta * rate, {"misfit": misfit, "rate": rate, "noise": noise}

    @torch.no_grad()
    def usage(self, batch: Patches) -> dict[str, float]:
        """Active units of each kind: those whose posterior mean varies more than it would if all slices were 0."""
        nothing = replace(batch, slices=torch.zeros_like(batch.slices))
        means, least = (self.encode(each, torch.Generator().manual_seed(0))[1] for each in (batch, nothing))
        active = {f"active_{name}_units": active_units(means[name] - least[name]) for name in means}
        return {**active, "active_units": sum(active.values()), "latent_units": 3 * self.each}

    def prior(self, layer: Layer, count: int, generator: torch.Generator) -> Tensor:
        """Latents of the rows, of the columns, and of each slice: those of a row are the same for all its slices."""
        rows = torch.randn(layer.rows, self.each, generator=generator)
        columns = torch.randn(layer.length, self.each, generator=generator)
        own = torch.randn(count, self.each + self.size, generator=generator)
        place = torch.arange(count).clamp_max(max(layer.count - 1, 0))
        facts = facts_of(layer).clamp(self.least_facts.cpu(), self.most_facts.cpu()).expand(count, FACTS)
        return torch.cat([rows[place // layer.length], columns[place % layer.length], facts, own], 1)
