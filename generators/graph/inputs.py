"""Inputs for the tracer: those of the user in one form, or guesses from the model's first layer.

A forward on the meta device costs milliseconds, so a list of likely inputs is simply tried in turn, the likeliest
first. Only shapes and types matter; values never exist.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence

BATCH = 2
IMAGE_SIZES = (224, 299, 32, 28, 64, 96, 8, 256, 16, 128, 160, 192, 240, 384, 512, 48, 331, 14, 12, 10, 4)
VOLUME_SIZES = (112, 224, 64, 32, 16)
SEQUENCE_LENGTHS = (64, 128, 32, 16, 256, 100, 512, 784, 1024, 8, 1000, 16000, 4)
TEXT_LENGTHS = (16, 8, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of one forward."""

    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[tuple, dict[str, Any]]:
        """Fresh copies of the arguments on `device`, so that a forward cannot write into the originals."""
        return _moved(self.args, device), {key: _moved(value, device) for key, value in self.kwargs.items()}

    def __str__(self) -> str:
        parts = [_described(value) for value in self.args]
        parts += [f"{key}={_described(value)}" for key, value in self.kwargs.items()]
        return f"({', '.join(parts)})"


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_described, value))}]"
    return type(value).__name__


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_like(value, device=device) if device.type == "meta" else value.detach().to(device, copy=True)
    if isinstance(value, PackedSequence):  # its batch sizes stay on the CPU
        return cast(Any, value).to(device)
    if isinstance(value, list | tuple):
        items = [_moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    return value


def as_inputs(example: Any) -> Inputs:
    """What the user passed: a tuple or list is positional arguments, a mapping keywords, all else one argument."""
    if isinstance(example, Inputs):
        return example
    if isinstance(example, tuple | list):
        return Inputs(tuple(example))
    if isinstance(example, Mapping):
        return Inputs((), dict(example))
    return Inputs((example,))


def guesses(model: nn.Module) -> Iterator[Inputs]:
    """Likely inputs of `model`, the likeliest first; none if nothing hints at one.

    Models with several required arguments get each guess once per argument.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    count = _required(model)
    seen = set()
    for make in (_from_attributes, _from_first_layers):
        for shapes in make(model):
            if isinstance(shapes, Inputs):
                yield shapes
                continue
            shape, kind = shapes
            if (shape, kind) in seen:
                continue
            seen.add((shape, kind))
            value = torch.empty(shape, device="meta", dtype=torch.long if kind == "ids" else dtype)
            yield Inputs((value,) * count)


def _required(model: nn.Module) -> int:
    """Number of positional arguments without a default; 1 if that is unknown."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = sum(1 for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty)
    return max(required, 1)


Shape = tuple[tuple[int, ...], str]  # sizes, "values" or "ids"


def _side(value: Any) -> tuple[int, ...] | None:
    """An image size given as an int or a pair."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(item, int) for item in value):
        return tuple(value)
    return None


def _from_attributes(model: nn.Module) -> Iterator[Shape | Inputs]:
    """What well-known libraries write on their models."""
    example = getattr(model, "example_input_array", None)  # lightning
    if example is not None:
        yield as_inputs(example)
    for key in ("pretrained_cfg", "default_cfg"):  # timm
        cfg = getattr(model, key, None)
        size = cfg.get("input_size") if isinstance(cfg, Mapping) else getattr(cfg, "input_size", None)
        if isinstance(size, list | tuple) and all(isinstance(item, int) for item in size):
            yield (BATCH, *size), "values"
    config = getattr(model, "config", None)  # transformers
    dummy = getattr(model, "dummy_inputs", None) if config is not None else None
    if isinstance(dummy, Mapping):
        yield Inputs((), dict(dummy))
    channels = _channels(model) or getattr(config, "num_channels", None) or 3
    for owner in (model, config):
        for key in ("image_size", "img_size", "input_size", "input_resolution"):
            side = _side(getattr(owner, key, None))
            if side is not None:
                yield (BATCH, channels, *side), "values"
    if isinstance(getattr(config, "vocab_size", None), int):
        yield (BATCH, TEXT_LENGTHS[0]), "ids"


def _channels(model: nn.Module) -> int | None:
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)


def _images(channels: int) -> Iterator[Shape]:
    for size in IMAGE_SIZES:
        yield (BATCH, channels, size, size), "values"


def _convolution(layer: _ConvNd) -> Iterator[Shape]:
    axes = len(layer.kernel_size)
    for channels in dict.fromkeys((layer.in_channels, 3, 1)):
        if axes == 1:
            for length in SEQUENCE_LENGTHS:
                yield (BATCH, channels, length), "values"
        elif axes == 2:
            yield from _images(channels)
        else:
            for size in VOLUME_SIZES:
                yield (BATCH, channels, 16, size, size), "values"
    if axes == 1:
        for length in SEQUENCE_LENGTHS:  # raw waves without a channel axis
            yield (BATCH, length), "values"


def _features(width: int) -> Iterator[Shape]:
    """Inputs of a layer that works on the last axis: vectors, sequences, images that are cut into patches."""
    yield (BATCH, width), "values"
    for length in TEXT_LENGTHS[:3]:
        yield (BATCH, length, width), "values"
    for channels in (1, 3):
        side = math.isqrt(width // channels)
        if side and channels * side * side == width:  # a flattened image, or a patch of one
            yield (BATCH, channels, side, side), "values"
            yield from ((shape, kind) for shape, kind in _images(channels) if shape[-1] % side == 0)
    for length in TEXT_LENGTHS[3:]:
        yield (BATCH, length, width), "values"


def _sequences(width: int) -> Iterator[Shape]:
    yield (BATCH, TEXT_LENGTHS[0], width), "values"
    yield from _features(width)


def _ids(_: nn.Module) -> Iterator[Shape]:
    for length in TEXT_LENGTHS:
        yield (BATCH, length), "ids"
    yield (BATCH,), "ids"


_GUESS: tuple[tuple[type | tuple[type, ...], Callable[[Any], Iterator[Shape]]], ...] = (
    (_ConvNd, _convolution),
    ((nn.Embedding, nn.EmbeddingBag), _ids),
    (nn.MultiheadAttention, lambda layer: _sequences(layer.embed_dim)),
    ((nn.RNNBase, nn.RNNCellBase), lambda layer: _sequences(layer.input_size)),
    (nn.Linear, lambda layer: _features(layer.in_features)),
    (nn.Bilinear, lambda layer: _features(layer.in1_features)),
    (nn.LayerNorm, lambda layer: _sequences(layer.normalized_shape[-1])),
    (_NormBase, lambda layer: _channel_first(layer.num_features)),
    (nn.GroupNorm, lambda layer: _channel_first(layer.num_channels)),
)


def _channel_first(channels: int) -> Iterator[Shape]:
    yield from _images(channels)
    yield (BATCH, channels), "values"
    yield (BATCH, channels, SEQUENCE_LENGTHS[0]), "values"


def _from_first_layers(model: nn.Module) -> Iterator[Shape]:
    """From the first layers in registration order, which need not be the first to run; then from any matrix."""
    found = []
    for module in model.modules():
        guess = next((make for base, make in _GUESS if isinstance(module, base)), None)
        if guess is not None:
            found.append((module, guess))
            if len(found) == 4:
                break
    for module, guess in found:
        yield from guess(module)
    if any(isinstance(module, _ConvNd) for module, _ in found):
        return
    for value in model.parameters():
        if value.ndim >= 2:
            for width in dict.fromkeys((value.shape[-1], value.shape[-2])):
                yield from _features(width)
            break
        if value.ndim == 1:
            yield (BATCH, value.shape[0]), "values"
    yield from _images(3)
    yield from _images(1)
