"""How a model is filled: every proposal is checked before anything is written.

`init` resolves a chain such as `"he+lsuv"`, collects the proposals, checks shapes, finiteness and spread, and only then
writes; a failure on the way leaves the model as it was.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from generators.errors import CollapseError, ModelError, ProposalError, TraceError
from generators.initialiser import Initialiser, Kind, Proposal, Request, resolve
from generators.inventory import MATRIX_ROLES, Inventory, ParameterInfo, Role, inventory
from generators.report import InitReport
from generators.statistics import is_finite, spreads

if TYPE_CHECKING:
    from generators.graph import Graph

log = logging.getLogger(__name__)

Spreads = dict[str, dict[str, float]]
"""Parameter name to figures, see `matrix_spreads`."""

UNMEASURED = (
    "running statistics start at 0 and 1: the network means nothing in eval() before some batches in train mode "
    "have measured them"
)
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


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by state-dict name, as the live objects. Tied ones appear under each name."""
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def reset_running_statistics(model: nn.Module, name: str, *, frozen: bool = False) -> Proposal:
    """Start values for the running statistics of normalisation layers: they described the weights that go away.

    Those of a layer whose own parameters are all frozen are kept unless `frozen`: they belong to what is kept.
    """
    proposal = Proposal()
    starts = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
    for path, module in model.named_modules():
        if not getattr(module, "track_running_stats", False):
            continue
        own = list(module.parameters(recurse=False))
        keep = bool(own) and not frozen and not any(value.requires_grad for value in own)
        for leaf, start in starts.items():
            value = getattr(module, leaf, None)
            full = f"{path}.{leaf}" if path else leaf
            if isinstance(value, Tensor) and keep:
                proposal.kept[full] = "running statistics of a frozen layer; pass frozen=True to reset them"
            elif isinstance(value, Tensor):
                proposal.values[full] = torch.full_like(value, start)
                proposal.sources[full] = f"{name}: running statistics reset to {'1' if start else '0'}"
    return proposal


def _unwritable(value: Tensor) -> str:
    """Why torch could not write into a tensor of the model, "" if it can."""
    if value.layout is not torch.strided:
        return f"is stored as {str(value.layout).removeprefix('torch.')}; make it dense"
    if value.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in torch.inference_mode(); make the model outside, or fill it inside"
    if any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
        return "holds one number at several places (expanded); clone it first"
    return ""


def _check_fit(proposal: Proposal, model: nn.Module, name: str, stack: tuple[int, ...]) -> None:
    """Raise unless every proposed tensor exists, has the shape of the model's, and is accounted for."""
    tensors = state_tensors(model)
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


def _check_finite(proposal: Proposal, model: nn.Module, name: str, measured: Spreads) -> None:
    """Raise if a value is NaN or infinite in the data type of the model; a finite spread says that none is."""
    tensors = state_tensors(model)
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


def check_spread(statistics: Spreads, name: str) -> None:
    """Raise `CollapseError` if a generated matrix is a constant for all purposes; see `matrix_spreads`."""
    collapsed = [key for key, row in statistics.items() if row["std_ratio"] < COLLAPSED_STD_RATIO]
    if collapsed:
        row = statistics[collapsed[0]]
        raise CollapseError(
            f"{name}: the generated {collapsed[0]} (and {len(collapsed) - 1} more) has lost its spread "
            f"(std {row['std']:.2e} against {row['target_std']:.2e} for He); "
            "nothing was written; refit the generator or use another one"
        )


def _merge(first: Proposal, second: Proposal, step: str) -> Proposal:
    """The account of `second` applied after `first`: a refined tensor keeps the name of who made it."""
    merged = Proposal({**first.values, **second.values}, dict(first.sources), dict(first.fallbacks))
    merged.kept = {**first.kept, **second.kept}
    merged.notes = [*first.notes, *second.notes]
    for name, source in second.sources.items():
        if name in merged.fallbacks:
            merged.fallbacks[name] += f", then {source}"
        elif name in merged.sources:
            merged.sources[name] += f", then {source}"
        else:
            merged.sources[name] = source
    for name, reason in second.fallbacks.items():
        merged.sources.pop(name, None)
        merged.fallbacks[name] = reason
    return merged


def _without_protected(proposal: Proposal, infos: dict[str, ParameterInfo], frozen: bool) -> Proposal:
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


