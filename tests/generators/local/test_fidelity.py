"""Figures of merit against numpy and against cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from generators.local.fidelity import active_units, covariance, match
from generators.seeds import stream


def test_covariance_equals_numpy():
    slices = torch.randn(50, 2, 3, generator=stream(0, "slices"))
    expected = np.cov(slices.numpy().reshape(50, 6).astype(np.float64), rowvar=False, bias=True)
    assert np.allclose(covariance(slices).numpy(), expected)
    assert covariance(torch.randn(50, 1, 1)).shape == (1, 1)


def test_equal_sets_match_and_scaled_sets_do_not():
    slices = torch.randn(4000, 3, 3, generator=stream(0, "slices")).cumsum(1)
    same = match(slices, slices)
    assert same["second_moment_ratio"] == pytest.approx(1) and same["kurtosis_ratio"] == pytest.approx(1)
    assert same["covariance_error"] == pytest.approx(0, abs=1e-12)
    double = match(2 * slices, slices)
    assert double["second_moment_ratio"] == pytest.approx(4) and double["covariance_error"] == pytest.approx(3)


def test_white_noise_is_what_the_white_figure_says():
    trained = torch.randn(200_000, 3, 3, generator=stream(0, "trained")).cumsum(1)
    white = torch.randn(200_000, 3, 3, generator=stream(0, "white")) * trained.square().mean().sqrt()
    figures = match(white, trained)
    assert figures["covariance_error"] == pytest.approx(figures["covariance_error_white"], rel=0.02)
    assert figures["covariance_error"] > 0.5


def test_active_units_are_those_whose_posterior_mean_moves():
    means = torch.randn(5000, 4, generator=stream(0, "means")) * torch.tensor([1.0, 0.5, 0.05, 0.0]) + 3.0
    assert active_units(means) == 2
