"""A model as a function of its weights that can be differentiated two and three times.

Initialisers that look at gradients of gradients need a loss whose every operation has higher derivatives, whose dropout
is off, and whose normalisation layers use the statistics of the batch and keep none. `Functional` is that: it works on
a copy and is called with explicit weights (`torch.func.functional_call`), so nothing of the user's model is touched.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from generators.batches import arguments_of, in_full_precision, map_tensors, pair_of, to_device_of
from generators.errors import ConfigError, DataError, ModelError
from generators.inventory import Inventory, Role

HALF = (torch.float16, torch.bfloat16)
Weights = dict[str, Tensor]
"""Parameter name to value."""


def _standardised(
    values: Tensor, over: tuple[int, ...], shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Zero mean and unit variance over the axes `over`, then the affine map, both its tensors viewed as `shape`."""
    centred = values - values.mean(over, keepdim=True)
    result = centred * (centred.square().mean(over, keepdim=True) + eps).rsqrt()
    result = result if weight is None else result * weight.view(shape)
    return result if bias is None else result + bias.view(shape)


def _batch_norm(
    input: Tensor, running_mean: Any, running_var: Any, weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    axes = tuple(range(2, input.ndim))
    return _standardised(input, (0, *axes), (1, -1, *(1 for _ in axes)), weight, bias, eps)


def _instance_norm(
    input: Tensor, running_mean: Any = None, running_var: Any = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    axes = tuple(range(2, input.ndim))
    return _standardised(input, axes, (1, -1, *(1 for _ in axes)), weight, bias, eps)


def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    return _standardised(input, tuple(range(-len(normalized_shape), 0)), normalized_shape, weight, bias, eps)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(input + 3.0) / 6.0


COMPOSED: dict[Callable, Callable] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.hardsigmoid: _hardsigmoid,
}
"""Made of elementary operations. Torch's normalisations have no third derivative, or, of layer norm, a wrong one, and
its hard sigmoid has no second one."""


class _Composed(TorchFunctionMode):
    """Inside, the operations of `COMPOSED` are replaced."""

    def __torch_function__(self, func: Callable, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        """`func`, or what stands in for it."""
        return COMPOSED.get(func, func)(*args, **(kwargs or {}))


def single_precision(value: Tensor) -> Tensor:
    """Half precision as float32, the rest as it is."""
    return value.float() if value.dtype in HALF else value


def size_of(batch: Any) -> int:
    """Number of examples of a batch: the first axis of the first tensor that has one.

    Raises:
        DataError: there is no such tensor.
    """
    sizes: list[int] = []
    map_tensors(lambda tensor: sizes.append(len(tensor)) if tensor.ndim else None, batch)
    if not sizes:
        raise DataError("a batch holds no tensor with an axis of examples, so it cannot be cut; pass (inputs, targets)")
    return sizes[0]


def examples(batch: Any, start: int, stop: int) -> Any:
    """The examples `start` to `stop` of a batch; tensors that have another first axis are passed on whole."""
    size = size_of(batch)
    return map_tensors(lambda value: value[start:stop] if value.ndim and len(value) == size else value, batch)


def cycled(data: Iterable, name: str) -> Iterator[Any]:
    """The batches of `data`, from the first again when they end.

    Raises:
        DataError: there are none.
    """
    while True:
        batch = None
        for batch in data:
            yield batch
        if batch is None:
            raise DataError(f"{name} needs data, but the data passed is empty")


class Functional:
    """The loss of a model as a function of its weights, on a copy in evaluation mode.

    Half precision becomes float32. Tied parameters are one weight, frozen ones are constants.

    Args:
        model: it is copied.
        loss: `loss(outputs, targets) -> scalar`.
        found: inventory of `model`.
        name: who asks, for messages.

    Attributes:
        weights: the values of the trainable parameters.

    Raises:
        ConfigError: the loss is no function.
    """

    def __init__(self, model: nn.Module, loss: Callable, found: Inventory, name: str) -> None:
        if isinstance(loss, type) or not callable(loss):
            raise ConfigError(
                f"{name} needs a function loss(outputs, targets), got {loss!r}; pass torch.nn.functional.cross_entropy "
                "or an instance such as torch.nn.CrossEntropyLoss()"
            )
        with torch.inference_mode(False):
            self._model = copy.deepcopy(model).eval().requires_grad_(False)
            self._half = any(value.dtype in HALF for value in self._model.parameters())
            if self._half:
                self._model.float()
        for module in self._model.modules():
            if getattr(module, "track_running_stats", False):
                for key in ("track_running_stats", "running_mean", "running_var", "num_batches_tracked"):
                    setattr(module, key, None)
        self._loss, self._name = loss, name
        values = dict(self._model.named_parameters(remove_duplicate=False))
        used = [info for info in found if info.trainable and info.role is not Role.NO_FLOAT]
        self._first = {info.name: info.tied_to or info.name for info in used}
        self.weights: Weights = {info.name: values[info.name].detach() for info in used if not info.tied_to}

    def _has(self, kind: type[nn.Module]) -> bool:
        return any(isinstance(module, kind) for module in self._model.modules())

    @property
    def recurrent(self) -> bool:
        """Whether the model has torch's recurrent layers."""
        return self._has(nn.RNNBase)

    @contextlib.contextmanager
    def differentiable(self, times: int = 2) -> Iterator[None]:
        """Inside, the loss can be differentiated `times` times, up to three, whatever the caller's modes are."""
        hard = self._has(nn.Hardsigmoid)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(in_full_precision(next(self._model.parameters()).device.type))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused attention has one derivative
            if self.recurrent and torch.cuda.is_available():  # and so have cuDNN's recurrent layers
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            if times > 2 or hard:
                stack.enter_context(_Composed())
            yield

    def evaluate(self, weights: Weights, batch: Any) -> Tensor:
        """The loss as it comes, a scalar.

        Raises:
            DataError: the batch is no pair, or the loss does not take it.
            ModelError: the model does not take the batch, or its loss is no scalar.
        """
        inputs, targets = to_device_of(self._model, pair_of(batch, self._name))
        if self._half:
            inputs, targets = map_tensors(single_precision, (inputs, targets))
        arguments, keywords = arguments_of(inputs)
        values = {name: weights[first] for name, first in self._first.items()}
        try:
            outputs = functional_call(self._model, values, arguments, keywords)
        except Exception as error:  # whatever a foreign forward raises; it is chained, not swallowed
            raise ModelError(
                f"{self._name}: {type(self._model).__name__} cannot be run on a batch of the data: {error}"
            ) from error
        try:
            value = self._loss(outputs, targets)
        except Exception as error:  # likewise of a foreign loss
            raise DataError(
                f"{self._name}: the loss cannot be taken of the model's outputs in evaluation mode and the targets of "
                f"a batch: {error}"
            ) from error
        if not isinstance(value, Tensor) or value.ndim:
            form = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(f"{self._name} needs a loss that gives a scalar tensor, got {form}; take the mean of it")
        return value

    def loss(self, weights: Weights, batch: Any) -> Tensor:
        """The loss, a finite scalar with a graph to `weights`.

        Raises:
            DataError, ModelError: as `evaluate`; or the loss is not finite, or does not depend on the weights.
        """
        value = self.evaluate(weights, batch)
        if not value.requires_grad:
            raise ModelError(
                f"{self._name}: the loss is not differentiable with respect to any weight; make it of differentiable "
                "operations (no argmax, no detach, no .item())"
            )
        if not torch.isfinite(value):
            raise ModelError(
                f"{self._name}: the loss is {value.item()}, so its gradient says nothing; bring the weights to a sane "
                f"scale first, as in 'he+lsuv+{self._name}', and check the data for NaN"
            )
        return value

    def derivative(self, value: Tensor, of: Sequence[Tensor], *, graph: bool = False) -> Tensor:
        """Gradient of the scalar `value`, all tensors of `of` in one vector `[P]`; with a graph of its own if `graph`.

        Torch cannot tell a function marked `once_differentiable` from a constant in a second derivative, nor can this.

        Raises:
            ModelError: an operation of the model has no such derivative.
        """
        try:
            parts = torch.autograd.grad(value, of, create_graph=graph, materialize_grads=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ModelError(
                f"{self._name}: the loss of {type(self._model).__name__} has no derivative of the order that is needed "
                f"({error}); 'lsuv' needs none"
            ) from error
        return torch.cat([part.flatten() for part in parts])

    def gradient(self, weights: Weights, batch: Any, *, graph: bool = False) -> Tensor:
        """Gradient `[P]` of the loss, in the order of `weights`, P numbers in all of them together."""
        return self.derivative(self.loss(weights, batch), list(weights.values()), graph=graph)

    def unflattened(self, vector: Tensor) -> Weights:
        """A vector `[P]` in the names and shapes of the weights."""
        parts = vector.split([value.numel() for value in self.weights.values()])
        return {
            name: part.view_as(value) for part, (name, value) in zip(parts, self.weights.items(), strict=True)
        }  # fmt: skip
