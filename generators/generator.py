"""The generator protocol: a learned initialiser that is fitted by `train_generators`, saved, loaded and sampled.

A generator is a `torch.nn.Module` (its state dict is the checkpoint) with a frozen config dataclass and a card, the
facts about where it came from. As an initialiser it proposes member `request.member`; `sample` stacks `n` members.
"""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from generators.arguments import real_tensor, whole_number
from generators.checking import check_model, check_spread, state_tensors
from generators.errors import ConfigError, unknown_name
from generators.filling import take_inventory, writable
from generators.initialiser import Kind, Proposal, Request
from generators.wrappers import outside_names, unwrapped

GENERATOR_KINDS: dict[str, str] = {
    "conv-vae": "generators.local.generator:LocalGenerator",
    "linear-vae": "generators.local.generator:LocalGenerator",
    "topographic-vae": "generators.local.generator:LocalGenerator",
    "vq-vae": "generators.local.generator:LocalGenerator",
    "vq-vae-pixelcnn": "generators.local.generator:LocalGenerator",
    "filter-vae": "generators.local.generator:LocalGenerator",
    "ghn": "generators.ghn.ghn:GHN",
    "noise-ghn": "generators.ghn.ghn:GHN",
}
"""Kind in a checkpoint's config.json -> where its class lives (imported when first used)."""


