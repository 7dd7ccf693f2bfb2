"""What generated weights are worth as numbers: spread, distinct values, rank. Variance is measured, not hoped for.

Block tiling gives tensors that look random and are not: few distinct values, low rank. Decoders collapse to a constant.
All figures are taken on the matrix view `[O, I * k]` of a weight, O output rows, I inputs per row, k kernel positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from generators.errors import ProposalError
from generators.inventory import MATRIX_ROLES, Inventory

RANK_TOLERANCE = 1e-3  # singular values above this share of the largest one count for the numeric rank
NUMBERS_IN_CACHE = 2**17
CANCELLED = 1e-3  # variance below this share of the mean square: the difference of the two has lost its digits


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. The sum of such values is not finite either, and twenty times as fast."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def spreads(values: Tensor) -> Tensor:
    """Standard deviations (divisor n - 1) `[M]` of `[M, ...]`, from norms and sums where these have enough digits."""
    rows = values.flatten(1).float()
    count = rows.shape[1]
    pieces = rows.split(NUMBERS_IN_CACHE, dim=1)  # the second look at a piece finds it in the cache
    norms, sums = zip(*((torch.linalg.vector_norm(piece, dim=1), piece.sum(dim=1)) for piece in pieces), strict=True)
    squares, means = torch.stack(norms).square().sum(dim=0), torch.stack(sums).sum(dim=0) / count
    variances = (squares - count * means.square()) / (count - 1)
    if not (variances * count > CANCELLED * squares).all():  # nearly constant, or beyond the range of float32
        return rows.std(dim=1)
    return variances.sqrt()


def stable_rank(matrix: Tensor) -> float:
    """||W||_F^2 / ||W||_2^2 of `[O, K]`, in float64; 0 for a matrix of zeros, NaN for one that is not finite."""
    if not is_finite(matrix):
        return float("nan")
    values = matrix.detach().double()
    gram = values @ values.mT if values.shape[0] <= values.shape[1] else values.mT @ values
    largest = torch.linalg.eigvalsh(gram)[-1].item()
    return gram.trace().item() / largest if largest > 0 else 0.0


def noise_stable_rank(rows: int, columns: int) -> float:
    """About the stable rank of white noise `[rows, columns]`.

    Its largest singular value is sqrt(rows) + sqrt(columns) for large matrices (Marchenko and Pastur 1967).
    """
    return rows * columns / (math.sqrt(rows) + math.sqrt(columns)) ** 2


@dataclass(frozen=True)
class TensorStatistics:
    """Figures of one tensor.

    Attributes:
        mean: mean of the values.
        std: standard deviation of the values (divisor n - 1), 0 for a single value.
        target_std: the spread it should have, NaN if nobody said.
        std_ratio: std / target_std.
        distinct_share: number of distinct values / number of values, in (0, 1].
        numeric_rank: singular values above `RANK_TOLERANCE` of the largest.
        rank_limit: the largest rank that the shape allows, min(O, I * k).
        stable_rank: ||W||_F^2 / ||W||_2^2, in [1, rank_limit]; 0 for a matrix of zeros.
    """

    mean: float
    std: float
    target_std: float
    std_ratio: float
    distinct_share: float
    numeric_rank: int
    rank_limit: int
    stable_rank: float


def measure(tensor: Tensor, target_std: float | None = None) -> TensorStatistics:
    """The figures of `tensor`, computed in float64 on its device.

    Args:
        tensor: `[O, I, *kernel]`, `[O, I]` or `[O]` (one column); not empty.
        target_std: spread to compare with, such as He's.

    Raises:
        ProposalError: the tensor is empty or holds NaN or infinity.
    """
    if tensor.numel() == 0 or not torch.isfinite(tensor).all():
        raise ProposalError("a tensor that is empty or holds NaN or infinity has no statistics")
    values = tensor.detach().double()
    matrix = values.reshape(values.shape[0] if values.ndim else 1, -1)
    singular = torch.linalg.svdvals(matrix)
    largest = singular[0].item()
    std = values.std().item() if values.numel() > 1 else 0.0
    target = float("nan") if target_std is None else float(target_std)
    return TensorStatistics(
        mean=values.mean().item(),
        std=std,
        target_std=target,
        std_ratio=std / target if target else float("nan"),
        distinct_share=tensor.detach().unique().numel() / tensor.numel(),
        numeric_rank=int((singular > RANK_TOLERANCE * largest).sum()),
        rank_limit=min(matrix.shape),
        stable_rank=(singular.square().sum().item() / largest**2) if largest else 0.0,
    )


def measure_states(states: Mapping[str, Tensor], found: Inventory) -> dict[str, dict[str, float]]:
    """The figures of every matrix of a sampled population, for the fit report of a generator.

    Args:
        states: tensor name -> `[n, ...]`, n members, as `Generator.sample` gives it.
        found: inventory of the model; says which tensors are matrices and what spread He would give them.

    Returns:
        Tensor name -> the fields of `TensorStatistics` averaged over the members, and `between_members`: the standard
        deviation between members, averaged over the entries, in units of `std` (about 1 for independent draws, 0 for
        n copies); missing for a single member.
    """
    rows = {}
    for info in found:
        if info.role not in MATRIX_ROLES or info.tied_to or info.name not in states:
            continue
        stacked = states[info.name]
        members = [dataclasses.asdict(measure(member, info.he_std)) for member in stacked]
        row = {key: sum(member[key] for member in members) / len(members) for key in members[0]}
        if len(members) > 1:
            between = stacked.double().var(dim=0).mean().sqrt().item()
            row["between_members"] = between / row["std"] if row["std"] else 0.0
        rows[info.name] = row
    return rows
