"""How well generated slices match trained ones, and whether a latent model uses its latents."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVE_VARIANCE = 0.01  # a latent unit is active if the variance of its posterior mean over the data is larger


def covariance(slices: Tensor) -> Tensor:
    """Spatial covariance `[d, d]` of slices `[N, ...]` with `d` weights each, in float64."""
    return torch.cov(slices.flatten(1).double().T, correction=0).reshape(slices[0].numel(), -1)


def active_units(posterior_means: Tensor) -> int:
    """Latent units that carry anything about the slice: `Var_x(E[z|x]) > 0.01` (Burda et al., arXiv 1509.00519).

    Args:
        posterior_means: `[N, latent]`, one row per slice.
    """
    return int((posterior_means.var(0, correction=0) > ACTIVE_VARIANCE).sum())


def match(generated: Tensor, trained: Tensor) -> dict[str, float]:
    """How generated slices `[N, ...]` compare with trained ones `[M, ...]` of the same scale.

    Returns:
        `second_moment_ratio`: mean square of a generated weight over that of a trained one (1 is right);
        `covariance_error`: `|C_generated - C_trained|_F / |C_trained|_F` (0 is right);
        `covariance_error_white`: the same for white noise of the trained second moment, which is what He draws;
        `kurtosis_ratio`: fourth moment over squared second moment, generated over trained (1 is right).
    """
    ours, theirs = covariance(generated), covariance(trained)
    power, wanted = generated.double().square().mean(), trained.double().square().mean()
    white = torch.eye(len(theirs), dtype=torch.float64) * wanted

    def kurtosis(slices: Tensor) -> Tensor:
        return slices.double().pow(4).mean() / slices.double().square().mean().square()

    return {
        "second_moment_ratio": (power / wanted).item(),
        "covariance_error": (torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs)).item(),
        "covariance_error_white": (torch.linalg.norm(white - theirs) / torch.linalg.norm(theirs)).item(),
        "kurtosis_ratio": (kurtosis(generated) / kurtosis(trained)).item(),
    }
