"""Strength stabilisation: the draw that is kept is the most even one, and everything else is as the base makes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from generators.errors import ConfigError
from generators.filling import init
from generators.inventory import inventory
from generators.pointwise import HE
from generators.stabilised import Stabilised, strength_variance


def _model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5))


def _slow_variance(weight: torch.Tensor) -> float:
    matrix = weight.detach().double().flatten(1)
    return (matrix.sum(0).var(unbiased=False) + matrix.sum(1).var(unbiased=False)).item() / 2


def test_the_least_of_the_draws() -> None:
    """Strength variance of what is written = the least over all draws, each made again by hand."""
    model, chosen = _model(), Stabilised(draws=12)
    report = init(model, chosen, seed=4, member=2)
    for name in ("0.weight", "3.weight"):
        info = inventory(model)[name]
        variances = [_slow_variance(chosen.draw(info, 4, 2, number)) for number in range(12)]
        assert _slow_variance(model.get_parameter(name)) == pytest.approx(min(variances), rel=1e-9)
        assert report.statistics[name]["strength_variance"] == pytest.approx(min(variances), rel=1e-9)
        assert strength_variance(model.get_parameter(name), info) == pytest.approx(min(variances), rel=1e-9)
        assert min(variances) < 0.9 * variances[0]
    assert model[0].bias.eq(0).all() and model[1].weight.eq(1).all()


def test_one_draw_is_the_base() -> None:
    stabilised, plain = _model(), _model()
    init(stabilised, Stabilised(draws=1), seed=9)
    init(plain, HE, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(stabilised.parameters(), plain.parameters(), strict=True))


def test_chains_with_rewiring() -> None:
    report = init(_model(), "he-stabilised+rewire", seed=1)
    assert report.generated["3.weight"] == "he-stabilised: the most even of 100 draws, then rewire: weights permuted"


def test_no_draws_are_refused() -> None:
    with pytest.raises(ConfigError, match="draws=0"):
        Stabilised(draws=0)
