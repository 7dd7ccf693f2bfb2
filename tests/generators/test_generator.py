"""`Generator.sample` against `init`: same members, same protection of frozen and tied tensors."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from generators.errors import CollapseError, ConfigError, ProposalError, UnknownNameError
from generators.filling import init
from generators.generator import GENERATOR_KINDS, Generator, generator_class
from generators.initialiser import Initialiser, Kind, Proposal, Request
from generators.pointwise import HE


@dataclass(frozen=True)
class NoConfig:
    broken: bool = False
    constant: bool = False


class Noise(Generator):
    """He's draws under the name of a generator."""

    Config: ClassVar[type] = NoConfig
    kind: ClassVar[Kind] = Kind.GLOBAL

    @property
    def kind_name(self) -> str:
        return "noise"

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        proposal = HE.propose(model, request)
        if self.config.broken:
            next(iter(proposal.values.values())).fill_(float("nan"))
        if self.config.constant:
            proposal.values["0.weight"].fill_(0.5)
        return proposal


def _model() -> nn.Module:
    """Batch norm that has seen data, a frozen layer, two layers that share a weight."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].running_mean.fill_(3.0)
    model[2].requires_grad_(False)
    model[4].weight = model[3].weight
    return model


def test_sample_equals_init() -> None:
    """Member i of the stack is what `init(member=i)` writes, tensor by tensor; the model is untouched by sampling."""
    generator, model = Noise(NoConfig()), _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = generator.sample(model, 3, seed=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for member in range(3):
        init(model, generator, seed=4, member=member)
        for name, value in model.state_dict().items():
            assert torch.equal(states[name][member], value), name
    assert torch.equal(states["2.weight"][0], before["2.weight"])
    assert not torch.equal(states["0.weight"][0], states["0.weight"][1])


def test_members_do_not_depend_on_n_or_first() -> None:
    generator, model = Noise(NoConfig()), _model()
    five, late = generator.sample(model, 5), generator.sample(model, 2, first=3)
    fifty = generator.sample(model, 50)
    for name in five:
        assert torch.equal(five[name][3], fifty[name][3])
        assert torch.equal(five[name][3:], late[name])


def test_bad_calls() -> None:
    assert isinstance(Noise(NoConfig()), Initialiser)
    with pytest.raises(ConfigError, match="at least 1"):
        Noise(NoConfig()).sample(_model(), 0)
    with pytest.raises(ProposalError, match="NaN"):
        Noise(NoConfig(broken=True)).sample(_model(), 2)
    with pytest.raises(ConfigError, match="NoConfig"):
        Noise({"broken": False})
    with pytest.raises(UnknownNameError, match="'noise-ghn'"):
        generator_class("noise-gnh")


@pytest.mark.parametrize("kind", GENERATOR_KINDS)
def test_every_kind_has_a_class(kind: str) -> None:
    """The table of kinds points at classes that exist and take a frozen config."""
    found = generator_class(kind)
    assert issubclass(found, Generator)
    assert found.Config.__dataclass_params__.frozen


def test_a_collapsed_generator_is_not_sampled() -> None:
    """As `init` has it: weights without spread are an error, not a stack."""
    for use in (lambda generator: generator.sample(_model(), 2), lambda generator: init(_model(), generator)):
        with pytest.raises(CollapseError, match="0.weight"):
            use(Noise(NoConfig(constant=True)))


def test_stacks_have_the_form_of_torch() -> None:
    """Names, shapes, gradients and values of `torch.func.stack_module_state` for the same members in models."""
    generator, model = Noise(NoConfig()), _model()
    model.register_buffer("scratch", torch.arange(3.0), persistent=False)
    members = []
    for member in range(3):
        members.append(copy.deepcopy(model))
        init(members[-1], generator, seed=4, member=member)
    for found, wanted in zip(
        generator.sample(model, 3, seed=4, stacked=True), torch.func.stack_module_state(members), strict=True
    ):
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            assert torch.equal(found[name], value), name
            assert (found[name].requires_grad, found[name].is_leaf) == (value.requires_grad, True), name
    one = generator.sample(model, 1, stacked=True)
    one[1]["scratch"].zero_()
    assert torch.equal(model.scratch, torch.arange(3.0)), "the buffers of a stack of one are not the model's own"


def test_generators_without_codes_take_none() -> None:
    for asked in ({"codes": torch.zeros(2, 3, 4)}, {"shared_noise": True}):
        with pytest.raises(ConfigError, match="kind 'noise', which has no noise codes"):
            Noise(NoConfig()).sample(_model(), 2, **asked)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        *(({"n": n}, f"n must be a whole number of at least 1, got {n!r}") for n in (2.5, "3", None, True, 0, -2)),
        *(
            ({"first": n}, f"first must be a whole number of at least 0, got {n!r}")
            for n in (1.5, "1", None, False, -1)
        ),
        *(({"seed": n}, f"seed must be a whole number, got {n!r}") for n in (0.5, "a", None, True)),
        ({"codes": [[0.0]]}, "codes must be .*, a tensor of floating-point numbers, got list"),
        ({"codes": torch.zeros(2, 3, 4, dtype=torch.long)}, "codes must be .*got torch.int64"),
    ],
)
def test_arguments_that_make_no_sense(asked: dict, words: str) -> None:
    """Refused by name, with what was given, and without a look at the model."""
    with pytest.raises(ConfigError, match=words):
        Noise(NoConfig()).sample(_model(), **{"n": 2, **asked})


def test_whole_numbers_of_other_libraries() -> None:
    one, other = (Noise(NoConfig()).sample(_model(), kind(2), first=kind(1), seed=kind(3)) for kind in (int, np.int32))
    assert all(other[name].shape == value.shape for name, value in one.items())
    assert torch.equal(one["0.weight"], other["0.weight"])
