"""What is checked before a model is written into: that it can be filled, and that a proposal fits it.

Everything here looks and raises; nothing writes into the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from generators.errors import CollapseError, ModelError, ProposalError
from generators.initialiser import Initialiser, Kind, Proposal
from generators.inventory import MATRIX_ROLES, Inventory, ParameterInfo
from generators.statistics import is_finite, spreads

Spreads = dict[str, dict[str, float]]
"""Parameter name to figures, see `matrix_spreads`."""

COLLAPSED_STD_RATIO = 1e-3  # a generated matrix this far below its target spread is a constant for all purposes


def check_model(model: nn.Module) -> None:
    """Raise `ModelError` for models that cannot be filled."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    named = dict(model.named_parameters())
    if not named:
        raise ModelError(f"{type(model).__name__} has no parameters: there is nothing to initialise")
    for name, value in named.items():
        if is_lazy(value):
            raise ModelError(f"{name} is a lazy parameter without a shape; run the model once on a batch first")
        if value.is_meta:
            raise ModelError(f"{name} is on the meta device; give it storage first: model.to_empty(device='cpu')")
    for name, buffer in model.named_buffers():
        if is_lazy(buffer):
            raise ModelError(f"{name} is a lazy buffer without a shape; run the model once on a batch first")


def check_start(model: nn.Module, first: Initialiser) -> None:
    """Raise `ModelError` if the first step of a chain refines what is there, and all that is there are zeros."""
    if first.kind == Kind.REFINING and not any(value.any() for value in model.parameters()):
        raise ModelError(
            f"every parameter of the model is zero, so there is nothing for {first.name} to refine; fill it first, as "
            f"in 'he+{first.name}'"
        )


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, as the live objects. Tied ones appear under each name.

    In the order of the state dict, but without asking for it: hooks may rename or drop what is in that.
    """
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and leaf not in module._non_persistent_buffers_set:
                found[f"{path}.{leaf}" if path else leaf] = value
    return found


def _unwritable(value: Tensor) -> str:
    """Why torch could not write into a tensor of the model, "" if it can."""
    if value.layout is not torch.strided:
        return f"is stored as {str(value.layout).removeprefix('torch.')}; make it dense"
    if value.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in torch.inference_mode(); make the model outside, or fill it inside"
    if any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
        return "holds one number at several places (expanded); clone it first"
    return ""


def check_fit(proposal: Proposal, tensors: dict[str, Tensor], name: str, stack: tuple[int, ...]) -> None:
    """Raise unless every proposed tensor exists, has the shape of the model's, and is accounted for."""
    for key, value in proposal.values.items():
        if key not in tensors:
            raise ProposalError(f"{name}: proposed a value for {key!r}, which the model does not have")
        if value.shape != (*stack, *tensors[key].shape):
            raise ProposalError(
                f"{name}: {key} has shape {tuple(tensors[key].shape)}, proposed was {tuple(value.shape[len(stack) :])}"
            )
        reason = "" if stack else _unwritable(tensors[key])
        if reason:
            raise ModelError(f"{name} cannot write into {key}, which {reason}, or freeze it; nothing was written")
    if proposal.sources.keys() & proposal.fallbacks.keys() or (
        proposal.sources.keys() | proposal.fallbacks.keys() != proposal.values.keys()
    ):
        raise ProposalError(f"{name}: every proposed tensor must have exactly one source or fallback")


def check_finite(proposal: Proposal, tensors: dict[str, Tensor], name: str, measured: Spreads) -> None:
    """Raise if a value is NaN or infinite in the data type of the model; a finite spread says that none is."""
    for key, value in proposal.values.items():
        written = value.to(tensors[key].dtype) if tensors[key].is_floating_point() else value
        known = written is value and key in measured and math.isfinite(measured[key]["std"])
        if not known and not is_finite(written):
            raise ProposalError(
                f"{name}: the value for {key} holds NaN or infinity as {tensors[key].dtype}; nothing was written"
            )


def matrix_spreads(values: dict[str, Tensor], generated: Iterable[str], found: Inventory) -> Spreads:
    """Spread of every generated matrix against the He spread of its fan-in.

    Args:
        values: parameter name to `[M, *shape]`, M members, of which the one with the least spread counts.
        generated: names of the parameters that the generator stands behind.
        found: inventory of the model.

    Returns:
        Name to `std`, `target_std` and `std_ratio`; not finite for values that are not.
    """
    wanted = {info.name: info for info in found if info.role in MATRIX_ROLES and info.numel > 1}
    statistics = {}
    for name in generated:
        if name in wanted:
            std, target = spreads(values[name]).min().item(), wanted[name].he_std
            statistics[name] = {"std": std, "target_std": target, "std_ratio": std / target}
    return statistics


def changes(before: dict[str, Tensor], after: dict[str, Tensor]) -> Spreads:
    """`std_before` and `std_after` of every tensor that is given a new value; 0 for a single number."""

    def std(value: Tensor) -> float:
        return value.float().std().item() if value.numel() > 1 else 0.0

    return {name: {"std_before": std(before[name].detach()), "std_after": std(value)} for name, value in after.items()}


def check_spread(statistics: Spreads, name: str) -> None:
    """Raise `CollapseError` if a generated matrix is a constant for all purposes; see `matrix_spreads`."""
    collapsed = [key for key, row in statistics.items() if row.get("std_ratio", 1.0) < COLLAPSED_STD_RATIO]
    if collapsed:
        row = statistics[collapsed[0]]
        raise CollapseError(
            f"{name}: the generated {collapsed[0]} (and {len(collapsed) - 1} more) has lost its spread "
            f"(std {row['std']:.2e} against {row['target_std']:.2e} for He); "
            "nothing was written; refit the generator or use another one"
        )


def without_protected(proposal: Proposal, infos: dict[str, ParameterInfo], frozen: bool) -> Proposal:
    """Drop what must not be written: frozen parameters (unless asked) and second names of tied parameters."""
    for name in list(proposal.values):
        info = infos.get(name)
        reason = None
        if info and info.tied_to:
            reason = f"tied to {info.tied_to}"
        elif info and not info.trainable and not frozen:
            reason = "frozen (requires_grad=False); pass frozen=True to fill it"
        if reason:
            del proposal.values[name]
            proposal.sources.pop(name, None)
            proposal.fallbacks.pop(name, None)
            proposal.kept[name] = reason
    return proposal
