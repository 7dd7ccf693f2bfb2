"""Results that need no computing: what common operations return on the meta device, told from their operands.

torch finds the shape of a batch normalisation by running its definition in Python, operation by operation, on shapes: a
millisecond, and most of a trace went there. A shortcut says nothing where anything is out of the ordinary; torch is
asked then, and raises what has to be raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from generators.graph import operations as ops


def told(
    base: str, in_place: bool, args: tuple, kwargs: Mapping[str, Any], operands: list[Tensor]
) -> Tensor | tuple[Tensor, None] | None:
    """The result of an operation whose operands are all on the meta device, or None if torch must be asked.

    Args:
        base: name of the operation.
        in_place: by its name, it writes into its first operand.
        args, kwargs: its arguments.
        operands: the tensors among them.
    """
    rule = _RULES.get(base)
    if rule is None or not args or "out" in kwargs:
        return None
    kind = operands[0].dtype
    if not kind.is_floating_point or any(v.dtype != kind or is_functorch_wrapped_tensor(v) for v in operands):
        return None
    if base in ops.ELEMENTWISE and len(operands) > 1:
        return None
    result = rule(*args, **kwargs)
    if in_place or kwargs.get("inplace"):
        return args[0] if isinstance(result, Tensor) and result.shape == args[0].shape else None
    return result


def _made(like: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.empty(sizes, dtype=like.dtype, device="meta")  # C++, unlike `empty_like` and `new_empty`


def _alike(data: Tensor, *_: Any, **__: Any) -> Tensor:
    return _made(data, data.shape) if data.is_contiguous() else torch.empty_like(data)


def _sum_or_product(first: Any, second: Any, *others: Any, **settings: Any) -> Tensor | None:
    """Of a tensor and a number, or of two tensors."""
    if others or settings or not isinstance(first, Tensor):
        return None
    if type(second) in (int, float):
        return _alike(first)
    if not isinstance(second, Tensor) or first.ndim != second.ndim:
        return None
    if first.shape == second.shape and first.stride() == second.stride():
        return _alike(first)
    sizes = list(zip(first.shape, second.shape, strict=True))
    if not (first.is_contiguous() and second.is_contiguous()) or any(min(p) not in (1, max(p)) for p in sizes):
        return None
    return _made(first, [max(pair) for pair in sizes])


def _batch_norm(
    data: Tensor, one: Any = None, two: Any = None, weight: Any = None, bias: Any = None, training: bool = False,
    *_: Any, **__: Any,
) -> Tensor | None:  # fmt: skip
    """Of the functional and of the raw form, which differ in the order of the four vectors."""
    if data.ndim < 2 or (training and data.numel() <= data.shape[1]):
        return None
    fits = all(vector is None or vector.shape == data.shape[1:2] for vector in (one, two, weight, bias))
    return _alike(data) if fits else None


def _layer_norm(
    data: Tensor, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, *_: Any, **__: Any
) -> Tensor | None:
    shape = tuple(normalized_shape)
    fits = all(vector is None or vector.shape == shape for vector in (weight, bias))
    return _alike(data) if fits and shape and data.shape[-len(shape) :] == shape else None


def _linear(data: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    fits = weight.ndim == 2 <= data.ndim and data.shape[-1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    return _made(data, (*data.shape[:-1], weight.shape[0]))


def _convolution(
    data: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:  # fmt: skip
    """As modules call it: with a batch, and one number per axis."""
    axes = weight.ndim - 2
    if any(not isinstance(each, tuple) or len(each) != axes for each in (stride, padding, dilation)):
        return None
    if data.ndim != weight.ndim or not (data.is_contiguous() and weight.is_contiguous()):
        return None
    if data.shape[1] != groups * weight.shape[1] or weight.shape[0] % groups:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    steps = zip(data.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    sides = [(side + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for side, kernel, step, pad, gap in steps]
    return _made(data, (data.shape[0], weight.shape[0], *sides)) if min(sides) > 0 else None


def _adaptive_pool(data: Tensor, output_size: Any) -> Tensor | None:
    sides = (output_size,) * 2 if isinstance(output_size, int) else tuple(output_size)
    if data.ndim != 4 or len(sides) != 2 or None in sides or not data.is_contiguous():
        return None
    return _made(data, (*data.shape[:2], *sides))


def _concatenation(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    axis = dim % first.ndim if first.ndim else 0
    if any(value.ndim != first.ndim or not value.is_contiguous() for value in tensors):
        return None
    sizes = {(*value.shape[:axis], *value.shape[axis + 1 :]) for value in tensors}
    total = sum(value.shape[axis] for value in tensors) if first.ndim else 0
    return _made(first, (*first.shape[:axis], total, *first.shape[axis + 1 :])) if len(sizes) == 1 and total else None


def _attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, heads: int, in_weight: Any = None, *_: Any,
    need_weights: bool = True, key_padding_mask: Any = None, attn_mask: Any = None, **__: Any,
) -> tuple[Tensor, None] | None:  # fmt: skip
    """`multi_head_attention_forward` with one in-projection and without masks, if nobody asks for its weights."""
    if need_weights or key_padding_mask is not None or attn_mask is not None or embed_dim % heads:
        return None
    widths = {query.shape[-1], key.shape[-1], value.shape[-1]}
    if in_weight is None or in_weight.shape != (3 * embed_dim, embed_dim) or widths != {embed_dim}:
        return None
    if query.ndim != 3 or key.shape != value.shape or key.shape[1:2] != query.shape[1:2]:
        return None
    return _made(query, query.shape), None


_RULES: dict[str, Callable[..., Tensor | tuple[Tensor, None] | None]] = {
    **dict.fromkeys(ops.ELEMENTWISE, _alike),
    **dict.fromkeys(("add", "iadd", "sub", "isub", "mul", "imul"), _sum_or_product),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenation),
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "adaptive_avg_pool2d": _adaptive_pool,
    "multi_head_attention_forward": _attention,
}
