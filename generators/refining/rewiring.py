"""Preferential-attachment rewiring (Scabini, De Baets and Bruno, 2022, arXiv 2207.08148).

The strength of a neuron is the sum of its weights, with their signs. Rewiring permutes the weights of a layer such that
strengths come close to each other: row by row, the smaller weights of a row go to the columns whose sums are large
already. A column of sum s_j over the rows so far is drawn with odds p_j = s_j + |min s| + 1, without replacement; the
k-th smallest weight goes to the k-th column drawn. A second pass does the same to the transpose. The whole tensor keeps
its values, so its mean, spread and norm; its spectrum changes, orthogonality is lost.

Drawing is a race: with E_j ~ Exp(1), the order of E_j / p_j is that of weighted draws without replacement. It is the
Gumbel top-k trick, -(log p_j + G_j), without its logarithms. `"rewire-greedy"` draws nothing: the column of the largest
sum gets the smallest weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from generators.initialiser import Kind, Proposal, Request, register
from generators.inventory import MATRIX_ROLES, Inventory, ParameterInfo
from generators.refining.stored import matrices, outputs_first
from generators.seeds import derive

DRAWN_TOGETHER = 2**18  # numbers of a race; whole rows
REWIRED_TOGETHER = 2**24  # numbers in the matrices of one shape; one matrix at least

Draws = np.random.Generator | None
"""Where the races of a matrix come from; None for the greedy form."""


def sort(values: Tensor) -> Tensor:
    """Values rising along the last axis. Numpy sorts short rows many times faster than torch on the CPU."""
    return torch.from_numpy(np.sort(values.numpy())) if values.device.type == "cpu" else values.sort(dim=-1).values


def argsort(values: Tensor, *, falling: bool = False) -> Tensor:
    """Places of rising, or falling, values along the last axis; where they fall, equal ones by place. See `sort`."""
    if values.device.type != "cpu":
        return values.argsort(dim=-1, descending=falling, stable=True)
    array = values.numpy()
    return torch.from_numpy(np.negative(array).argsort(kind="stable") if falling else array.argsort())


def order(sums: Tensor, race: Tensor | None) -> Tensor:
    """The columns, the one for the smallest weight first.

    Args:
        sums: `[..., m]`, of the weights in m columns so far.
        race: `[..., m]`, drawn from Exp(1); None for falling sums (equal ones by their place) instead of a lot.
    """
    if race is None:
        return argsort(sums, falling=True)
    return argsort(race / (sums + (sums.amin(-1, keepdim=True).abs() + 1.0)))


def races(draws: Sequence[Draws], rows: int, like: Tensor) -> Iterator[Tensor] | Iterator[None]:
    """For every row the races `[K, m]` of K matrices, drawn on the CPU, so that no device changes the outcome."""
    matrices, columns = like.shape
    step = max(1, DRAWN_TOGETHER // columns)
    for start in range(0, rows, step):
        block = np.empty((matrices, min(step, rows - start), columns))
        drawn = [draw.standard_exponential(out=part) for draw, part in zip(draws, block, strict=True) if draw]
        yield from torch.from_numpy(block).to(like.device).unbind(1) if drawn else [None] * block.shape[1]


def rewire_rows(weights: Tensor, draws: Sequence[Draws]) -> None:
    """One pass, in place: every row but the first is permuted.

    Rows follow one another, matrices go side by side.

    Args:
        weights: `[K, n, m]`, K matrices of n rows and m columns.
        draws: K, one per matrix; all None for the greedy form.
    """
    rows = weights.shape[1]
    ascending = sort(weights)
    sums = torch.zeros_like(weights[:, 0], dtype=torch.float64)  # whatever the weights: the sums run over all rows
    for row, race in enumerate(races(draws, rows - 1, sums), 1):
        sums += weights[:, row - 1]
        weights[:, row].scatter_(1, order(sums, race), ascending[:, row])


def rewired(weights: Tensor, draws: Sequence[Draws]) -> Tensor:
    """Both passes over a copy of `[K, n, m]`: along the n outputs, then along the m inputs; see `rewire_rows`."""
    result = weights.clone(memory_format=torch.contiguous_format)
    for _ in range(2):
        rewire_rows(result, draws)
        result = result.mT.contiguous()
    return result


def strength_variances(weights: Tensor) -> tuple[float, float]:
    """Variances of the strengths of inputs and of outputs (column and row sums) of `[B, n, m]`, averaged over B."""
    strengths = (weights.sum(axis, dtype=torch.float64) for axis in (1, 2))
    columns, rows = (each.var(1, correction=0).mean().item() for each in strengths)
    return columns, rows


def full_precision(value: Tensor) -> Tensor:
    """In float64 or float32; half precision fits into the latter as it is. On the CPU where there may be no float64."""
    device = value.device if value.device.type == "cuda" else "cpu"
    return value.detach().to(device, torch.float64 if value.dtype == torch.float64 else torch.float32)


@dataclass(frozen=True)
class Rewiring:
    """Rewires every matrix of the model: convolutions, linear layers, each of stacked matrices (query, key and value;
    gates) on its own. These are the stored numbers, also where a weight is computed from them (weight norm).

    Matrices of one shape are rewired side by side, on the GPU if they are there; the lots are drawn on the CPU.

    Attributes:
        greedy: the largest sum gets the smallest weight, and nothing is drawn.
    """

    name: str = "rewire"
    greedy: bool = False
    kind: Kind = Kind.REFINING

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """The weights of `model`, permuted; `statistics` have the variances of strengths after against before."""
        proposal = Proposal()
        for infos, before in self._of_one_shape(model, request.inventory):
            roots = [derive(request.seed, self.name, request.member, info.name) for info in infos]
            draws = [None if self.greedy else np.random.default_rng(root) for root in roots]
            after = torch.stack([rewired(blocks, draws) for blocks in before.unbind(1)], 1)
            for info, old, new in zip(infos, before, after, strict=True):
                value = model.get_parameter(info.name)
                proposal.values[info.name] = outputs_first(new.reshape(outputs_first(value, info).shape), info)
                proposal.sources[info.name] = f"{self.name}: weights permuted"
                proposal.statistics[info.name] = _ratios(strength_variances(old), strength_variances(new))
        if not proposal.values:
            proposal.notes.append(f"{self.name}: the model has no matrix to rewire")
        return proposal

    def _of_one_shape(self, model: nn.Module, found: Inventory) -> Iterator[tuple[list[ParameterInfo], Tensor]]:
        """Parameters with weights of one shape, dtype and device, stacked: `[K, B, n, m]`, see `matrices`."""
        alike: dict[tuple, list[ParameterInfo]] = defaultdict(list)
        for info in found:
            if info.role not in MATRIX_ROLES or len(info.shape) < 2 or not info.numel or info.tied_to:
                continue
            value = full_precision(model.get_parameter(info.name))
            alike[tuple(matrices(value, info).shape), value.dtype, value.device].append(info)
        for infos in alike.values():
            together = max(1, REWIRED_TOGETHER // infos[0].numel)
            for start in range(0, len(infos), together):
                some = infos[start : start + together]
                values = [matrices(full_precision(model.get_parameter(info.name)), info) for info in some]
                yield some, torch.stack(values)


def _ratios(before: tuple[float, float], after: tuple[float, float]) -> dict[str, float]:
    """Variances of strengths after against before, 1 where there was none."""
    names = ("input_strength_ratio", "output_strength_ratio")
    return {name: new / old if old else 1.0 for name, old, new in zip(names, before, after, strict=True)}


_PAPER = "Scabini et al., 2022, arXiv 2207.08148"
for _initialiser, _summary in (
    (Rewiring(), "weights permuted such that sums of rows and of columns draw together"),
    (Rewiring("rewire-greedy", greedy=True), "as rewire, but the largest sum is served first, not by lot"),
):
    register(_initialiser.name, kind=Kind.REFINING, paper=_PAPER, summary=_summary)(lambda made=_initialiser: made)
