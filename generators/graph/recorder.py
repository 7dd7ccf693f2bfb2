"""Watching a forward: two modes that hand every operation to the builder, and see that tensors of two devices meet.

The function mode sees whole operations of the Python interface (`linear`, `lstm`, `scaled_dot_product_attention`);
beneath it, the dispatch mode catches what does not pass there (scripted functions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from generators.graph import operations as ops
from generators.graph.contract import Builder
from generators.graph.drafts import tensors_in
from generators.graph.geometry import recurrent_result
from generators.graph.replica import Replica
from generators.graph.shortcuts import told


class Recorder:
    """Executes operations one by one and folds each into the graph.

    Attributes:
        operations: how many there were.
    """

    def __init__(self, builder: Builder, replica: Replica, *, meta: bool) -> None:
        self.operations = 0
        self._builder, self._replica, self._meta = builder, replica, meta
        self._busy = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        with _FunctionMode(self), _DispatchMode(self):
            yield

    def execute(self, name: str, func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Run `func`, which may be part of an operation that is being executed already."""
        if self._busy:
            return func(*args, **kwargs)
        self._busy = True
        try:
            return self._execute(name, func, args, kwargs)
        finally:
            self._busy = False

    def _execute(self, name: str, func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        operands = list(tensors_in(args))
        if kwargs:
            operands += tensors_in(kwargs)
        if not operands:
            return func(*args, **kwargs)
        base, in_place = ops.base_name(name), ops.is_in_place(name) and isinstance(args[0], Tensor)
        originals = self._replica.originals
        strays = any(id(value) in originals for value in operands)
        if self._meta and base in ops.STACKED_RECURRENT:
            func = _recurrent
        mixed = self._meta and base not in ops.MIXED_DEVICES and len({value.is_meta for value in operands}) > 1
        if strays or mixed:
            operands = [originals.get(id(value), value) for value in operands]
            result = func(*self._meet(args), **self._meet(kwargs))
            if in_place:
                result = args[0]  # it may be a stand-in that was written to
        else:
            result = told(base, in_place, args, kwargs, operands) if self._meta else None
            if result is None:
                result = func(*args, **kwargs)
        results = [args[0]] if name in ("__setitem__", "__set__") else list(tensors_in(result))
        if not results:
            return result
        self.operations += 1
        self._builder.record(name, args, kwargs, operands, results)
        if in_place and args[0]._is_view() and args[0]._base is not None:
            self._builder.mark(args[0]._base, self._builder.mark_of(args[0]))
        return result

    def _meet(self, value: Any) -> Any:
        """Arguments with every tensor moved to the meta device, and the user's parameters replaced by stand-ins."""
        if isinstance(value, Tensor):
            value = self._replica.originals.get(id(value), value)
            return value if value.is_meta or not self._meta else value.to("meta")
        if isinstance(value, list | tuple):
            items = [self._meet(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, Mapping):
            return {key: self._meet(item) for key, item in value.items()}
        return value


def _recurrent(*args: Any) -> tuple[Tensor, ...]:
    return recurrent_result(args)


class _FunctionMode(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__" and not isinstance(value := func(*args), Tensor):
            return value  # shapes, devices, types: by far the most frequent
        return self._recorder.execute(name, func, args, kwargs or {})


class _DispatchMode(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self._recorder.execute(func.overloadpacket.__name__, func, args, kwargs or {})
