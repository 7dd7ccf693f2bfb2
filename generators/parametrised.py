"""Weights that a layer computes from other tensors: those are set so that it computes the weight that was drawn.

Weight normalisation computes `g v / |v|` (Salimans and Kingma 2016, arXiv 1602.07868), spectral normalisation
`W / (u W v)` with running estimates u, v of its first singular vectors (Miyato et al. 2018, arXiv 1802.05957), other
parametrisations what they like. Drawn is the part that is like a weight (`v`, `W`, `original`). With the others as they
were, the layer's weight would have the scale of the one before it, or, where `original` is no weight at all, as in an
orthogonal parametrisation, make no sense.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from generators.initialiser import Proposal
from generators.inventory import MATRIX_ROLES, Inventory
from generators.seeds import isolated, stream

Follow = Callable[[Tensor], dict[str, Tensor]]
"""The drawn tensor -> name -> value of what has to change with it."""
POWER_ITERATIONS = 30  # for the first singular vectors of a new weight, whose start says nothing about them


def singular_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """First left and right singular vector of `[H, W]`, by power iteration from a fixed start."""
    working = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
    right = torch.randn(matrix.shape[1], generator=stream(0, "spectral-norm")).to(working)
    left = working @ right
    for _ in range(POWER_ITERATIONS):
        left = nn.functional.normalize(working @ right, dim=0)
        right = nn.functional.normalize(working.mT @ left, dim=0)
    return left.to(matrix), right.to(matrix)


@dataclass(frozen=True)
class Computed:
    """One weight that is computed.

    Attributes:
        drawn: name of the tensor that an initialiser draws.
        follow: gives, for its value, those of the others.
    """

    drawn: str
    follow: Follow


def drawn_part(parts: parametrize.ParametrizationList, prefix: str, found: Inventory) -> str:
    """Name of the parameter that stands for the computed weight: the only one, or the matrix of several; "" if none."""
    names = [prefix + name for name, _ in parts.named_parameters() if name.startswith("original")]
    names = [name for name in names if name in found]
    if len(names) > 1:
        names = [name for name in names if found[name].role in MATRIX_ROLES]
    return names[0] if names else ""


def _through_right_inverse(parts: parametrize.ParametrizationList, prefix: str) -> Follow:
    def follow(value: Tensor) -> dict[str, Tensor]:
        own = copy.deepcopy(parts)
        with isolated(0, "right-inverse"):  # an orthogonal one completes its basis at random
            own.right_inverse(value.to(next(own.parameters())))
        for part in own:
            if isinstance(part, _SpectralNorm) and value.ndim > 1:
                part._u, part._v = singular_vectors(part._reshape_weight_to_matrix(own.original.detach()))
        return {prefix + name: each.detach() for name, each in own.state_dict(keep_vars=True).items()}

    return follow


def _its_norm(hook: WeightNorm, prefix: str) -> Follow:
    return lambda value: {f"{prefix}{hook.name}_g": torch.norm_except_dim(value, 2, hook.dim)}


def _its_vectors(hook: SpectralNorm, prefix: str) -> Follow:
    def follow(value: Tensor) -> dict[str, Tensor]:
        left, right = singular_vectors(hook.reshape_weight_to_matrix(value))
        return {f"{prefix}{hook.name}_u": left, f"{prefix}{hook.name}_v": right}

    return follow


def _computed(model: nn.Module, found: Inventory) -> Iterator[Computed]:
    """Every computed weight of a model, by parametrisations and by the hooks that torch had before them."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if parametrize.is_parametrized(module):
            for leaf, parts in module.parametrizations.items():
                if drawn := drawn_part(parts, f"{prefix}parametrizations.{leaf}.", found):
                    yield Computed(drawn, _through_right_inverse(parts, f"{prefix}parametrizations.{leaf}."))
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                yield Computed(f"{prefix}{hook.name}_v", _its_norm(hook, prefix))
            elif isinstance(hook, SpectralNorm):
                yield Computed(f"{prefix}{hook.name}_orig", _its_vectors(hook, prefix))


@torch.no_grad()
def follow(proposal: Proposal, model: nn.Module, found: Inventory, *, name: str, frozen: bool, stacked: bool) -> None:
    """Add to a proposal what has to change with the drawn part of every computed weight.

    A weight that cannot be taken apart (no `right_inverse`, or one that gives no finite numbers) is left as proposed.
    Frozen parts are kept unless `frozen`.

    Args:
        proposal: of an initialiser `name`; values are `[M, *shape]` if `stacked`.
        model: whose tensors the values are for.
        found: its inventory.
        name: who proposes, for the account.
        frozen: parameters with `requires_grad=False` are written too.
        stacked: the values are those of M members.
    """
    for computed in _computed(model, found):
        if computed.drawn not in proposal.values:
            continue
        drawn = proposal.values[computed.drawn]
        try:
            members = [computed.follow(value) for value in (drawn if stacked else drawn[None])]
        except (NotImplementedError, RuntimeError, ValueError):
            continue
        if not all(bool(value.isfinite().all()) for member in members for value in member.values()):
            continue
        others = members[0].keys() - {computed.drawn}
        kept = {key for key in others if key in found and not found[key].trainable and not frozen}
        if kept:
            continue
        for key in members[0]:
            value = torch.stack([member[key] for member in members])
            proposal.values[key] = value if stacked else value[0]
            if key != computed.drawn:
                proposal.fallbacks.pop(key, None)
                proposal.kept.pop(key, None)
                proposal.sources[key] = f"{name}: follows {computed.drawn}"
