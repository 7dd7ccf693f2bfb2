"""How a model is filled: every proposal is checked before anything is written.

`init` resolves a chain such as `"he+lsuv"`, collects the proposals, checks shapes, finiteness and spread, and only then
writes; a failure on the way leaves the model as it was.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from generators.batches import readable_again, uncompiled
from generators.checking import (
    Spreads,
    changes,
    check_finite,
    check_fit,
    check_model,
    check_spread,
    check_start,
    matrix_spreads,
    state_tensors,
    without_protected,
)  # fmt: skip
from generators.errors import TraceError
from generators.initialiser import Initialiser, Kind, Proposal, Request, check_needs, needs_of, resolve
from generators.inventory import Inventory, Role, inventory
from generators.parametrised import follow
from generators.report import InitReport
from generators.wrappers import outside_names, unwrapped

if TYPE_CHECKING:
    from generators.graph import Graph

log = logging.getLogger(__name__)

UNMEASURED = (
    "running statistics start at 0 and 1: the network means nothing in eval() before some batches in train mode "
    "have measured them"
)


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


def empty_padding(proposal: Proposal, model: nn.Module, found: Inventory) -> None:
    """Set the vectors of embeddings that stand for no word (`padding_idx`) to 0, as they are in a new model."""
    for path, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or module.padding_idx is None:
            continue
        name = f"{path}.weight" if path else "weight"
        name = found[name].tied_to or name if name in found else name
        if name in proposal.values:
            proposal.values[name] = proposal.values[name].clone()  # which may be a view of a relative's
            proposal.values[name][..., module.padding_idx, :] = 0.0


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


def _joined(first: Spreads, second: Spreads) -> Spreads:
    """The rows of both; where both have a figure of a tensor, that of `second`."""
    return {name: first.get(name, {}) | second.get(name, {}) for name in (*first, *second)}


def writable(
    proposal: Proposal, step: Initialiser, model: nn.Module, found: Inventory, *, tensors: dict[str, Tensor],
    frozen: bool, stack: tuple[int, ...] = (),
) -> tuple[Proposal, Spreads]:  # fmt: skip
    """What of a step's proposal is to be written: running statistics reset, padding empty, protected tensors left out.

    What a weight is computed from (`generators.parametrised`) is set to give that weight.

    With it come the spreads of its matrices: taking them is looking at every value, so they also tell what is finite.

    Args:
        proposal: of `step` for `model`; it is changed.
        step: who proposes.
        model: whose tensors the values are for.
        found: its inventory.
        tensors: see `state_tensors`; taking them from a large model costs as much as a tenth of filling it.
        frozen: parameters with `requires_grad=False` are written too.
        stack: `(M,)` if the values are those of M members, stacked.
    """
    if step.kind != Kind.REFINING:
        resets = reset_running_statistics(model, step.name, frozen=frozen)
        proposal.kept = {**resets.kept, **proposal.kept}
        for key in resets.kept:
            proposal.values.pop(key, None)
            proposal.sources.pop(key, None)
        unmeasured = [key for key in resets.values if key not in proposal.values]
        for key in unmeasured:
            start = resets.values[key]
            proposal.values[key] = start.expand(*stack, *start.shape).clone() if stack else start
            proposal.sources[key] = resets.sources[key]
        if unmeasured and step.kind != Kind.POINTWISE:
            proposal.notes.append(UNMEASURED)
    proposal = without_protected(proposal, {info.name: info for info in found}, frozen)
    check_fit(proposal, tensors, step.name, stack)
    if step.kind != Kind.REFINING:
        empty_padding(proposal, model, found)
    values = proposal.values if stack else {name: value[None] for name, value in proposal.values.items()}
    measured = matrix_spreads(values, proposal.sources, found)
    check_finite(proposal, tensors, step.name, measured)
    if step.kind != Kind.REFINING:
        follow(proposal, model, found, name=step.name, frozen=frozen, stacked=bool(stack))
    return proposal, measured


@torch.no_grad()
def _write(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        tensors[name].copy_(value)


def take_inventory(
    model: nn.Module, example_inputs: Any = None, *, traced: bool = False
) -> tuple[Inventory, Graph | None, list[str]]:
    """The inventory of `model`, its graph if that was needed, and what the user should know.

    The model is traced if that is asked for by `traced`, or if the owners and shapes of some parameters do not tell
    their roles (free parameters of custom modules: tokens, tables, gains); where it cannot be traced, these keep an
    unknown role, and a note says so.

    Raises:
        TraceError: the model cannot be traced, and `traced` asks for it.
    """
    found = inventory(model)
    unknown = found.where(Role.OTHER, Role.MATRIX)
    if not unknown and not traced:
        return found, None, []
    from generators.graph import trace

    try:
        graph = trace(model, example_inputs)
        return inventory(model, graph), graph, []
    except TraceError as error:
        if traced:
            raise
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
    relative: nn.Module | None = None,
    example_inputs: Any = None,
    frozen: bool = False,
) -> InitReport:
    """Fill `model` in place, or raise and leave it as it was.

    Args:
        model: any module with parameters. One that is compiled or spread over devices, as a whole or in parts, is
            filled as it would be without these wrappers.
        spec: a chain of names such as `"he"`, `"noise-ghn-digits"`, `"orthogonal+lsuv"`; or an initialiser object.
        seed: root seed; the same (spec, model, seed, member) gives bit-identical weights on one machine, those of a GHN
            with one number of threads (another moves them by rounding). The global random state is neither used nor
            changed.
        member: index in the population named by `seed`.
        data: batches `(inputs, targets)` for steps that need data.
        loss: `loss(outputs, targets) -> scalar` for steps that need one.
        relative: a trained model, for steps that inherit from one.
        example_inputs: a tensor, tuple or dict that the model accepts, if the tracer cannot guess one.
        frozen: also fill parameters with `requires_grad=False`.

    Returns:
        The account of every tensor of the model.

    Raises:
        UnknownNameError: a step of the chain does not exist.
        ConfigError: the chain makes no sense, or a step needs what was not given.
        ModelError: the model has nothing to fill or cannot be filled.
        ProposalError: an initialiser gave values that do not fit; nothing was written.
        CollapseError: a generated weight has lost its spread; nothing was written.
    """
    check_model(model)
    plain = unwrapped(model)
    if plain is not model:
        report = init(
            plain, spec, seed=seed, member=member, data=data, loss=loss, relative=relative,
            example_inputs=example_inputs, frozen=frozen,
        )  # fmt: skip
        return report.renamed(outside_names(model))
    chain = resolve(spec)
    name = spec if isinstance(spec, str) else chain[0].name
    check_needs(chain, data=data, loss=loss, relative=relative)
    check_start(model, chain[0])
    traced = any("graph" in needs_of(step) for step in chain)
    found, graph, notes = take_inventory(model, example_inputs, traced=traced)
    if frozen:
        found = Inventory(tuple(dataclasses.replace(info, trainable=True) for info in found))
    tensors = state_tensors(model)
    request = Request(
        found, seed=seed, member=member, data=readable_again(data), loss=loss,
        relative=unwrapped(relative) if isinstance(relative, nn.Module) else relative,
        example_inputs=example_inputs, graph=graph,
    )  # fmt: skip
    merged, working, statistics = Proposal(notes=notes), model, Spreads()
    figures: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    for number, step in enumerate(chain):
        started = time.perf_counter()
        with uncompiled():
            proposal = step.propose(working, request)
        again = sum(each.name == step.name for each in chain[: number + 1])
        title = f"{step.name} ({again})" if again > 1 else step.name
        seconds[title] = time.perf_counter() - started
        proposal, measured = writable(proposal, step, model, found, tensors=tensors, frozen=frozen)
        if step.kind in (Kind.LOCAL, Kind.GLOBAL):  # not after what follows it, which may mean its zeros
            check_spread(measured, name)
        if step.kind == Kind.REFINING:
            measured = _joined(measured, changes(state_tensors(working), proposal.values))
        merged = _merge(merged, proposal, step.name)
        statistics = _joined(_joined(statistics, measured), proposal.statistics)
        if proposal.figures:
            figures[title] = proposal.figures
        if number + 1 < len(chain):
            working = copy.deepcopy(model) if working is model else working
            _write(state_tensors(working), proposal.values)
    statistics = {key: row for key, row in statistics.items() if key in merged.values}
    reasons = merged.kept | {info.name: f"tied to {info.tied_to}" for info in found if info.tied_to}
    kept = {key: reasons.get(key, f"not touched by {name}") for key in tensors if key not in merged.values}
    report = InitReport(
        name, seed, member, merged.sources, merged.fallbacks, kept, statistics, tuple(dict.fromkeys(merged.notes)),
        figures, seconds,
    )  # fmt: skip
    report.check(set(tensors))
    _write(tensors, merged.values)
    log.debug("%s", report)
    return report
