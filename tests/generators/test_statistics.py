"""Statistics against numpy and against matrices whose figures are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from generators.errors import ProposalError
from generators.filling import init
from generators.inventory import inventory
from generators.statistics import is_finite, measure, measure_states, noise_stable_rank, spreads, stable_rank


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_finite_against_looking_at_every_value(dtype: torch.dtype) -> None:
    """Also where the sum of finite values is not finite."""
    largest = torch.full((40,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(_noise(3, 5).to(dtype)) and is_finite(largest) and is_finite(torch.zeros(0, dtype=dtype))
    for bad in (math.nan, math.inf, -math.inf):
        assert not is_finite(torch.cat([largest, torch.tensor([bad], dtype=dtype)]))
    assert not is_finite(torch.tensor([math.inf, -math.inf], dtype=dtype))
    assert is_finite(torch.tensor([1, 2]))


@pytest.mark.parametrize("shift", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e19, 1e30])
def test_spreads_against_torch(shift: float, scale: float) -> None:
    """Far from zero the squares cancel, far out they overflow: both fall back on the exact way."""
    values = (_noise(4, 30, 7) + shift) * scale
    wanted = values.double().flatten(1).std(dim=1)
    torch.testing.assert_close(spreads(values).double(), wanted, rtol=2e-3, atol=0)
    assert spreads(torch.full((2, 50), 0.5)).max() < 1e-6


def test_stable_rank_of_noise() -> None:
    """Against `measure`, and the formula for noise against draws of several shapes."""
    for rows, columns in ((10, 48), (64, 64), (96, 288), (300, 40)):
        drawn = [_noise(rows, columns, seed=seed) for seed in range(8)]
        found = [stable_rank(each) for each in drawn]
        assert found[0] == pytest.approx(measure(drawn[0]).stable_rank)
        assert sum(found) / 8 == pytest.approx(noise_stable_rank(rows, columns), rel=0.15)
    assert stable_rank(torch.zeros(3, 4)) == 0
    assert math.isnan(stable_rank(torch.tensor([[math.nan]])))