class Generator(nn.Module, ABC):
    """Base of all learned initialisers.

    Attributes:
        Config: the frozen dataclass of the subclass; its fields are JSON values (numbers, strings, tuples, dicts).
        name: what reports call it: the published name or the kind.
        kind: `Kind.LOCAL` or `Kind.GLOBAL`.
        digest: of the checkpoint that it was loaded from, "" for one that was not.
        card: JSON-able facts: `kind` (key of `GENERATOR_KINDS`), data, zoo, metrics, seeds, versions, licence.
    """

    Config: ClassVar[type]
    kind: ClassVar[Kind]
    config: Any

    def __init__(self, config: Any, *, name: str = "", card: dict | None = None) -> None:
        super().__init__()
        if not isinstance(config, self.Config):
            raise ConfigError(f"{type(self).__name__} takes a {self.Config.__name__}, got {type(config).__name__}")
        self.config = config
        self.name = name or self.kind_name
        self.digest = ""
        self.card = dict(card or {})

    @property
    @abstractmethod
    def kind_name(self) -> str:
        """Key of this generator in `GENERATOR_KINDS`."""

    @abstractmethod
    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """Values for every tensor of `model` that the generator or its fallback fills; see `Initialiser`."""

    @overload
    def sample(
        self, model: nn.Module, n: int, *, seed: int = 0, first: int = 0, codes: Tensor | None = None,
        shared_noise: bool = False, example_inputs: Any = None, stacked: Literal[False] = False,
    ) -> dict[str, Tensor]: ...  # fmt: skip

    @overload
    def sample(
        self, model: nn.Module, n: int, *, seed: int = 0, first: int = 0, codes: Tensor | None = None,
        shared_noise: bool = False, example_inputs: Any = None, stacked: Literal[True],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...  # fmt: skip

    @torch.no_grad()
    def sample(
        self, model: nn.Module, n: int, *, seed: int = 0, first: int = 0, codes: Tensor | None = None,
        shared_noise: bool = False, example_inputs: Any = None, stacked: bool = False,
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
        """Members `first` to `first + n - 1` of the population that `seed` names; `model` is not changed.

        Member i does not depend on `n` or `first`, and equals what `init(model, self, seed=seed, member=i)` writes.

        Args:
            model: the architecture.
            n: number of members.
            seed: root seed of all draws.
            first: index of the first member.
            codes: `[n, ...]`, noise codes of these members, for generators that have codes (see `GHN.codes`), instead
                of those that `seed` gives; all other draws are still those of (seed, member).
            shared_noise: all other draws are those of member `first` for all of them, so that only codes differ: along
                a path of codes the weights change without a jump, and where it starts at the code of member `first`,
                its first row is that member bit for bit.
            example_inputs: inputs for the tracer, if the shape of the model's input cannot be guessed.
            stacked: the form that `torch.func.vmap` over `torch.func.functional_call` takes.

        Returns:
            Every parameter and persistent buffer by its name in the state dict, stacked: `[n, ...]`. Tensors that are
            kept, such as frozen ones, are views of the model's own, expanded. Generated ones may share one block of
            memory: clone what is to be kept or saved of a large population. With `stacked` a pair (parameters, buffers)
            as `torch.func.stack_module_state` gives it for n models: tied parameters under their first name, buffers
            that no state dict holds included, nothing expanded, leaves that require a gradient where the model's do.

        Raises:
            ConfigError: `n`, `first` or `seed` is no such number; the codes do not fit; the generator has no codes.
            ModelError: the model has nothing to fill or cannot be filled.
            ProposalError: a value does not fit the model or is not finite.
            CollapseError: a generated weight has lost its spread.
        """
        n, first = whole_number("n", n, least=1), whole_number("first", first, least=0)
        if codes is not None:
            real_tensor("codes", codes, what="as the generator's `codes` gives them")
        check_model(model)
        plain = unwrapped(model)
        if plain is not model:
            asked: dict[str, Any] = dict(
                seed=seed, first=first, codes=codes, shared_noise=shared_noise, example_inputs=example_inputs
            )
            names = outside_names(model, in_state=not stacked)
            if not stacked:
                return _renamed(names, self.sample(plain, n, **asked))
            parameters, buffers = self.sample(plain, n, **asked, stacked=True)
            return _renamed(names, parameters), _renamed(names, buffers)
        found, graph, _ = take_inventory(model, example_inputs)
        request = Request(
            found, seed=seed, example_inputs=example_inputs, graph=graph, codes=codes, shared_noise=shared_noise
        )  # fmt: skip
        proposal = self.propose_stack(model, request, range(first, first + n))
        tensors = state_tensors(model)
        proposal, measured = writable(proposal, self, model, found, tensors=tensors, frozen=False, stack=(n,))
        check_spread(measured, self.name)
        tied = {info.name: info.tied_to for info in found if info.tied_to}
        states = {}
        for key, own in tensors.items():
            value = proposal.values.get(tied.get(key, key))
            states[key] = own.detach().expand(n, *own.shape) if value is None else value.to(own)
        return _for_vmap(model, states, n) if stacked else states

    def propose_stack(self, model: nn.Module, request: Request, members: range) -> Proposal:
        """One proposal for several members, values stacked `[M, ...]`. Where members share work, this is overridden."""
        if request.codes is not None or request.shared_noise:
            raise ConfigError(f"{self.name} is a generator of kind {self.kind_name!r}, which has no noise codes")
        every = [self.propose(model, dataclasses.replace(request, member=member)) for member in members]
        stack = every[0]
        stack.values = {name: torch.stack([each.values[name] for each in every]) for name in stack.values}
        return stack

    def probes(self) -> dict[str, tuple[nn.Module, Tensor]]:
        """Models, with an input each, whose matrices must have a sound spectrum for the generator to be saved."""
        return {}


def _renamed(names: dict[str, str], states: dict[str, Tensor]) -> dict[str, Tensor]:
    return {names[name]: value for name, value in states.items()}


def _for_vmap(model: nn.Module, states: dict[str, Tensor], n: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`states` of n members in the form of `torch.func.stack_module_state`."""

    def own(name: str, value: Tensor) -> Tensor:
        held = states.get(name, value.detach().expand(n, *value.shape))
        return held.clone() if held.data_ptr() == value.data_ptr() else held

    return (
        {name: own(name, value).requires_grad_(value.requires_grad) for name, value in model.named_parameters()},
        {name: own(name, value) for name, value in model.named_buffers()},
    )


def generator_class(kind: str) -> type[Generator]:
    """The class for a kind in a checkpoint's config.json.

    Raises:
        UnknownNameError: no such kind.
    """
    if kind not in GENERATOR_KINDS:
        raise unknown_name("kind of generator", kind, GENERATOR_KINDS)
    module, _, name = GENERATOR_KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), name)
