"""Matrix views of stored weights, against what the layers do with them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from generators.graph import trace
from generators.inventory import inventory
from generators.refining.stored import is_computed, matrices, outputs_first
from small_models import Forward


def test_outputs_of_a_transposed_convolution_are_its_rows() -> None:
    """Rows of the matrix view hold what one output channel multiplies, as a convolution with that weight shows."""
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False)
    info = inventory(layer)["weight"]
    rows = matrices(layer.weight, info)[0]
    assert rows.shape == (6, 2 * 9)
    for output in range(6):
        (gradient,) = torch.autograd.grad(layer(torch.ones(1, 4, 5, 5))[0, output, 2:5, 2:5].sum(), layer.weight)
        used = layer.weight[gradient != 0]
        assert torch.equal(used.sort()[0], rows[output].sort()[0])
    assert torch.equal(outputs_first(outputs_first(layer.weight, info), info), layer.weight)


def test_rows_of_one_matrix_per_head() -> None:
    """`[heads, inputs, outputs]`, which einsum reads: one matrix per head, as it is stored."""
    model = Forward(lambda m, x: torch.einsum("bi,hio->bho", x, m.weight), weight=nn.Parameter(torch.randn(3, 4, 5)))
    graph = trace(model, torch.zeros(2, 4))
    info = inventory(model, graph)["weight"]
    assert info.blocks == 3
    assert torch.equal(matrices(model.weight, info), model.weight)


def test_stacked_matrices() -> None:
    """Gates of an LSTM, one after the other."""
    layer = nn.LSTM(3, 5)
    view = matrices(layer.weight_ih_l0, inventory(layer)["weight_ih_l0"])
    assert view.shape == (4, 5, 3) and torch.equal(view[2], layer.weight_ih_l0[10:15])


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 2),
    ],
)
def test_computed_weights(wrap) -> None:
    plain, computed = nn.Linear(3, 4), wrap(nn.Linear(3, 4))
    before = {name: value.clone() for name, value in computed.state_dict().items()}
    assert not any(is_computed(plain, info) for info in inventory(plain))
    assert all(is_computed(computed, info) for info in inventory(computed))
    assert all(torch.equal(value, before[name]) for name, value in computed.state_dict().items()), "it was computed"
