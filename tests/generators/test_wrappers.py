"""Models that are compiled or spread over devices, as a whole or in parts: the weights of plain ones, other names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import generators
from generators import init
from generators.wrappers import outside_names, unwrapped, wrapped_leaf
from small_models import process_group


def network() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    return nn.Sequential(stem, nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


SPREAD = nn.parallel.DistributedDataParallel


def compiled_parts(model: nn.Module) -> nn.Module:
    model[0], model[3] = torch.compile(model[0]), nn.DataParallel(model[3])
    return model


def spread_inside(model: nn.Module) -> nn.Module:
    model[0][0] = SPREAD(torch.compile(model[0][0]))
    return torch.compile(model)


def recomputed_inside(model: nn.Module) -> nn.Module:
    model[0][0] = checkpoint_wrapper(model[0][0])
    return checkpoint_wrapper(nn.DataParallel(model))


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], dict[str, str]]] = {
    "replicated": (nn.DataParallel, {"": "module."}),
    "compiled": (torch.compile, {"": "_orig_mod."}),
    "compiled and spread": (lambda model: SPREAD(torch.compile(model)), {"": "module._orig_mod."}),
    "spread and compiled": (lambda model: torch.compile(SPREAD(model)), {"": "_orig_mod.module."}),
    "parts": (compiled_parts, {"0.": "0._orig_mod.", "3.": "3.module."}),
    "recomputed": (recomputed_inside, {"": "module."}),
    "all over": (spread_inside, {"0.0.": "_orig_mod.0.0.module._orig_mod.", "": "_orig_mod."}),
}
"""How a network is wrapped, in a process group, and how the beginnings of names change by that."""


def outside(name: str, beginnings: dict[str, str]) -> str:
    """The name that a tensor has in a wrapped network, by the table."""
    found = next(inner for inner in beginnings if name.startswith(inner))
    return beginnings[found] + name.removeprefix(found)


@pytest.mark.parametrize("key", WRAPPERS)
def test_a_model_without_its_wrappers(key: str) -> None:
    """The same tensors under plain names, the same outputs, and what was wrapped is as it was."""
    wrap, beginnings = WRAPPERS[key]
    with process_group():
        wrapper = wrap(network())
        before = list(wrapper.state_dict())
        plain = unwrapped(wrapper)
        assert not any(wrapped_leaf(module) for module in plain.modules())
        assert list(plain.state_dict()) == list(network().state_dict())
        inside, state = (model.state_dict(keep_vars=True) for model in (plain, wrapper))
        assert all(state[outside(name, beginnings)] is value for name, value in inside.items())
        assert {name: outside(name, beginnings) for name in plain.state_dict()} == outside_names(wrapper)
        assert list(wrapper.state_dict()) == before and plain(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_model_that_has_no_wrappers_is_itself() -> None:
    model = network()
    assert unwrapped(model) is model and wrapped_leaf(model) == ""
    assert all(name == same for name, same in outside_names(model).items())


def test_a_part_that_is_there_twice_stays_one() -> None:
    shared = nn.Sequential(torch.compile(nn.Linear(3, 3)))
    plain = unwrapped(nn.Sequential(shared, nn.ReLU(), shared))
    assert plain[0] is plain[2] and type(plain[0][0]) is nn.Linear


@pytest.mark.parametrize("spec", ["he", "torch", "conv-vae-digits", "noise-ghn-digits", "orthogonal+rewire", "he+lsuv"])
def test_a_seed_names_the_weights_of_the_model_inside(spec: str) -> None:
    """Chains too, which copy the model: one with a process group cannot be copied."""
    data = [(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8))]
    plain = network()
    account = init(plain, spec, seed=3, data=data)
    with process_group():
        for wrap, beginnings in WRAPPERS.values():
            wrapper = wrap(network())
            report = init(wrapper, spec, seed=3, data=data)
            names = {name: outside(name, beginnings) for name in plain.state_dict()}
            assert report == account.renamed(names)
            report.check(set(wrapper.state_dict()))
            for name, value in plain.state_dict().items():
                assert wrapper.state_dict()[names[name]].equal(value), names[name]


def test_samples_have_the_names_of_the_wrapper() -> None:
    generator, plain = generators.load("noise-ghn-digits"), network()
    wanted, pair = generator.sample(plain, 2), generator.sample(plain, 2, stacked=True)
    with process_group():
        for wrap, beginnings in WRAPPERS.values():
            wrapper = wrap(network())
            found = generator.sample(wrapper, 2)
            assert {outside(name, beginnings) for name in wanted} == set(found) == set(wrapper.state_dict())
            assert all(found[outside(name, beginnings)].equal(value) for name, value in wanted.items())
            stacks, models = generator.sample(wrapper, 2, stacked=True), [wrapper, wrapper]
            for states, same, form in zip(stacks, pair, torch.func.stack_module_state(models), strict=True):
                said = [name.replace("_checkpoint_wrapped_module.", "") for name in states]
                assert said == [name.replace("_checkpoint_wrapped_module.", "") for name in form]
                assert [value.shape for value in states.values()] == [value.shape for value in same.values()]
                assert all(one.equal(other) for one, other in zip(states.values(), same.values(), strict=True))


def test_all_that_is_asked_of_a_sample_reaches_the_model_inside() -> None:
    generator, plain, wrapper = generators.load("noise-ghn-digits"), network(), torch.compile(network())
    codes = generator.codes(wrapper, 3, seed=4)
    asked = dict(seed=2, first=1, codes=codes, shared_noise=True)
    wanted, found = generator.sample(plain, 3, **asked), generator.sample(wrapper, 3, **asked)
    assert all(found[f"_orig_mod.{name}"].equal(value) for name, value in wanted.items())


def test_a_trained_relative_may_be_wrapped() -> None:
    large, first, second = network(), network(), network()
    init(large, "orthogonal", seed=1)
    init(first, "weight-selection", relative=large)
    init(second, "weight-selection", relative=torch.compile(large))
    for name, value in first.state_dict().items():
        assert second.state_dict()[name].equal(value) and value.equal(large.state_dict()[name]), name


def test_members_of_a_recomputed_model_are_loaded_and_run() -> None:
    """A row of the sample is a state dict of the wrapper; stacks go through `torch.func.functional_call`."""
    generator, images = generators.load("noise-ghn-digits"), torch.eye(8).expand(2, 1, 8, 8)
    plain, wrapper = nn.Sequential(network()).eval(), nn.Sequential(checkpoint_wrapper(network())).eval()
    rows, stacks = generator.sample(wrapper, 2), generator.sample(wrapper, 2, stacked=True)
    for member in range(2):
        init(plain, generator, member=member)
        states = [{name: value[member] for name, value in part.items()} for part in stacks]
        assert torch.func.functional_call(wrapper, tuple(states), (images,)).equal(plain(images))
        wrapper.load_state_dict({name: value[member] for name, value in rows.items()})
        assert wrapper(images).equal(plain(images))
