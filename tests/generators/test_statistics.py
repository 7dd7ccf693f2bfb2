"""Statistics against numpy and against matrices whose figures are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from generators.errors import ProposalError
from generators.initialiser import init
from generators.inventory import inventory
from generators.statistics import measure, measure_states


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_against_numpy() -> None:
    """A convolution weight: every figure equals numpy's on the `[O, I * k]` view."""
    weight = _noise(12, 5, 3, 3)
    found = measure(weight, target_std=0.5)
    matrix = weight.numpy().reshape(12, 45).astype(np.float64)
    assert found.std == pytest.approx(matrix.std(ddof=1))
    assert found.std_ratio == pytest.approx(matrix.std(ddof=1) / 0.5)
    assert found.mean == pytest.approx(matrix.mean())
    assert found.stable_rank == pytest.approx(np.linalg.norm(matrix) ** 2 / np.linalg.norm(matrix, 2) ** 2)
    assert (found.numeric_rank, found.rank_limit) == (np.linalg.matrix_rank(matrix), 12)
    assert found.distinct_share == len(np.unique(weight.numpy())) / weight.numel()


def test_block_tiling_is_seen() -> None:
    """A 4 x 4 block repeated 8 x 8 times: 1/64 of the values are distinct and the rank is 4 of 32."""
    found = measure(_noise(4, 4).repeat(8, 8))
    assert found.distinct_share == 1 / 64
    assert (found.numeric_rank, found.rank_limit) == (4, 32)
    assert math.isnan(found.std_ratio)


def test_known_ranks() -> None:
    orthogonal = torch.linalg.qr(_noise(10, 10))[0]
    assert measure(orthogonal).stable_rank == pytest.approx(10)
    outer = measure(_noise(6, 1) @ _noise(1, 9, seed=1))
    assert outer.numeric_rank == 1
    assert outer.stable_rank == pytest.approx(1)
    assert measure(torch.diag(torch.tensor([1.0, 2e-3, 5e-4]))).numeric_rank == 2


def test_odd_tensors() -> None:
    zeros = measure(torch.zeros(3, 4), target_std=1.0)
    assert (zeros.std, zeros.std_ratio, zeros.numeric_rank, zeros.stable_rank) == (0, 0, 0, 0)
    single = measure(torch.tensor([2.0]))
    assert (single.std, single.numeric_rank, single.rank_limit) == (0, 1, 1)
    assert measure(_noise(8, 8).half()).std == pytest.approx(_noise(8, 8).std().item(), rel=1e-3)
    for bad in (torch.zeros(0, 3), torch.tensor([[1.0, math.nan]])):
        with pytest.raises(ProposalError):
            measure(bad)


def test_population() -> None:
    """Independent members differ by about their spread, copies by 0; only untied matrices are measured."""
    model = nn.Sequential(nn.Linear(40, 50), nn.BatchNorm1d(50), nn.Linear(50, 10))
    members = []
    for member in range(6):
        init(model, "he", member=member)
        members.append({name: value.clone() for name, value in model.state_dict().items()})
    found = inventory(model)
    rows = measure_states({name: torch.stack([state[name] for state in members]) for name in members[0]}, found)
    assert rows.keys() == {"0.weight", "2.weight"}
    assert rows["0.weight"]["between_members"] == pytest.approx(1.0, abs=0.05)
    assert rows["0.weight"]["std_ratio"] == pytest.approx(1.0, abs=0.05)
    copies = measure_states({"0.weight": members[0]["0.weight"].expand(3, 50, 40)}, found)
    assert copies["0.weight"]["between_members"] == 0.0
    assert "between_members" not in measure_states({"0.weight": members[0]["0.weight"][None]}, found)["0.weight"]
