"""The stand-in that is run: no trace of a trace in the model, its copies, or the random states."""

from __future__ import annotations

import gc
import random
import threading
from collections import OrderedDict, UserDict, defaultdict, deque
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from generators.errors import TraceError
from generators.graph import trace
from generators.inventory import inventory
from small_models import process_group, rows


class Restless(nn.Module):
    """Does in its forward whatever could leave traces."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer, self.dropout = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.cache, self.count, self.plain = [], 0, torch.zeros(3)
        self.hidden = [nn.BatchNorm1d(4)]

    def forward(self, x):
        self.calls += 1
        self.count += 1
        self.cache.append(x)
        self.plain[0] += 1
        self.last = x
        self.training = not self.training
        noise = torch.rand(4) * random.random() * float(np.random.rand())
        return self.dropout(self.hidden[0](self.layer(self.norm(x)))) + noise


def test_the_model_and_the_random_states_are_untouched():
    model = Restless()
    model.layer.eval()
    called = []
    model.layer.register_forward_hook(lambda *_: called.append(1))
    model.layer.register_forward_pre_hook(lambda *_: called.append(1))
    keys = [set(module.__dict__) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    objects = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    inputs = torch.zeros(3, 4)
    for example in (inputs, None):
        assert trace(model, example).unused == ()
    assert called == [] and model.count == 0 and model.cache == [] and model.plain.tolist() == [0, 0, 0]
    assert [set(module.__dict__) for module in model.modules()] == keys
    assert [module.training for module in model.modules()] == flags
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == objects
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert int(model.hidden[0].num_batches_tracked) == 0 and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_states[0]) and random.getstate() == random_states[1]
    assert np.random.get_state()[1].tolist() == random_states[2] and torch.is_grad_enabled()


def test_a_model_on_the_meta_device_and_in_half_precision():
    with torch.device("meta"):
        graph = trace(torchvision.models.resnet18())
    assert graph.signature == trace(torchvision.models.resnet18().bfloat16()).signature


def test_hooks_that_call_the_original_module_and_bound_methods():
    """Code that holds on to the user's own parameters or methods still leads to the right nodes."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    weight = model[0].weight
    model[1].forward = lambda x, own=model[1].forward: own(F.linear(x, weight))
    graph = trace(model)
    assert [row[1] for row in rows(graph)][1:-1] == [("0.weight", "0.bias"), ("0.weight",), ("1.weight", "1.bias")]


def test_wrappers_are_seen_through():
    """The graph of what they wrap, under the names that the wrapper gives; no device is asked for."""
    plain = trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    spread = nn.DataParallel(model)
    spread.device_ids, spread.src_device_obj = [0, 1], torch.device("cuda:0")  # as it is where there are two GPUs
    with process_group():
        wrapped = {"module.": spread, "_orig_mod.": torch.compile(model), "module._orig_mod.":
                   nn.parallel.DistributedDataParallel(torch.compile(model))}  # fmt: skip
        for prefix, wrapper in wrapped.items():
            named = [(kind, tuple(prefix + name for name in names), before) for kind, names, before in rows(plain)]
            assert rows(trace(wrapper)) == named


def test_hooks_for_all_modules_do_not_run():
    """Those of a profiler, say; they are in place again afterwards, also if the trace fails."""
    seen: list[nn.Module] = []
    hooks = [
        nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)),
        nn.modules.module.register_module_forward_pre_hook(lambda module, *_: seen.append(module)),
    ]
    model = nn.Linear(4, 2)
    try:
        trace(model)
        with pytest.raises(TraceError):
            trace(model, torch.zeros(2, 5))
        assert seen == []
        model(torch.zeros(1, 4))
        assert seen == [model, model]
    finally:
        for hook in hooks:
            hook.remove()


class Moody(nn.Module):
    """Has a head for training, or one for evaluation, or both."""

    def __init__(self, *modes: bool):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.heads = nn.ModuleDict({str(mode): nn.Linear(4, 2) for mode in modes})

    def forward(self, x):
        x = self.body(x)
        return self.heads[str(self.training)](x) if str(self.training) in self.heads else x


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_that_uses_more_is_traced_whatever_the_model_is_in(training):
    assert trace(Moody(True).train(training)).unused == trace(Moody(False).train(training)).unused == ()
    both = Moody(True, False).train(training)
    assert trace(both).unused == ("heads.True.weight", "heads.True.bias"), "evaluation, if neither uses more"
    assert both.training == both.body.training == training


