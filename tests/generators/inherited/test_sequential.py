"""Which layers of a deep sequential model become one layer of a shallow one."""

from __future__ import annotations

import pytest
from torch import nn

from generators.errors import ConfigError
from generators.inherited.sequential import groups_of, units_of
from small_models import sequential_conv_net as conv_net
from small_models import sequential_mlp as mlp


@pytest.mark.parametrize(
    ("relative", "model", "wanted"),
    [
        (mlp(8, 4, 4, 4, 2), mlp(8, 4, 2), [2, 2]),
        (mlp(8, 4, 4, 4, 4, 2), mlp(8, 4, 2), [3, 2]),
        (mlp(8, 5, 4, 6, 2), mlp(8, 4, 2), [2, 2]),
        (mlp(8, 5, 4, 6, 2), mlp(8, 6, 2), [3, 1]),
        (mlp(8, 4, 2), mlp(8, 4, 2), [1, 1]),
        (mlp(8, 4, 4, 2), mlp(8, 2), [3]),
        (conv_net(4, 8, 8), conv_net(8, kernel=5), [3, 1]),
        (conv_net(4, 8, hidden=6), conv_net(4, 8), [1, 1, 2]),
    ],
)
def test_which_layers_become_one(relative: nn.Module, model: nn.Module, wanted: list[int]) -> None:
    groups = groups_of(units_of(relative, "relative"), units_of(model, "model"))
    assert [len(group) for group in groups] == wanted


def test_a_refused_model_is_named_not_printed() -> None:
    """A whole ResNet in a message would hide what is wrong."""
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(50)])
    with pytest.raises(ConfigError, match=r"the whole of the model, ModuleList; it takes"):
        units_of(model, "the model")
