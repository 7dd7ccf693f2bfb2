"""Tracing: run a stand-in of the model on tensors without storage and fold every operation into the graph.

On the meta device an operation computes shapes only, so a trace costs milliseconds and no memory whatever the size of
the model. What has real values in a forward (constants, index tables, counters) keeps them until it meets a tensor
without; only control flow that depends on the values of inputs or parameters cannot be followed. Real `example_inputs`
then make the tracer fall back on one real run of a copy.
"""

from __future__ import annotations

import linecache
import os
import random
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from generators.batches import uncompiled
from generators.commandline import Interrupted
from generators.errors import TraceError
from generators.graph.assemble import assemble
from generators.graph.contract import Builder
from generators.graph.drafts import tensors_in
from generators.graph.graph import Graph
from generators.graph.inputs import Inputs, as_inputs, guesses
from generators.graph.recorder import Recorder
from generators.graph.replica import Replica
from generators.inventory import memory_of

_LIBRARY = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))
_NO_DATA = (
    "meta tensor", "meta device", "device meta", "no data", "data-dependent", "data-independent", "fake impl",
    "meta kernel",
)  # fmt: skip
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
_MORE_GUESSES = 12  # tried after one that leaves parameters unused


class _Failure(Exception):
    """A forward that raised: the model's exception as cause, where it was, and how far the trace had come."""

    def __init__(self, cause: Exception, where: str, operations: int) -> None:
        super().__init__(where)
        self.cause, self.where, self.operations = cause, where, operations

    @property
    def needs_data(self) -> bool:
        text = str(self.cause).lower()
        return isinstance(self.cause, RuntimeError | TypeError) and any(word in text for word in _NO_DATA)


def trace(model: nn.Module, example_inputs: Any = None) -> Graph:
    """The computational graph of `model`.

    The model itself is neither run nor changed or moved: a stand-in with parameters on the meta device is run. Hooks
    that the user registered do not run (those of torch itself, such as old-style weight normalisation, do, on the
    stand-in); the global random states are untouched. The graph is that of evaluation mode, or that of training mode
    if that uses more of the parameters (auxiliary heads).

    Args:
        model: any module.
        example_inputs: what the model accepts: a tensor, a tuple of positional or a dict of keyword arguments, nested
            as the model likes. Values do not matter unless the control flow depends on them: then a copy of the model
            is run on them once, for real. None: inputs are guessed from the first layer and well-known attributes.

    Returns:
        The graph, contracted to layers, free parameters and merges.

    Raises:
        TraceError: the forward raised (the model's own exception is the cause), or no guessed input fits.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"expected a torch.nn.Module, got {type(model).__name__}")
    with _undisturbed(model):
        return _guessed(model) if example_inputs is None else _given(model, as_inputs(example_inputs))


def _given(model: nn.Module, inputs: Inputs) -> Graph:
    """The graph for the user's inputs: on the meta device, or for real if the forward needs values."""
    try:
        return _traced(model, inputs)[0]
    except _Failure as failure:
        last = failure
    if any(not value.is_meta for value in tensors_in([inputs.args, inputs.kwargs])):
        try:
            return _traced(model, inputs, meta=False)[0]
        except _Failure as failure:
            last = failure
    raise _explained(model, last, f"the `example_inputs=` were {inputs}; pass inputs that the model accepts")


def _guessed(model: nn.Module) -> Graph:
    """The graph for the first guess that fits, or the one of the next few that leaves the fewest parameters unused."""
    best: Graph | None = None
    furthest: tuple[_Failure, Inputs] | None = None
    tried = more = 0
    for inputs in guesses(model):
        tried += 1
        more += best is not None
        if more > _MORE_GUESSES:
            break
        try:
            graph, settled = _traced(model, inputs)
        except _Failure as failure:
            if furthest is None or failure.operations > furthest[0].operations:
                furthest = failure, inputs
            if failure.needs_data and best is None:
                break
            continue
        if best is None or len(graph.unused) < len(best.unused):
            best = graph
        if settled:
            break
    if best is not None:
        return best
    if furthest is None:
        raise TraceError(
            f"{type(model).__name__} has no layer from which its input could be guessed; "
            "pass what it accepts as `example_inputs=`"
        )
    way_out = (
        f"none of {tried} guessed inputs fits (this is from {furthest[1]}); pass what the model accepts as "
        "`example_inputs=` (a tensor, tuple or dict; its values do not matter)"
    )
    raise _explained(model, furthest[0], way_out)


