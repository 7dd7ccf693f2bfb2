"""Models that are compiled or spread over devices: the weights of what they hold, under the names of the wrapper."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import generators
from generators import init
from generators.wrappers import unwrapped, wrapped_leaf
from small_models import process_group


def network() -> nn.Module:
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    return nn.Sequential(*layers)


def wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """Every wrapper, and one in the other, by what their names begin with; in a process group."""
    spread = nn.parallel.DistributedDataParallel
    return {
        "module.": nn.DataParallel(model),
        "_orig_mod.": torch.compile(copy.deepcopy(model)),
        "module._orig_mod.": spread(torch.compile(copy.deepcopy(model))),
        "_orig_mod.module.": torch.compile(spread(copy.deepcopy(model))),
    }


def test_what_a_wrapper_holds() -> None:
    model = network()
    assert unwrapped(model) == (model, "") and wrapped_leaf(model) == ""
    with process_group():
        for prefix, wrapper in wrappers(model).items():
            inside, found = unwrapped(wrapper)
            assert found == prefix and type(inside) is nn.Sequential
            assert [found + name for name in inside.state_dict()] == list(wrapper.state_dict())


@pytest.mark.parametrize("spec", ["he", "conv-vae-digits", "noise-ghn-digits", "orthogonal+rewire", "he+lsuv"])
def test_a_seed_names_the_weights_of_the_model_inside(spec: str) -> None:
    """Chains too, which copy the model: one with a process group cannot be copied."""
    data = [(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8))]
    plain = network()
    account = init(plain, spec, seed=3, data=data)
    with process_group():
        for prefix, wrapper in wrappers(network()).items():
            report = init(wrapper, spec, seed=3, data=data)
            wanted = replace(account.prefixed(prefix), figures=report.figures)  # which hold the time that it took
            assert report == wanted and report.figures.keys() == account.figures.keys()
            report.check(set(wrapper.state_dict()))
            for name, value in plain.state_dict().items():
                assert wrapper.state_dict()[prefix + name].equal(value), (prefix, name)


def test_samples_have_the_names_of_the_wrapper() -> None:
    generator, plain = generators.load("noise-ghn-digits"), network()
    wanted, (parameters, buffers) = generator.sample(plain, 2), generator.sample(plain, 2, stacked=True)
    with process_group():
        for prefix, wrapper in wrappers(plain).items():
            found = generator.sample(wrapper, 2)
            assert {prefix + name for name in wanted} == set(found) == set(wrapper.state_dict())
            assert all(found[prefix + name].equal(value) for name, value in wanted.items())
            pair = generator.sample(wrapper, 2, stacked=True)
            for states, same in zip(pair, (parameters, buffers), strict=True):
                assert {prefix + name for name in same} == set(states)
                assert all(states[prefix + name].equal(value) for name, value in same.items())


def test_a_trained_relative_may_be_wrapped() -> None:
    large, first, second = network(), network(), network()
    init(large, "orthogonal", seed=1)
    init(first, "weight-selection", relative=large)
    init(second, "weight-selection", relative=torch.compile(large))
    for name, value in first.state_dict().items():
        assert second.state_dict()[name].equal(value) and value.equal(large.state_dict()[name]), name
