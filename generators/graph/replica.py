"""A stand-in for a model that can be run without consequences: same modules, parameters without storage.

The tracer runs this stand-in and never the user's model, so that nothing that a forward does (running statistics,
caches kept as attributes, counters, calls of the user's hooks) reaches it. Not followed is a function that holds on to
the original module in a closure: it runs the original, though on stand-ins of its parameters.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from generators.errors import TraceError
from generators.wrappers import wrapped_leaf

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_OWN = ("_parameters", "_buffers", "_modules", *_HOOKS, *_BACKWARD_HOOKS)
_PLAIN = frozenset({type(None), bool, int, float, str})  # what most attributes are, and never changes
_DEPTH = 4  # how deep containers in attributes are searched for modules and tensors


def _is_of_torch(hook: Any) -> bool:
    """Hooks of torch itself (weight normalisation, pruning, ...) compute weights; the user's only watch."""
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return module.split(".")[0] == "torch"


def _empty(value: Tensor, meta: bool) -> Tensor:
    if value.is_quantized:  # there are none without data
        return value.detach().clone()
    copied = torch.empty_like(value, device="meta") if meta else value.detach().clone()
    return nn.Parameter(copied, requires_grad=value.requires_grad) if value.is_floating_point() else copied


def _buffer(value: Tensor, meta: bool) -> Tensor:
    """Small and integer buffers keep their values: counters, flags and index tables may steer the forward."""
    if not meta:
        return value.detach().clone()
    if value.is_meta or (value.numel() > 1 and value.is_floating_point()):
        return torch.empty_like(value, device="meta", requires_grad=False)
    return value.detach().to("cpu", copy=True)


class Replica:
    """A runnable stand-in for `model`.

    Attributes:
        module: the stand-in.
        parameters: name -> parameter of the stand-in. Tied parameters are separate tensors here, so that it is known
            which of the names the forward reads; a shared module has one name.
        originals: id of each of the user's parameters -> its stand-in, for code that holds on to the original.
        paths: id of each module of the stand-in -> its path.
    """

    def __init__(self, model: nn.Module, *, meta: bool, training: bool) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.paths: dict[int, str] = {}
        self.originals: dict[int, Tensor] = {}
        self._meta, self._training = meta, training
        self._modules: dict[int, nn.Module] = {}
        found = list(model.named_modules())
        for path, old in found:
            self._announce(path, old)
        for path, old in found:
            self._fill(path, old)
        self.module = self._modules[id(model)]

    def _announce(self, path: str, old: nn.Module) -> None:
        if isinstance(old, torch.jit.ScriptModule):
            raise TraceError(
                f"{path or type(old).__name__} is a scripted module, which hides its operations; "
                "trace the Python module that it was scripted from"
            )
        new = self._modules[id(old)] = object.__new__(type(old))
        self.paths[id(new)] = path

    def _fill(self, path: str, old: nn.Module, *, hidden: bool = False) -> None:
        """Copy what `old` holds; `hidden` for modules that no parent registers, whose parameters are constants."""
        new = self._modules[id(old)]
        prefix = f"{path}." if path else ""
        own: dict[int, Tensor] = {}  # a tied parameter in a list of this module must be this module's stand-in
        parameters: dict[str, Tensor | None] = dict.fromkeys(old._parameters)
        buffers: dict[str, Tensor | None] = dict.fromkeys(old._buffers)
        for leaf, value in old._parameters.items():
            if value is None:
                continue
            if is_lazy(value):
                raise TraceError(f"{prefix}{leaf} is a lazy parameter without a shape; run the model once on a batch")
            made = parameters[leaf] = own[id(value)] = _empty(value, self._meta)
            if not hidden:
                self.parameters[prefix + leaf] = made
                self.originals.setdefault(id(value), made)
        for leaf, held in old._buffers.items():
            if held is not None:
                buffers[leaf] = own[id(held)] = _buffer(held, self._meta)
        state = {key: self._swap(value, own, _DEPTH) for key, value in old.__dict__.items() if key not in _OWN}
        state.update(_parameters=parameters, _buffers=buffers, training=self._training, _compiled_call_impl=None)
        state["_modules"] = {key: self._swap(value, own, 0) for key, value in old._modules.items()}
        for key in _HOOKS:
            hooks = old.__dict__.get(key, {})
            state[key] = OrderedDict((number, hook) for number, hook in hooks.items() if _is_of_torch(hook))
        state.update((key, OrderedDict()) for key in _BACKWARD_HOOKS)
        if wrapped := wrapped_leaf(old):
            state["forward"] = state["_modules"][wrapped]
        new.__dict__.update(state)

    def _swap(self, value: Any, own: dict[int, Tensor], depth: int) -> Any:
        """An attribute with modules and parameters replaced by their stand-ins, containers and tensors copied."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if isinstance(value, Tensor):
            if id(value) in own:
                return own[id(value)]
            return self.originals[id(value)] if id(value) in self.originals else value.detach().clone()
        if isinstance(value, nn.Module):
            if id(value) not in self._modules:  # in a plain list, say, so that its owner does not register it
                self._announce("", value)
                self._fill("", value, hidden=True)
            return self._modules[id(value)]
        if isinstance(value, types.MethodType) and id(value.__self__) in self._modules:
            return types.MethodType(value.__func__, self._modules[id(value.__self__)])
        if depth and kind in (list, tuple, set):
            items: Iterable = [self._swap(item, own, depth - 1) for item in value]
            return kind(items)
        if depth and kind in (dict, OrderedDict):
            return kind((key, self._swap(item, own, depth - 1)) for key, item in value.items())
        return value
