"""Torch's own default: every module draws its parameters as `reset_parameters()` of its class does.

It is what a user has who does nothing: uniform weights and biases within 1 / sqrt(fan-in) in linear layers and
convolutions, N(0, 1) in embeddings, everything within 1 / sqrt(hidden) in recurrent layers, Xavier's bound and zero
biases in `nn.MultiheadAttention`, and whatever third-party modules with such a method draw. Modules are reset in the
order in which constructors do it, parts before the whole. What the constructor of a model writes over its modules
afterwards, as most in torchvision, timm and transformers do, is the default of that model and is not repeated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from generators.errors import TraceError
from generators.graph.replica import Replica
from generators.initialiser import Kind, Proposal, Request, register
from generators.inventory import Inventory
from generators.parametrised import drawn_part
from generators.pointwise import HE
from generators.seeds import isolated, plain_tensors, stream
from generators.statistics import is_finite

_METHODS = ("reset_parameters", "_reset_parameters")  # torch's attention and transformer have the second


def _reset(module: nn.Module) -> None:
    """Call the method of `module` that draws its parameters, if it has one."""
    methods = (getattr(module, name, None) for name in _METHODS)
    next(filter(callable, methods), lambda: None)()


def _parametrised(module: nn.Module, found: Inventory, notes: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Every parametrised weight that can be taken apart, as its layer computes it, by the name of its drawn part."""
    for path, owner in module.named_modules():
        if parametrize.is_parametrized(owner):
            for leaf, parts in owner.parametrizations.items():
                place = f"{path}.parametrizations.{leaf}.".removeprefix(".")
                one_way = [type(part).__name__ for part in parts if not hasattr(part, "right_inverse")]
                notes += [
                    f"torch: {place} cannot be reset: {name} does not implement right_inverse" for name in one_way
                ]
                if not one_way and (drawn := drawn_part(parts, place, found)):
                    yield drawn, getattr(owner, leaf)


@dataclass(frozen=True)
class TorchDefault:
    """Calls `reset_parameters()` on a stand-in of every module, each with random numbers of its own."""

    name: str = "torch"
    kind: Kind = Kind.POINTWISE

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """What resets set; all else, such as the free parameters of custom modules, from `he`."""
        proposal = Proposal()
        drawn = self._drawn(model, request, proposal.notes)
        for info in request.inventory:
            value = drawn.get(info.name)
            if value is None or value.shape != info.shape or not value.is_floating_point() or not is_finite(value):
                HE.fill(proposal, info, request, because=f"{self.name}: no reset_parameters() sets it")
            else:
                proposal.values[info.name] = value
        proposal.sources = {name: self.name for name in proposal.values if name not in proposal.fallbacks}
        return proposal

    @plain_tensors()
    @torch.no_grad()
    def _drawn(self, model: nn.Module, request: Request, notes: list[str]) -> dict[str, Tensor]:
        """Name to value, in float32 on the CPU, NaN where nothing has been drawn.

        A computed weight stands under the name of its drawn part, see `generators.parametrised`.
        """
        try:
            module = Replica(model, meta=False, training=model.training).module.cpu().float()
        except TraceError as error:
            notes.append(f"{self.name}: {error}")
            return {}
        with parametrize.cached():  # so that resets write into one tensor
            weights = dict(_parametrised(module, request.inventory, notes))
            for value in (*module.parameters(), *weights.values()):
                if value.is_floating_point():
                    value.fill_(torch.nan)
            for path, part in reversed(list(module.named_modules())):
                for key, value in vars(part).items():
                    if isinstance(value, torch.Generator):  # the user's, which must not advance
                        vars(part)[key] = stream(request.seed, self.name, request.member, path, key)
                with isolated(request.seed, self.name, request.member, path), self._noting(path, notes):
                    _reset(part)
        return {name: value.detach() for name, value in module.named_parameters(remove_duplicate=False)} | {
            name: value.detach() for name, value in weights.items()
        }

    @contextlib.contextmanager
    def _noting(self, path: str, notes: list[str]) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a foreign module raises: its parameters go to the fallback
            notes.append(f"{self.name}: {path or 'the model'} cannot be reset: {error!r}")


register("torch", kind=Kind.POINTWISE, summary="torch's default: what reset_parameters() of every module draws")(
    TorchDefault
)
