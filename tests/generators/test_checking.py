"""What of a model is filled, and which models cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import generators
from generators import init
from generators.checking import state_tensors
from generators.errors import ModelError
from small_models import Forward


def _shared() -> nn.Module:
    """A layer under two names, a tied weight, buffers of both sorts, a missing bias, a parametrised layer."""
    layer = nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6))
    last = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(6, 6), last)
    model[3].weight = layer[0].weight
    model[3].register_buffer("kept", torch.ones(2))
    model[3].register_buffer("scratch", torch.ones(2), persistent=False)
    model.register_parameter("gain", nn.Parameter(torch.ones(6)))
    return model


def _dropping(model: nn.Module) -> nn.Module:
    model._register_state_dict_hook(lambda module, state, prefix, _: state.pop(f"{prefix}0.bias"))
    return model


def _renaming(model: nn.Module) -> nn.Module:
    def hook(module: nn.Module, state: dict, prefix: str, _: dict) -> None:
        for name in list(state):
            state[f"net.{name}"] = state.pop(name)

    model._register_state_dict_hook(hook)
    return model


@pytest.mark.parametrize("make", [_shared, lambda: nn.TransformerEncoderLayer(8, 2), lambda: nn.LSTM(3, 4)])
def test_tensors_of_the_state_in_its_order(make) -> None:
    model = make()
    found, wanted = state_tensors(model), model.state_dict(keep_vars=True)
    assert list(found) == list(wanted) and all(found[name] is value for name, value in wanted.items())


@pytest.mark.parametrize("spec", ["he", "torch", "conv-vae-digits", "noise-ghn-digits", "he+rewire"])
@pytest.mark.parametrize("hooked", [_dropping, _renaming])
def test_hooks_that_change_the_state_dict_change_nothing(spec: str, hooked) -> None:
    """The weights, the account and the members are those of the model without them."""

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))

    plain, model = network(), hooked(network())
    assert init(model, spec, seed=2) == init(plain, spec, seed=2)
    for name, value in plain.named_parameters():
        assert model.get_parameter(name).equal(value), name
    if "ghn" in spec:
        generator = generators.load(spec)
        one, other = generator.sample(model, 2), generator.sample(plain, 2)
        assert list(one) == list(other) and all(one[name].equal(value) for name, value in other.items())


@pytest.mark.parametrize("layer", [nn.LazyBatchNorm1d(affine=False), nn.LazyBatchNorm2d(affine=False)])
def test_lazy_buffers_are_refused(layer: nn.Module) -> None:
    """With the name of the buffer and the way out, as lazy parameters are."""
    model = Forward(lambda m, x: m.head(m.layer(x)), layer=layer, head=nn.Linear(8, 10))
    for use in (
        lambda: init(model, "he"),
        lambda: init(model, "noise-ghn-digits"),
        lambda: generators.load("noise-ghn-digits").sample(model, 2),
    ):
        with pytest.raises(ModelError, match=r"layer.running_mean is a lazy buffer .*; run the model once"):
            use()
