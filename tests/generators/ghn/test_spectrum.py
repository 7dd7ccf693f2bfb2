"""Spectra against decompositions, and products against the matrices that they are."""

from __future__ import annotations

import pytest
import torch

from generators.ghn.spectrum import (
    NEWTON_SCHULZ,
    equalise,
    equaliser,
    largest_of_product,
    largest_singular_value,
    mixture,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def factors(rows: int, columns: int, rank: int = 6, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Two pairs of factors with the same left one, whose columns are far from orthogonal."""
    left = torch.randn(rows, rank, generator=rng(1), dtype=dtype) * torch.logspace(0, -1.5, rank, dtype=dtype)
    return left + left[:, :1], torch.randn(2, rank, columns, generator=rng(2), dtype=dtype)


def slow_equalise(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """The polynomial a s + b s^3 + c s^5 on the singular values, `steps` times; Frobenius norm 1 before and after."""
    a, b, c = NEWTON_SCHULZ
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values / values.norm()) @ right


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6), (1, 5), (5, 1)])
@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_equalise_against_singular_values(shape, steps):
    """Singular vectors stay, singular values go through the polynomial; the Frobenius norm is 1."""
    matrices = torch.randn(2, 3, *shape, generator=rng(), dtype=torch.float64)
    found = equalise(matrices, steps)
    for batch in range(2):
        for index in range(3):
            torch.testing.assert_close(found[batch, index], slow_equalise(matrices[batch, index], steps))
    torch.testing.assert_close(found.norm(dim=(-2, -1)), torch.ones(2, 3).double())


def test_equalise_pulls_the_spectrum_together():
    """The stable rank rises with the steps; multiples of a matrix give the same; zero stays zero, with a gradient."""
    matrix = torch.randn(8, 20, generator=rng()) * torch.logspace(0, -1.5, 8)[:, None]
    ranks = [equalise(matrix, steps).square().sum() / torch.linalg.matrix_norm(equalise(matrix, steps), 2) ** 2
             for steps in (0, 1, 3)]  # fmt: skip
    assert ranks[0] < ranks[1] < ranks[2] and ranks[2] > 2 * ranks[0]
    torch.testing.assert_close(equalise(100 * matrix, 3), equalise(matrix, 3))
    assert torch.equal(equalise(torch.zeros(3, 4), 3), torch.zeros(3, 4))


@pytest.mark.parametrize("rows, columns", [(40, 90), (6, 6), (3, 90), (40, 2), (1, 1)])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_equaliser_is_equalise_of_the_product(rows, columns, steps):
    """Also where the product has a lower rank than the factors."""
    left, right = factors(rows, columns)
    between = equaliser(left.mT @ left, right @ right.mT, steps)
    torch.testing.assert_close(left @ between @ right, equalise(left @ right, steps), rtol=1e-6, atol=1e-9)


def test_equaliser_in_single_precision():
    """Against double precision, where the condition of the factors is in the hundreds; zeros stay zeros."""
    left, right = factors(40, 90)
    assert torch.linalg.cond(left) > 100
    wanted = equalise(left @ right, 3)
    left, right = left.float(), right.float()
    found = left @ equaliser(left.mT @ left, right @ right.mT, 3) @ right
    assert (found - wanted).norm() / wanted.norm() < 1e-4
    zero = torch.zeros(6, 6, requires_grad=True)
    between = equaliser(left.mT @ left, zero, 3)
    between.sum().backward()
    assert torch.isfinite(between).all() and torch.isfinite(zero.grad).all()


@pytest.mark.parametrize("shape", [(8, 300), (24, 24), (200, 30), (1, 9), (64, 1)])
def test_largest_singular_value_is_that_of_a_decomposition(shape):
    """From below, within a tenth on matrices of noise, whose spectrum is the hardest; exact for one direction."""
    noise = torch.randn(5, 2, *shape, generator=rng(0))
    exact = torch.linalg.svdvals(noise)[..., 0]
    found = largest_singular_value(noise)
    assert (found <= exact * (1 + 1e-5)).all() and (found >= 0.9 * exact).all()
    one = torch.randn(shape[0], 1, generator=rng(1)) @ torch.randn(1, shape[1], generator=rng(2))
    torch.testing.assert_close(largest_singular_value(one), torch.linalg.svdvals(one)[0], rtol=1e-4, atol=0)
    assert largest_singular_value(torch.zeros(shape)) == 0


def test_rows_that_cancel_have_a_largest_singular_value_all_the_same():
    """As those of a softmax layer may: their sum is zero."""
    half = torch.randn(6, 40, generator=rng())
    matrix = torch.cat([half, -half])
    exact = torch.linalg.svdvals(matrix)[0]
    assert 0.9 * exact <= largest_singular_value(matrix) <= exact * (1 + 1e-5)


@pytest.mark.parametrize("rows, columns", [(40, 90), (3, 90), (40, 2)])
def test_largest_of_product_is_that_of_the_matrix(rows, columns):
    left, right = factors(rows, columns)
    found = largest_of_product(left.mT @ left, right @ right.mT, mixture(left))
    torch.testing.assert_close(found, largest_singular_value(left @ right))
    assert (largest_of_product(left.mT @ left, torch.zeros(2, 6, 6).double(), mixture(left)) == 0).all()
