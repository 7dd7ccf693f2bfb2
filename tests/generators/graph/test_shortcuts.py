"""Results that are told from operands, against torch itself on the meta device and on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from collect.architectures import build
from generators.errors import TraceError
from generators.graph import recorder, trace
from generators.graph.drafts import tensors_in
from generators.graph.operations import base_name
from generators.graph.shortcuts import told

IMAGES, TOKENS = torch.zeros(2, 6, 9, 7), torch.zeros(2, 5, 8)
VECTOR, MATRIX = torch.ones(6), torch.ones(4, 8)

COMMON: dict[str, tuple[Callable, tuple, dict[str, Any]]] = {
    "relu": (F.relu, (IMAGES,), {}),
    "silu": (F.silu, (IMAGES,), {"inplace": False}),
    "gelu": (F.gelu, (TOKENS,), {"approximate": "tanh"}),
    "dropout": (F.dropout, (TOKENS,), {"p": 0.2, "training": True}),
    "relu of channels last": (F.relu, (TOKENS.transpose(1, 2),), {}),
    "add": (torch.add, (IMAGES, IMAGES), {}),
    "add a number": (torch.add, (IMAGES, 2.0), {}),
    "mul, broadcast": (torch.mul, (IMAGES, torch.ones(2, 6, 1, 1)), {}),
    "mul, broadcast both ways": (torch.mul, (torch.ones(1, 6, 1, 7), torch.ones(2, 1, 9, 1)), {}),
    "batch_norm": (F.batch_norm, (IMAGES, VECTOR, VECTOR), {"weight": VECTOR, "bias": VECTOR, "training": True}),
    "batch_norm, raw": (torch.batch_norm, (IMAGES, None, None, VECTOR, VECTOR, False, 0.1, 1e-5, False), {}),
    "layer_norm": (F.layer_norm, (TOKENS, (8,)), {"weight": torch.ones(8), "bias": None, "eps": 1e-6}),
    "layer_norm of two axes": (F.layer_norm, (TOKENS, [5, 8]), {}),
    "linear": (F.linear, (TOKENS, MATRIX, torch.ones(4)), {}),
    "linear without bias": (F.linear, (TOKENS[0], MATRIX), {}),
    "conv2d": (F.conv2d, (IMAGES, torch.ones(4, 3, 3, 2), torch.ones(4), (2, 1), (1, 0), (1, 2), 2), {}),
    "conv1d": (F.conv1d, (IMAGES[0], torch.ones(5, 9, 3), None, (1,), (1,), (1,), 1), {}),
    "conv3d": (F.conv3d, (IMAGES[None], torch.ones(4, 2, 1, 3, 3), None, (1, 2, 2), (0,) * 3, (1,) * 3, 1), {}),
    "adaptive_avg_pool2d": (F.adaptive_avg_pool2d, (IMAGES, (3, 2)), {}),
    "adaptive_avg_pool2d, one side": (F.adaptive_avg_pool2d, (IMAGES, 1), {}),
    "cat": (torch.cat, ([IMAGES, IMAGES[:, :2].contiguous()], 1), {}),
    "cat by name": (torch.cat, ([TOKENS, TOKENS],), {"dim": -1}),
    "attention": (
        F.multi_head_attention_forward,
        (torch.zeros(5, 2, 8), torch.zeros(7, 2, 8), torch.zeros(7, 2, 8), 8, 2, torch.ones(24, 8), torch.ones(24),
         None, None, False, 0.0, torch.ones(8, 8), torch.ones(8)),
        {"training": False, "need_weights": False},
    ),
}  # fmt: skip

UNCOMMON: dict[str, tuple[Callable, tuple, dict[str, Any]]] = {
    "vectors of another length": (F.batch_norm, (IMAGES, VECTOR[:5], VECTOR[:5]), {}),
    "one value per channel": (F.batch_norm, (torch.zeros(1, 6), None, None, None, None), {"training": True}),
    "another normalised shape": (F.layer_norm, (TOKENS, (5,)), {}),
    "another width": (F.linear, (IMAGES, MATRIX), {}),
    "other channels": (F.conv2d, (IMAGES, torch.ones(4, 5, 3, 3), None, (1, 1), (0, 0), (1, 1), 1), {}),
    "a kernel that is too large": (F.conv2d, (IMAGES, torch.ones(4, 6, 11, 11), None, (1, 1), (0, 0), (1, 1), 1), {}),
    "shapes that do not fit": (torch.add, (IMAGES, torch.ones(2, 5, 9, 7)), {}),
    "types that differ": (torch.add, (IMAGES, IMAGES.double()), {}),
    "whole numbers": (torch.add, (IMAGES.long(), IMAGES.long()), {}),
    "a place for the result": (torch.add, (IMAGES, IMAGES), {"out": torch.empty_like(IMAGES)}),
    "widths that differ": (torch.cat, ([IMAGES, IMAGES[:, :, :3].contiguous()], 1), {}),
    "a number first": (torch.mul, (2.0, IMAGES), {}),
    "no batch": (F.conv2d, (IMAGES[0], torch.ones(4, 6, 3, 3), None, (1, 1), (0, 0), (1, 1), 1), {}),
    "padding by name": (F.conv2d, (IMAGES, torch.ones(4, 6, 3, 3), None, (1, 1), "same", (1, 1), 1), {}),
}


def on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return [on_meta(item) for item in value] if isinstance(value, list) else value


def shortcut(call: tuple[Callable, tuple, dict[str, Any]]) -> Any:
    func, args, kwargs = call
    args, kwargs = tuple(map(on_meta, args)), {key: on_meta(value) for key, value in kwargs.items()}
    return told(base_name(func.__name__), False, args, kwargs, [*tensors_in(args), *tensors_in(kwargs)])


@pytest.mark.parametrize("case", COMMON)
def test_shape_type_and_strides_are_those_of_torch(case: str) -> None:
    func, args, kwargs = COMMON[case]
    found = next(tensors_in(shortcut(COMMON[case])))
    real = next(tensors_in(func(*args, **kwargs)))
    assert found.is_meta and (found.shape, found.dtype) == (real.shape, real.dtype)
    if case != "attention":  # CPU kernels lay it out in their own way
        assert found.stride() == func(*map(on_meta, args), **{k: on_meta(v) for k, v in kwargs.items()}).stride()


@pytest.mark.parametrize("case", UNCOMMON)
def test_torch_is_asked_where_something_is_uncommon(case: str) -> None:
    """It raises what has to be raised, and knows types, places and batches that no shortcut knows."""
    assert shortcut(UNCOMMON[case]) is None


def test_in_place_operations_give_what_they_wrote_into() -> None:
    data = on_meta(IMAGES)
    assert told("relu", True, (data,), {}, [data]) is data
    assert told("silu", False, (data,), {"inplace": True}, [data]) is data
    small = on_meta(torch.ones(2, 6, 1, 1))
    assert told("mul", True, (data, small), {}, [data, small]) is data
    assert told("mul", True, (small, data), {}, [small, data]) is None, "too small for the result: torch raises"


def test_inside_vmap_torch_is_asked() -> None:
    asked = []

    def forward(row: Tensor) -> Tensor:
        asked.append(told("relu", False, (row,), {}, [row]))
        return row

    torch.vmap(forward)(on_meta(TOKENS))
    assert asked == [None]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: build("resnet-8-w4", shape=(3, 32, 32), classes=10),
    "vit": lambda: build("vit-2-w16", shape=(3, 32, 32), classes=10),
    "mobilenet": torchvision.models.mobilenet_v3_small,
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [7, 7]),
    "convnext": lambda: torchvision.models.ConvNeXt([torchvision.models.convnext.CNBlockConfig(8, None, 2)]),
    "densenet": lambda: torchvision.models.DenseNet(4, (2, 2), 8),
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_graphs_with_and_without_shortcuts_are_equal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = NETWORKS[name]()
    quick = trace(model)
    used = []
    monkeypatch.setattr(recorder, "told", lambda *call: used.append(told(*call)))  # returns None
    assert trace(model).signature == quick.signature
    assert sum(result is not None for result in used) > 8, "shortcuts had something to say"


def test_a_layer_that_does_not_fit_is_still_found() -> None:
    """The error is torch's, at the module."""
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(6), nn.ReLU())
    with pytest.raises(TraceError, match=r"in module 1 \(BatchNorm1d\)"):
        trace(model, torch.zeros(3, 4))
