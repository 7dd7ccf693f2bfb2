"""Which models share a decode plan: those of one architecture, whose parameters are of one sort."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from generators import init, trace
from generators.ghn import plans as module
from generators.ghn.ghn import GHN
from small_ghn import NOISY, SMALL, network
from small_models import Forward


def test_plans_are_kept_per_architecture(monkeypatch):
    """Traced anew, planned once; names, unused shapes and ties make another plan; old plans are dropped."""
    monkeypatch.setattr(module, "PLANS_KEPT", 3)
    ghn = GHN(SMALL)
    assert ghn.plan(network()) is ghn.plan(network())

    class WithSpare(nn.Sequential):
        def __init__(self, spare: int) -> None:
            super().__init__(nn.Linear(6, 10))
            self.spare = nn.Parameter(torch.randn(spare, spare))

        def forward(self, x):
            return self[0](x)

    for spare in (2, 3):  # the same graph, another tensor that no operation touches
        report = init(WithSpare(spare), ghn, example_inputs=torch.zeros(1, 6))
        assert "spare" in {*report.fallbacks, *report.kept}
    for width in range(4, 9):
        ghn.plan(network(f"mlp-1-w{width}"))
    assert len(ghn._plans) == 3


def _with_weight(dtype: torch.dtype) -> nn.Module:
    """A matrix of this data type, of which every model of the test makes real numbers in the same way."""
    weight = nn.Parameter(torch.arange(256.0).view(16, 16).to(dtype), requires_grad=dtype != torch.int64)
    return Forward(lambda m, x: m.head(x + 0 * m.weight.abs().float().mean()), weight=weight, head=nn.Linear(16, 10))


def _with_spare(owner: nn.Module) -> nn.Module:
    """A layer that the forward does not use."""
    return Forward(lambda m, x: m.head(x), spare=owner, head=nn.Linear(16, 10))


@pytest.mark.parametrize(
    "models",
    [
        *itertools.permutations([lambda: _with_weight(torch.float32), lambda: _with_weight(torch.complex64)]),
        *itertools.permutations([lambda: _with_weight(torch.float32), lambda: _with_weight(torch.int64)]),
        *itertools.permutations([lambda: _with_spare(nn.Embedding(7, 5)), lambda: _with_spare(nn.Linear(5, 7, False))]),
    ],
    ids=["real, complex", "complex, real", "real, whole", "whole, real", "table, layer", "layer, table"],
)  # fmt: skip
def test_models_of_one_graph_whose_parameters_differ_in_sort(models) -> None:
    """The account of the second is that of a GHN which has not seen the first; a complex weight stays what it is."""
    ghn, example = GHN(NOISY), torch.zeros(2, 16)
    (first, second), again = [make() for make in models], models[1]()
    assert trace(first, example).signature == trace(second, example).signature
    init(first, ghn, example_inputs=example)
    report = init(second, ghn, example_inputs=example)
    assert report == init(again, GHN(NOISY), example_inputs=example)
    for name, value in second.named_parameters():
        assert torch.equal(value, again.get_parameter(name)), name


def test_what_is_frozen_has_the_plan_of_what_is_trained() -> None:
    ghn, frozen = GHN(NOISY), network()
    frozen.requires_grad_(False)
    assert ghn.plan(frozen) is ghn.plan(network())


def test_what_a_ghn_is_told_that_it_knows_makes_another_plan() -> None:
    ghn, model = GHN(NOISY), network()
    some = ghn.plan(model)
    ghn.config = replace(ghn.config, met=("classifier",))
    assert len(ghn.plan(model).groups) == 1 < len(some.groups)
