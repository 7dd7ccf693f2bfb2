"""`generators.graph.trace`: what cannot be traced, and what the error says."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from generators.commandline import Interrupted
from generators.errors import TraceError
from generators.graph import trace
from generators.inventory import inventory
from small_models import Forward


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


STEERED = {
    "a parameter": lambda m, x: m.a(x) * float(m.gain),
    "a selection": lambda m, x: m.a(x[torch.where(x[:, 0] > 0)]),
    "a list": lambda m, x: m.a(x)[torch.nonzero(x[:, 0]).flatten().tolist()],
    "another library": lambda m, x: m.a(x) + torch.from_numpy(x.detach().numpy()).sum(),
}


@pytest.mark.parametrize("kind", STEERED)
def test_values_that_are_read_need_real_inputs(kind):
    """The line is named without them; with them the same layer is found in a run on the CPU."""
    model = Forward(STEERED[kind], a=nn.Linear(3, 2), gain=nn.Parameter(torch.ones(())))
    with pytest.raises(TraceError, match=r"at .*test_tracer.py:\d+ `.*m.a\(x.*needs values.*`example_inputs=`"):
        trace(model)
    graph = trace(model, torch.ones(2, 3))
    assert graph.nodes[graph.by_parameter["a.weight"]].kind == "linear"


def test_a_model_without_storage_cannot_be_run_for_its_values():
    with torch.device("meta"):
        model = Forward(lambda m, x: m.a(x) if x.sum() > 0 else x, a=nn.Linear(3, 2))
    for inputs in (None, torch.ones(2, 3)):
        with pytest.raises(TraceError, match=r"needs values.*model.to_empty\(device='cpu'\).*`example_inputs=`"):
            trace(model, inputs)
    assert "a.weight" in trace(model.to_empty(device="cpu"), torch.ones(2, 3)).by_parameter


def test_buffers_steer_the_forward_with_their_values():
    """Flags, counters and index tables are known to a trace; what a buffer adds to a stream is a constant."""
    model = Forward(
        lambda m, x: (m.a if bool(m.flag) and int(m.steps[1]) == 5 else m.b)(x[:, m.order] + m.mean),
        a=nn.Linear(3, 2), b=nn.Linear(3, 2),
    )  # fmt: skip
    for name, value in {"flag": True, "steps": [4, 5], "order": [2, 0, 1], "mean": [0.5, 0.5, 0.5]}.items():
        model.register_buffer(name, torch.tensor(value))
    graph = trace(model)
    assert graph.unused == ("b.weight", "b.bias")
    assert [node.kind for node in graph.nodes] == ["input", "linear", "output"]


def residual(blocks: int) -> nn.Module:
    block = [Forward(lambda m, x: x + m.b(m.a(x).relu()), a=nn.Linear(4, 4), b=nn.Linear(4, 4)) for _ in range(blocks)]
    return nn.Sequential(*block, Forward(lambda m, x: x * m.gain, gain=nn.Parameter(torch.ones(4))))


def calls(blocks: int) -> tuple[int, int]:
    """Python calls in tracing a model and taking its inventory, and the edges of the graph."""
    model, count = residual(blocks), 0

    def profile(frame, event, _):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        graph = trace(model, torch.zeros(2, 4))
        inventory(model, graph)
    finally:
        sys.setprofile(None)
    return count, graph.edges.shape[1]


def test_work_grows_with_the_edges():
    """Counted in calls, which no load of the machine changes: a quadratic pass would make eight times as many."""
    calls(2)  # whatever is done once only
    (few, short), (many, long) = calls(20), calls(160)
    assert many / few <= 1.05 * long / short


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.LazyLinear(4), "weight is a lazy parameter"),
        (nn.LazyBatchNorm1d(affine=False), "running_mean is a lazy buffer"),
        (Forward(lambda m, x: "text", a=nn.Linear(3, 2)), "returned no tensor but str"),
        (Forward(lambda m, x: 1 / 0, a=nn.Linear(3, 2)), "ZeroDivisionError: division by zero"),
        ("resnet18", "expected a torch.nn.Module, got str"),
    ],
)
def test_models_that_cannot_be_traced(model, message):
    with pytest.raises(TraceError, match=message):
        trace(model)


def test_an_interruption_is_no_fault_of_the_model():
    """A command that is asked to terminate while it traces stays resumable."""

    def interrupted(m, x):
        raise Interrupted("asked to terminate")

    with pytest.raises(Interrupted):
        trace(Forward(interrupted, a=nn.Linear(3, 2)))


def test_scripted_modules_are_refused():
    with pytest.raises(TraceError, match="scripted module"):
        trace(torch.jit.script(nn.Sequential(nn.Linear(3, 2))))