def test_parameters_in_the_same_memory_are_tied():
    """Also if they are two objects; views of different parts of one memory are not."""
    model, memory = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.zeros(32)
    model[1].weight = nn.Parameter(model[0].weight.data)
    assert trace(model).tied == {"1.weight": "0.weight"}
    assert {info.name: info.tied_to for info in inventory(model) if info.tied_to} == {"1.weight": "0.weight"}
    for layer, part in zip(model, memory.split(16), strict=True):
        layer.weight = nn.Parameter(part.view(4, 4))
    assert trace(model).tied == {} and not any(info.tied_to for info in inventory(model))


class Notes:
    """A cache as many write it: an object of no known class."""

    def __init__(self) -> None:
        self.last = None


class Closed(Notes):
    """Has a finaliser, which must run once, for the user's object."""

    closed = 0

    def __del__(self) -> None:
        Closed.closed += 1


class Remembering(nn.Module):
    """Two layers that share a cache, in each of which the second finds what the first has left."""

    def __init__(self, cache):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.first.cache = self.second.cache = cache
        self.lock, self.end = threading.Lock(), Closed()

    def forward(self, x):
        write(self.first.cache, self.first(x))
        return self.second(x) + read(self.second.cache)


def write(cache, value):
    if isinstance(cache, dict | UserDict):
        cache["last"] = value
    elif isinstance(cache, deque):
        cache.append(value)
    else:
        cache.last = value


def read(cache):
    if isinstance(cache, dict | UserDict):
        return cache["last"]
    return cache[-1] if isinstance(cache, deque) else cache.last


@pytest.mark.parametrize(
    "make", [Notes, SimpleNamespace, deque, dict, UserDict, OrderedDict, partial(defaultdict, list)]
)
def test_caches_of_any_class_are_copied_and_stay_shared(make):
    cache = make()
    model = Remembering(cache)
    graph = trace(model)
    assert graph.unused == () and len(graph) == 5, "both layers meet: what the first wrote, the second read"
    assert cache == make() if isinstance(cache, dict | UserDict | deque) else getattr(cache, "last", None) is None
    assert Closed.closed == 0 and not model.lock.locked()
    del model
    gc.collect()
    assert Closed.closed == 1
    Closed.closed = 0


class Bound(nn.Module):
    """Holds on to itself in a function: a closure, a default, a partial, a method, or compiled."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.norm, self.calls = nn.Linear(4, 4), nn.BatchNorm1d(4), 0
        self.call = {
            "closure": lambda: lambda x: self.run(x),
            "nested": lambda: (lambda inner: lambda x: inner(x))(lambda x: self.run(x)),
            "default": lambda: lambda x, own=self: own.run(x),
            "partial": lambda: partial(self.run),
            "keyword": lambda: partial(lambda x, own: own.run(x), own=self),
            "method": lambda: self.run,
            "compiled": lambda: torch.compile(self.run, backend="eager"),
        }[how]()

    def run(self, x):
        self.calls += 1
        return self.norm(self.layer(x))

    def forward(self, x):
        return self.call(x)


@pytest.mark.parametrize("how", ["closure", "nested", "default", "partial", "keyword", "method", "compiled"])
def test_functions_that_hold_on_to_the_model_run_the_stand_in(how):
    model = Bound(how)
    seen = []
    model.layer.register_forward_hook(lambda *_: seen.append(1))
    assert trace(model).unused == ()
    assert model.calls == 0 and seen == [] and int(model.norm.num_batches_tracked) == 0
    model(torch.ones(3, 4))
    assert model.calls == 1 and seen == [1] and int(model.norm.num_batches_tracked) == 1


class Steered(Restless):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def test_a_real_run_is_that_of_a_copy():
    model, inputs = Steered(), torch.ones(3, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert "layer.weight" in trace(model, inputs).by_parameter
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert inputs.tolist() == [[1.0] * 4] * 3 and model.plain.tolist() == [0, 0, 0] and model.count == 0
