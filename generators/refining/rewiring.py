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

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from generators.initialiser import Kind, Proposal, Request, register
from generators.inventory import MATRIX_ROLES
from generators.refining.stored import matrices, outputs_first
from generators.seeds import derive

DRAWN_TOGETHER = 2**18  # numbers; whole rows


def order(sums: np.ndarray, race: np.ndarray | None) -> np.ndarray:
    """The columns, the one for the smallest weight first.

    Args:
        sums: `[m]`, of the weights in m columns so far.
        race: `[m]`, drawn from Exp(1); None for falling sums (equal ones by their place) instead of a lot.
    """
    if race is None:
        return np.negative(sums).argsort(kind="stable")
    odds = sums + (abs(sums.min()) + 1.0)
    return np.divide(race, odds, out=odds).argsort()


def rewire_rows(matrix: np.ndarray, draws: np.random.Generator | None) -> None:
    """One pass, in place: every row but the first is permuted.

    Args:
        matrix: `[n, m]`, n rows of m columns, contiguous.
        draws: where the races come from; None for the greedy form.
    """
    rows, columns = matrix.shape
    ascending = np.sort(matrix, axis=1)
    sums = np.zeros(columns)  # float64 whatever the weights: the sums run over all rows
    step = max(1, DRAWN_TOGETHER // columns)
    for start in range(1, rows, step):
        block = range(start, min(start + step, rows))
        races = [None] * len(block) if draws is None else draws.standard_exponential((len(block), columns))
        for row, race in zip(block, races, strict=True):
            sums += matrix[row - 1]
            matrix[row, order(sums, race)] = ascending[row]


def rewired(matrix: np.ndarray, draws: np.random.Generator | None) -> np.ndarray:
    """Both passes over a copy of `[n, m]`: along the n outputs, then along the m inputs; see `rewire_rows`."""
    result = np.array(matrix)
    for _ in range(2):
        rewire_rows(result, draws)
        result = np.ascontiguousarray(result.T)
    return result


def strength_variances(weights: np.ndarray) -> tuple[float, float]:
    """Variances of the strengths of inputs and of outputs (column and row sums) of `[B, n, m]`, averaged over B."""
    columns, rows = weights.sum(axis=1, dtype=np.float64), weights.sum(axis=2, dtype=np.float64)
    return float(columns.var(axis=1).mean()), float(rows.var(axis=1).mean())


def as_array(value: Tensor) -> np.ndarray:
    """On the CPU, in float64 or float32; half precision fits into the latter as it is."""
    return value.detach().cpu().to(torch.float64 if value.dtype == torch.float64 else torch.float32).numpy()


@dataclass(frozen=True)
class Rewiring:
    """Rewires every matrix of the model: convolutions, linear layers, each of stacked matrices (query, key and value;
    gates) on its own. These are the stored numbers, also where a weight is computed from them (weight norm).

    Rows come one after the other and each is short, so the work is done on the CPU, wherever the model is.

    Attributes:
        greedy: the largest sum gets the smallest weight, and nothing is drawn.
    """

    name: str = "rewire"
    greedy: bool = False
    kind: Kind = Kind.REFINING

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """The weights of `model`, permuted; `statistics` have the variances of strengths after against before."""
        proposal, start = Proposal(), time.perf_counter()
        for info in request.inventory:
            if info.role not in MATRIX_ROLES or len(info.shape) < 2 or not info.numel or info.tied_to:
                continue
            value = model.get_parameter(info.name).detach()
            before = as_array(matrices(value, info))
            root = derive(request.seed, self.name, request.member, info.name)
            draws = None if self.greedy else np.random.default_rng(root)
            after = np.stack([rewired(matrix, draws) for matrix in before])
            stored = torch.from_numpy(after).reshape(outputs_first(value, info).shape)
            proposal.values[info.name] = outputs_first(stored, info)
            proposal.sources[info.name] = f"{self.name}: weights permuted"
            proposal.statistics[info.name] = _ratios(strength_variances(before), strength_variances(after))
        proposal.figures["seconds"] = time.perf_counter() - start
        if not proposal.values:
            proposal.notes.append(f"{self.name}: the model has no matrix to rewire")
        return proposal


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
