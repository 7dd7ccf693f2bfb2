"""A stand-in for a model that can be run without consequences: same modules, parameters without storage.

The tracer runs this stand-in and never the user's model, so that nothing that a forward does (running statistics,
caches kept as attributes or in objects, counters, calls of the user's hooks) reaches it. Objects are followed some
steps deep; what is further away, cannot be copied, or has a finaliser is shared with the model.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict, deque
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
_CONTAINERS = frozenset({list, set, dict, OrderedDict})
_CALLABLES = (types.FunctionType, types.MethodType, functools.partial)
_SHARED = (type, types.ModuleType, types.BuiltinFunctionType, torch.dtype, torch.device)
_DEPTH = 4  # how deep containers and objects in attributes are followed
_NOTHING = types.CellType()  # a cell whose variable has no value yet


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
        originals: id of each of the user's parameters and buffers -> its stand-in, for code that holds on to it.
        paths: id of each module of the stand-in -> its path.
    """

    def __init__(self, model: nn.Module, *, meta: bool, training: bool) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.paths: dict[int, str] = {}
        self.originals: dict[int, Tensor] = {}
        self._meta, self._training = meta, training
        self._modules: dict[int, nn.Module] = {}
        self._copies: dict[int, tuple[Any, Any]] = {}  # by id of the original, which must live as long as that counts
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
                if is_lazy(held):
                    raise TraceError(f"{prefix}{leaf} is a lazy buffer without a shape; run the model once on a batch")
                buffers[leaf] = own[id(held)] = _buffer(held, self._meta)
                self.originals.setdefault(id(held), own[id(held)])
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
        """An attribute with modules and parameters replaced by their stand-ins; tensors, containers and objects copied.

        What two modules share, such as a cache, their stand-ins share too.
        """
        kind = type(value)
        if kind in _PLAIN:
            return value
        if id(value) in self._copies:
            return self._copies[id(value)][1]
        if kind in _CONTAINERS and not value:  # the most frequent: hooks of a kind that a module does not have
            return self._remembered(value, kind())
        if isinstance(value, Tensor):
            if id(value) in own:
                return own[id(value)]
            known = self.originals.get(id(value))
            return self._remembered(value, value.detach().clone()) if known is None else known
        if isinstance(value, nn.Module):
            if id(value) not in self._modules:  # in a plain list, say, so that its owner does not register it
                self._announce("", value)
                self._fill("", value, hidden=True)
            return self._modules[id(value)]
        if isinstance(value, types.MethodType) and depth:
            holder = self._swap(value.__self__, own, depth - 1)
            return value if holder is value.__self__ else types.MethodType(value.__func__, holder)
        if isinstance(value, _CALLABLES):
            return self._known(value, depth)
        return self._copied(value, own, depth) if depth and not isinstance(value, _SHARED) else value

    def _remembered(self, value: Any, made: Any) -> Any:
        self._copies[id(value)] = value, made
        return made

    def _known(self, value: Any, depth: int) -> Any:
        """The stand-in of a module, of its tensors and methods, and functions that hold on to any of these."""
        if isinstance(value, nn.Module):
            return self._modules.get(id(value), value)
        if isinstance(value, Tensor):
            return self.originals.get(id(value), value)
        if isinstance(value, types.MethodType):
            holder = self._known(value.__self__, depth)
            return value if holder is value.__self__ else types.MethodType(value.__func__, holder)
        if depth and isinstance(value, functools.partial):
            function, *given = self._all_known((value.func, *value.args), depth - 1)
            return functools.partial(
                function, *given, **{k: self._known(v, depth - 1) for k, v in value.keywords.items()}
            )
        if depth and isinstance(value, types.FunctionType) and (value.__closure__ or value.__defaults__):
            return self._bound_anew(value, depth - 1)
        return value

    def _all_known(self, values: Iterable[Any], depth: int) -> list[Any]:
        return [self._known(value, depth) for value in values]

    def _bound_anew(self, function: types.FunctionType, depth: int) -> types.FunctionType:
        """The function with stand-ins in its closure and defaults; itself if it holds none of the model."""
        cells = function.__closure__ or ()
        if _NOTHING in cells:  # what it holds is not there yet
            return function
        held, given = [cell.cell_contents for cell in cells], function.__defaults__ or ()
        closure, defaults = self._all_known(held, depth), self._all_known(given, depth)
        if all(new is old for new, old in zip((*closure, *defaults), (*held, *given), strict=True)):
            return function
        made = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, tuple(defaults) or None,
            tuple(types.CellType(item) for item in closure) or None,
        )  # fmt: skip
        made.__kwdefaults__ = function.__kwdefaults__
        made.__dict__.update(function.__dict__)
        return made

    def _copied(self, value: Any, own: dict[int, Tensor], depth: int) -> Any:
        """A container or an object of a class of any kind, with what it holds swapped as well."""
        if hasattr(type(value), "__del__"):
            return value  # a copy that ends would close what the original needs
        try:
            made = copy.copy(value)
        except Exception:  # a lock, a file: whatever cannot be copied is shared
            return value
        if made is value and not isinstance(value, tuple):
            return value
        self._remembered(value, made)
        if isinstance(value, tuple | set | frozenset):
            items = [self._swap(item, own, depth - 1) for item in value]
            made = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
            self._remembered(value, made)
        elif isinstance(value, list | deque | dict):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                made[key] = self._swap(item, own, depth - 1)
        held = getattr(made, "__dict__", None)
        if isinstance(held, dict):
            for key, item in list(held.items()):
                held[key] = self._swap(item, own, depth - 1)
        return made