def writable(
    proposal: Proposal, step: Initialiser, model: nn.Module, found: Inventory, *, frozen: bool,
    stack: tuple[int, ...] = (),
) -> tuple[Proposal, Spreads]:  # fmt: skip
    """What of a step's proposal is to be written: running statistics reset, protected tensors left out, checked.

    With it come the spreads of its matrices: taking them is looking at every value, so they also tell what is finite.

    Args:
        proposal: of `step` for `model`; it is changed.
        step: who proposes.
        model: whose tensors the values are for.
        found: its inventory.
        frozen: parameters with `requires_grad=False` are written too.
        stack: `(M,)` if the values are those of M members, stacked.
    """
    if step.kind is not Kind.REFINING:
        resets = reset_running_statistics(model, step.name, frozen=frozen)
        proposal.kept = {**resets.kept, **proposal.kept}
        for key in [key for key in resets.values if key not in proposal.values]:
            start = resets.values[key]
            proposal.values[key] = start.expand(*stack, *start.shape).clone() if stack else start
            proposal.sources[key] = resets.sources[key]
        if resets.values and step.kind is not Kind.POINTWISE:
            proposal.notes.append(UNMEASURED)
    proposal = _without_protected(proposal, {info.name: info for info in found}, frozen)
    _check_fit(proposal, model, step.name, stack)
    values = proposal.values if stack else {name: value[None] for name, value in proposal.values.items()}
    measured = matrix_spreads(values, proposal.sources, found)
    _check_finite(proposal, model, step.name, measured)
    return proposal, measured


@torch.no_grad()
def _write(model: nn.Module, values: dict[str, Tensor]) -> None:
    tensors = state_tensors(model)
    for name, value in values.items():
        tensors[name].copy_(value)


def take_inventory(model: nn.Module, example_inputs: Any = None) -> tuple[Inventory, Graph | None, list[str]]:
    """The inventory of `model`, its graph if that was needed, and what the user should know.

    The model is traced only if the owners and shapes of some parameters do not tell their roles (free parameters of
    custom modules: tokens, tables, gains); where it cannot be traced, these keep an unknown role, and a note says so.
    """
    found = inventory(model)
    unknown = found.where(Role.OTHER, Role.MATRIX)
    if not unknown:
        return found, None, []
    from generators.graph import trace

    try:
        graph = trace(model, example_inputs)
        return inventory(model, graph), graph, []
    except TraceError as error:
        names = ", ".join(info.name for info in unknown[:3])
        return found, None, [f"the roles of {len(unknown)} parameters ({names}, ...) are unknown: {error}"]


def init(
    model: nn.Module,
    spec: str | Initialiser,
    *,
    seed: int = 0,
    member: int = 0,
    data: Iterable | None = None,
    loss: Callable | None = None,
    example_inputs: Any = None,
    frozen: bool = False,
) -> InitReport:
    """Fill `model` in place, or raise and leave it as it was.

    Args:
        model: any module with parameters.
        spec: a chain of names such as `"he"`, `"noise-ghn-digits"`, `"orthogonal+lsuv"`; or an initialiser object.
        seed: root seed; the same (spec, model, seed, member) gives bit-identical weights. The global random state is
            neither used nor changed.
        member: index in the population named by `seed`.
        data: batches `(inputs, targets)` for steps that need data.
        loss: `loss(outputs, targets) -> scalar` for steps that need one.
        example_inputs: a tensor, tuple or dict that the model accepts, if the tracer cannot guess one.
        frozen: also fill parameters with `requires_grad=False`.

    Returns:
        The account of every tensor of the model.

    Raises:
        UnknownNameError: a step of the chain does not exist.
        ModelError: the model has nothing to fill or cannot be filled.
        ProposalError: an initialiser gave values that do not fit; nothing was written.
        CollapseError: a generated weight has lost its spread; nothing was written.
    """
    check_model(model)
    chain = resolve(spec)
    name = spec if isinstance(spec, str) else chain[0].name
    found, graph, notes = take_inventory(model, example_inputs)
    request = Request(
        found, seed=seed, member=member, data=data, loss=loss, example_inputs=example_inputs, graph=graph
    )  # fmt: skip
    merged, working, statistics = Proposal(notes=notes), model, Spreads()
    for number, step in enumerate(chain):
        proposal = step.propose(working, request)
        proposal, measured = writable(proposal, step, model, found, frozen=frozen)
        merged, statistics = _merge(merged, proposal, step.name), statistics | measured
        if number + 1 < len(chain):
            working = copy.deepcopy(model) if working is model else working
            _write(working, proposal.values)
    statistics = {key: row for key, row in statistics.items() if key in merged.sources}
    if chain[0].kind in (Kind.LOCAL, Kind.GLOBAL):
        check_spread(statistics, name)
    tensors = state_tensors(model)
    kept = {key: merged.kept.get(key, f"not touched by {name}") for key in tensors if key not in merged.values}
    report = InitReport(
        name, seed, member, merged.sources, merged.fallbacks, kept, statistics, tuple(dict.fromkeys(merged.notes))
    )  # fmt: skip
    report.check(set(tensors))
    _write(model, merged.values)
    log.debug("%s", report)
    return report
