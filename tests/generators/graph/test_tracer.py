"""`generators.graph.trace`: what cannot be traced, and what the error says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from generators.errors import TraceError
from generators.graph import trace


class Forward(nn.Module):
    """A module whose forward is the function that it is given."""

    def __init__(self, function, **members) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x):
        return self.function(self, x)


def test_the_error_carries_the_models_own_exception_and_line():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), Forward(lambda m, x: m.fc(x), fc=nn.Linear(77, 2)))
    with pytest.raises(TraceError) as caught:
        trace(model)
    message = str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError) and str(caught.value.__cause__) in message
    assert "test_tracer.py:" in message and "Linear(77, 2)" in message and "in module 2.fc (Linear)" in message
    assert "`example_inputs=`" in message and "guessed" in message
    with pytest.raises(TraceError, match=r"float32 \[2, 5\].*pass inputs that the model accepts"):
        trace(nn.Linear(3, 2), torch.zeros(2, 5))


def test_values_that_steer_the_forward_need_real_inputs():
    model = Forward(lambda m, x: m.a(x) if x.sum() > 0 else m.b(x), a=nn.Linear(3, 2), b=nn.Linear(3, 2))
    with pytest.raises(TraceError, match=r"x.sum\(\) > 0.*needs values.*real inputs as `example_inputs=`"):
        trace(model)
    assert trace(model, torch.ones(2, 3)).unused == ("b.weight", "b.bias")
    assert trace(model, -torch.ones(2, 3)).unused == ("a.weight", "a.bias")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.LazyLinear(4), "weight is a lazy parameter"),
        (Forward(lambda m, x: "text", a=nn.Linear(3, 2)), "returned no tensor but str"),
        (Forward(lambda m, x: 1 / 0, a=nn.Linear(3, 2)), "ZeroDivisionError: division by zero"),
        ("resnet18", "expected a torch.nn.Module, got str"),
    ],
)
def test_models_that_cannot_be_traced(model, message):
    with pytest.raises(TraceError, match=message):
        trace(model)


def test_scripted_modules_are_refused():
    with pytest.raises(TraceError, match="scripted module"):
        trace(torch.jit.script(nn.Sequential(nn.Linear(3, 2))))
