"""The figures under the kernel pictures, and what the pictures are made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from collect.population import TensorSpec
from train_generators.compare.plots import _shown_layer, columns, leading_share, mosaic


def test_leading_share_tells_structure_from_noise():
    """White noise has about a third in 3 of 9 directions; kernels from 3 patterns have all of it there."""
    numbers = np.random.default_rng(0)
    noise = numbers.standard_normal((20000, 3, 3))
    assert leading_share(noise) == pytest.approx(1 / 3, abs=0.01)
    patterns = numbers.standard_normal((3, 9))
    structured = (numbers.standard_normal((200, 3)) @ patterns).reshape(-1, 3, 3)
    assert leading_share(structured) == pytest.approx(1)
    assert leading_share(100 * noise) == pytest.approx(leading_share(noise))


def test_a_legend_has_as_many_columns_as_its_longest_name_leaves_room_for():
    assert columns(["he", "xavier"], 4) == 2 and columns(["a"] * 9, 4) == 4
    assert columns(["noise-ghn-cifar10-long+permuted-inputs (lr 0.1, n = 3)", "he (lr 0.1, n = 3)", "c", "d"], 4) == 2
    assert columns(["x" * 500, "y"], 4) == 1


def test_mosaic_holds_every_kernel_on_its_own_scale():
    kernels = np.random.default_rng(0).standard_normal((4, 3, 3)) * np.array([1, 10, 100, 0.01])[:, None, None]
    canvas = mosaic(kernels)
    assert canvas.shape == (7, 7)
    assert np.isnan(canvas[3]).all()
    assert np.isnan(canvas[:, 3]).all()
    np.testing.assert_allclose(canvas[4:, :3], kernels[2] / np.abs(kernels[2]).max())


def test_shown_layer_is_a_well_filled_3x3_convolution_near_the_middle():
    @dataclass
    class StandIn:
        layout: tuple[TensorSpec, ...]

    def spec(name: str, *shape: int, role: str = "conv_weight") -> TensorSpec:
        return TensorSpec(name, role, shape, 0, int(np.prod(shape)))

    one_by_one, small = spec("pointwise", 64, 64, 1, 1), spec("first", 4, 1, 3, 3)
    wide = [spec(f"wide{i}", 16, 8, 3, 3) for i in range(3)]
    assert _shown_layer(StandIn((small, one_by_one, *wide, spec("head", 10, 16, role="linear_weight")))).name == "wide1"
    assert _shown_layer(StandIn((small,))).name == "first"
    assert _shown_layer(StandIn((one_by_one, spec("head", 10, 16, role="linear_weight")))) is None
