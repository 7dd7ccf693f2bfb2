"""The generator protocol: a learned initialiser that is fitted by `train_generators`, saved, loaded and sampled.

A generator is a `torch.nn.Module` (its state dict is the checkpoint) with a frozen config dataclass and a card, the
facts about where it came from. As an initialiser it proposes member `request.member`; `sample` stacks `n` members.
"""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from generators.errors import ConfigError, unknown_name
from generators.initialiser import (
    Kind,
    Proposal,
    Request,
    _check_model,
    _tensors,
    check_spread,
    take_inventory,
    writable,
)

GENERATOR_KINDS: dict[str, str] = {
    "conv-vae": "generators.local.conv_vae:ConvVAE",
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

    @torch.no_grad()
    def sample(
        self, model: nn.Module, n: int, *, seed: int = 0, first: int = 0, example_inputs: Any = None
    ) -> dict[str, Tensor]:
        """Members `first` to `first + n - 1` of the population that `seed` names; `model` is not changed.

        Member i does not depend on `n` or `first`, and equals what `init(model, self, seed=seed, member=i)` writes.

        Returns:
            Every tensor of the model's state dict, stacked: `[n, ...]`. Tensors that are kept, such as frozen ones, are
            views of the model's own, expanded.

        Raises:
            ModelError: the model has nothing to fill or cannot be filled.
            ProposalError: a value does not fit the model or is not finite.
            CollapseError: a generated weight has lost its spread.
        """
        if n < 1:
            raise ConfigError(f"n must be at least 1, got {n}")
        _check_model(model)
        found, _ = take_inventory(model, example_inputs)
        request = Request(found, seed=seed, example_inputs=example_inputs)
        proposals = [
            writable(proposal, self, model, found, frozen=False)
            for proposal in self.propose_members(model, request, range(first, first + n))
        ]
        for proposal in proposals:
            check_spread(proposal, found, self.name)
        tied = {info.name: info.tied_to for info in found if info.tied_to}
        states = {}
        for key, own in _tensors(model).items():
            source = tied.get(key, key)
            if source in proposals[0].values:
                states[key] = torch.stack([proposal.values[source] for proposal in proposals]).to(own)
            else:
                states[key] = own.detach().expand(n, *own.shape)
        return states

    def propose_members(self, model: nn.Module, request: Request, members: range) -> list[Proposal]:
        """One proposal per member. Subclasses that can share work between members override this."""
        return [self.propose(model, dataclasses.replace(request, member=member)) for member in members]


def generator_class(kind: str) -> type[Generator]:
    """The class for a kind in a checkpoint's config.json.

    Raises:
        UnknownNameError: no such kind.
    """
    if kind not in GENERATOR_KINDS:
        raise unknown_name("kind of generator", kind, GENERATOR_KINDS)
    module, _, name = GENERATOR_KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), name)
