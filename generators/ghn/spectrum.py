"""Singular values of decoded matrices: pulling them together, and the largest of them.

A decoded matrix is mostly a product `left @ right` with few inner columns R. The singular values of a product follow
from `A = left^T left` and `C = right right^T`, `[R, R]` both, and so does what has to stand between the factors to
change them: a matrix with thousands of rows and columns is never looked at.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic of Jordan et al. 2024: maps singular values in (0, 1] towards 1
POWER_STEPS = 8  # of the power iteration, which comes to within a tenth of it
TINY = 1e-12
GOLDEN_ANGLE = 2.399963  # no pattern of rows keeps step with it


def equalise(matrices: Tensor, steps: int) -> Tensor:
    """Pull the singular values of `[..., O, K]` matrices together by `steps` Newton-Schulz steps, unit Frobenius norm.

    Each step multiplies small singular values by up to 3.4 relative to the large ones and keeps the singular vectors;
    five steps make the matrix nearly orthogonal, none only rescales it. Zero matrices stay zero.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + TINY)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + TINY)
    return x.mT if tall else x


def equaliser(left_gram: Tensor, right_gram: Tensor, steps: int) -> Tensor:
    """Q `[..., R, R]` such that `left @ Q @ right` is `equalise(left @ right, steps)`.

    With W = left Q right and X = Q C Q^T A, a step W <- a W + b W W^T W + c (W W^T)^2 W is Q <- P Q for
    P = a + b X + c X^2. Q starts as a number, so all of these are polynomials of C A: they commute, and X <- P^2 X.

    Args:
        left_gram: A = left^T left, `[..., R, R]`.
        right_gram: C = right right^T, `[..., R, R]`.
        steps: Newton-Schulz steps.
    """
    a, b, c = NEWTON_SCHULZ
    eye = torch.eye(left_gram.shape[-1], dtype=left_gram.dtype, device=left_gram.device)
    x = right_gram @ left_gram
    square = _or_one(x.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None])  # |W|^2 is the trace of X
    x, between = x / square, eye / square.sqrt()
    for _ in range(steps):
        step = a * eye + b * x + c * (x @ x)
        between = step @ between
        x = step @ (step @ x)
    return between / _or_one(x.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]).sqrt()


def _or_one(square: Tensor) -> Tensor:
    """Squared norms to divide by: 1 for those of zero matrices."""
    return torch.where(square > TINY**2, square, 1.0)


def mixture(rows: Tensor) -> Tensor:
    """Where a power iteration starts: the sum of `[..., O, K]` over O, each row with a little more or less than 1.

    The plain sum of rows that cancel would be zero.
    """
    weight = 1 + 0.01 * torch.cos(GOLDEN_ANGLE * torch.arange(rows.shape[-2], device="cpu"))
    return weight.to(rows) @ rows


@torch.no_grad()
def largest_singular_value(matrices: Tensor) -> Tensor:
    """Of `[..., O, K]`, from below, by power iteration from the `mixture` of the rows: `[...]`."""
    right = mixture(matrices)[..., None]  # [..., K, 1]
    for _ in range(POWER_STEPS):
        left = matrices @ (right / right.norm(dim=-2, keepdim=True).clamp_min(1e-30))
        right = matrices.mT @ left
    return left.norm(dim=(-2, -1))


@torch.no_grad()
def largest_of_product(left_gram: Tensor, right_gram: Tensor, start: Tensor) -> Tensor:
    """`largest_singular_value(left @ right)` from the Gram matrices of `equaliser`: `[...]`.

    Args:
        left_gram, right_gram: `[..., R, R]`.
        start: the `mixture` of the rows of left, `[..., R]`.
    """
    x = start[..., None]  # the right vector of the iteration is right^T x
    for _ in range(POWER_STEPS):
        reached = right_gram @ x
        length = (x * reached).sum(dim=(-2, -1), keepdim=True).clamp_min(1e-30).sqrt()
        last = reached / length  # the left vector is left @ last
        x = left_gram @ last
    return (last * x).sum(dim=(-2, -1)).clamp_min(0).sqrt()