def _traced(model: nn.Module, inputs: Inputs, *, meta: bool = True) -> tuple[Graph, bool]:
    """The graph of the mode that leaves fewer parameters unused, and whether both modes could be compared."""
    graph = _run(model, inputs, meta=meta, training=False)
    if not graph.unused:
        return graph, True
    try:
        other = _run(model, inputs, meta=meta, training=True)
    except (_Failure, TraceError):
        return graph, False
    return (other if len(other.unused) < len(graph.unused) else graph), True


def _run(model: nn.Module, inputs: Inputs, *, meta: bool, training: bool) -> Graph:
    """One forward of a stand-in.

    Raises:
        _Failure: the forward raised.
        TraceError: the model cannot be copied, or returns no tensor.
    """
    replica = Replica(model, meta=meta, training=training)
    named = list(model.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(value.shape) for name, value in named}
    builder = Builder(shapes)
    for name, value in replica.parameters.items():
        builder.parameter(value, name)
    own = next((value.device for _, value in named), torch.device("cpu"))
    args, kwargs = inputs.on(torch.device("meta") if meta else own)
    for value in tensors_in([args, kwargs]):
        builder.input(value)
    recorder = Recorder(builder, replica, meta=meta)
    try:
        with recorder.watching():
            result = replica.module(*args, **kwargs)
    except Interrupted:
        raise
    except Exception as error:
        raise _Failure(error, _where(error, replica), recorder.operations) from error
    outputs = list(tensors_in(result))
    if not outputs:
        raise TraceError(
            f"the forward of {type(model).__name__} returned no tensor but {type(result).__name__}; "
            "a model must return a tensor, or a nest of lists, tuples, dicts and dataclasses with at least one"
        )
    builder.output(outputs)
    first: dict[object, str] = {}
    firsts = {name: first.setdefault(memory_of(value), name) for name, value in named}
    tied = {name: other for name, other in firsts.items() if name != other}
    graph = assemble(builder.drafts, grid=builder.grid, names=shapes, tied=tied)
    return replace(graph, inputs=Inputs(*inputs.on(torch.device("meta")))) if meta else graph


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave every global random state as it was; compiled modules run as the Python that they were made from, and
    hooks that the user registered for all modules do not run.
    """
    states = random.getstate(), np.random.get_state()
    devices = {value.device.index for value in model.parameters() if value.device.type == "cuda"}
    hooks = {name: dict(held) for name, held in vars(nn.modules.module).items() if name in _GLOBAL_HOOKS}
    with torch.random.fork_rng(devices=sorted(devices)), torch.no_grad(), warnings.catch_warnings(), uncompiled():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)
        for name in hooks:
            vars(nn.modules.module)[name].clear()
        try:
            yield
        finally:
            for name, held in hooks.items():
                vars(nn.modules.module)[name].update(held)
            random.setstate(states[0])
            np.random.set_state(states[1])


def _where(error: BaseException, replica: Replica) -> str:
    """Which line of the model's code raised, and in which module."""
    line = module = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        own = frame.f_locals.get("self")
        if id(own) in replica.paths:
            path = replica.paths[id(own)]
            module = f"{path} ({type(own).__name__})" if path else type(own).__name__
        file = frame.f_code.co_filename
        if not file.startswith(_LIBRARY):
            line = f"{file}:{number} `{linecache.getline(file, number).strip()}`"
    return ", ".join(part for part in (f"at {line}" if line else "", f"in module {module}" if module else "") if part)


def _explained(model: nn.Module, failure: _Failure, way_out: str) -> TraceError:
    """The error for the user, with the model's own exception as its cause."""
    message = str(failure.cause).strip() or "(no message)"
    if failure.needs_data:
        way_out = (
            "it needs values (such as control flow that depends on them), or an operator, that a trace without data "
            "does not have; "
        )
        if any(value.is_meta for value in model.parameters()):
            way_out += "give the model storage first, as in `model.to_empty(device='cpu')`, then "
        way_out += (
            "pass real inputs as `example_inputs=` (a tensor, tuple or dict, not on the meta device): a copy is then "
            "run on them"
        )
    error = TraceError(
        f"cannot trace {type(model).__name__}: its forward raised {type(failure.cause).__name__}: {message} "
        f"{failure.where}; {way_out}"
    )
    error.__cause__ = failure.cause
    error.__suppress_context__ = True
    return error
