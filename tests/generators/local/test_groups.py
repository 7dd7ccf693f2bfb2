"""Weight groups: keys, cutting tensors into slices and putting them together, the choice of the nearest group."""

from __future__ import annotations

import pytest
import torch

from generators.errors import ConfigError
from generators.local.groups import GroupKey, explained, group_key, nearest
from generators.seeds import stream

SIZES = dict(patch=8, depth_buckets=3)


@pytest.mark.parametrize(
    ("role", "shape", "depth", "expected"),
    [
        ("conv_weight", (16, 8, 3, 3), 0.0, "conv_weight-3x3-0"),
        ("conv_weight", (16, 1, 7, 5), 0.34, "conv_weight-7x5-1"),
        ("conv_weight", (16, 8, 1, 1), 1.0, "matrix-1x8-2"),
        ("conv_weight", (16, 8, 1), 0.5, "matrix-1x8-1"),
        ("conv_weight", (16, 8, 4), 0.5, "conv_weight-4-1"),
        ("linear_weight", (10, 64), 0.66, "matrix-1x8-1"),
        ("attention_in_weight", (96, 32), 0.99, "matrix-1x8-2"),
    ],
)
def test_the_key_of_a_tensor(role, shape, depth, expected):
    key = group_key(role, shape, depth, **SIZES)
    assert str(key) == expected
    assert GroupKey.parse(expected) == key


@pytest.mark.parametrize(
    ("role", "shape"), [("norm_scale", (8,)), ("conv_bias", (8,)), ("embedding", (9, 8)), ("matrix", (8,))]
)
def test_what_is_no_matrix_has_no_key(role, shape):
    assert group_key(role, shape, 0.0, **SIZES) is None


@pytest.mark.parametrize("text", ["", "conv_weight", "conv_weight-3x3", "conv_weight-3xa-0", "a-b-c-d"])
def test_other_text_is_no_key(text):
    with pytest.raises(ConfigError, match="conv_weight-3x3-0"):
        GroupKey.parse(text)


def test_kernels_are_cut_output_by_output_and_put_back():
    tensor = torch.arange(4 * 3 * 2 * 5.0).reshape(4, 3, 2, 5)
    key = GroupKey("conv_weight", (2, 5), 0)
    slices = key.cut(tensor)
    assert slices.shape == (key.count(tensor.shape), 2, 5) == (12, 2, 5)
    assert torch.equal(slices[1 * 3 + 2], tensor[1, 2])
    assert torch.equal(key.join(slices, tuple(tensor.shape)), tensor)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 16, 19])
def test_rows_are_cut_into_patches_of_neighbours(columns):
    tensor = torch.arange(5.0 * columns).reshape(5, columns)
    key = GroupKey("matrix", (1, 8), 0)
    slices = key.cut(tensor)
    assert slices.shape == (5 * (columns // 8), 1, 8)
    for row in range(5 if columns >= 8 else 0):  # slow and obvious
        assert torch.equal(slices[row * (columns // 8)].flatten(), tensor[row, :8])
    count = key.count(tuple(tensor.shape))
    made = key.join(torch.arange(count * 8.0).reshape(count, 1, 8), tuple(tensor.shape))
    per_row = count // 5
    assert per_row * 8 - columns in range(8)
    for row in range(5):
        assert torch.equal(made[row], torch.arange(columns) + row * per_row * 8.0)
    if columns % 8 == 0:
        assert torch.equal(key.join(slices, tuple(tensor.shape)), tensor)


def test_one_by_one_kernels_keep_their_shape():
    key = GroupKey("matrix", (1, 8), 0)
    assert key.join(torch.zeros(key.count((6, 9, 1, 1)), 1, 8), (6, 9, 1, 1)).shape == (6, 9, 1, 1)


def test_the_nearest_group_has_the_same_slices_and_the_earlier_of_two_depths():
    known = tuple(map(GroupKey.parse, ("conv_weight-3x3-0", "conv_weight-3x3-2", "conv_weight-5x5-1", "matrix-1x8-0")))
    assert nearest(GroupKey.parse("conv_weight-3x3-2"), known) == known[1]
    assert nearest(GroupKey.parse("conv_weight-3x3-1"), known) == known[0]
    assert nearest(GroupKey.parse("conv_weight-7x7-1"), known) is None
    assert nearest(GroupKey.parse("matrix-1x8-2"), known) == known[3]


def test_another_kernel_size_is_taken_from_the_least_stretched_group_then_the_nearest_depth():
    texts = "conv_weight-3x3-0 conv_weight-3x3-2 conv_weight-5x5-0 conv_weight-1x7-1 conv_weight-5-1 matrix-1x8-0"
    known = tuple(map(GroupKey.parse, texts.split()))

    def found(text: str) -> str:
        return str(nearest(GroupKey.parse(text), known, most_stretch=2.5))

    assert found("conv_weight-3x3-1") == "conv_weight-3x3-0", "its own size, though it is no less near to 5x5-0"
    assert found("conv_weight-7x7-2") == "conv_weight-5x5-0", "7/5 is less than 7/3, whatever the depth"
    assert found("conv_weight-2x2-2") == "conv_weight-3x3-2"
    assert found("conv_weight-4x4-1") == "conv_weight-5x5-0", "5/4 is less than 4/3"
    assert found("conv_weight-1x3-0") == "conv_weight-1x7-1" and found("conv_weight-3-0") == "conv_weight-5-1"
    assert {found(f"conv_weight-{shape}-0") for shape in ("16x16", "3x1", "3x3x3", "13")} == {"None"}
    assert found("matrix-1x4-0") == "None", "row patches are not stretched"
    assert nearest(GroupKey.parse("conv_weight-3x3x3-0"), (), most_stretch=2.5) is None


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
def test_kernels_of_one_two_and_three_axes_are_cut_and_put_back(shape):
    tensor = torch.randn(4, 3, *shape, generator=stream(0, "tensor"))
    key = group_key("conv_weight", tuple(tensor.shape), 0.0, **SIZES)
    slices = key.cut(tensor)
    assert key.shape == shape and slices.shape == (12, *shape)
    assert torch.equal(slices[5], tensor[1, 2])
    assert torch.equal(key.join(slices, tuple(tensor.shape)), tensor)


def test_reports_say_how_a_group_serves():
    own, deeper, larger = map(GroupKey.parse, ("conv_weight-3x3-0", "conv_weight-3x3-2", "conv_weight-7x7-0"))
    assert explained(own, own) == "conv_weight-3x3-0"
    assert explained(deeper, own) == "conv_weight-3x3-0, the nearest in depth to conv_weight-3x3-2"
    assert "conv_weight-3x3-0, resized to 7x7 kernels" in explained(larger, own)


def test_names_for_people():
    assert GroupKey.parse("conv_weight-1x7-0").slices == "1x7 kernels"
    assert GroupKey.parse("matrix-1x8-0").slices == "row patches of 8"
