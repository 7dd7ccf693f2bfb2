"""Weight groups: which slices of which tensors one local generator models, and how tensors are cut and put together.

A slice is one spatial kernel `[h, w]` of a convolution. What mixes channels without looking around (linear layers,
attention and recurrent projections, 1x1 convolutions) is a matrix, cut into row patches: `patch` neighbouring weights
of one row, a `[1, patch]` slice. A group is keyed by (role, slice shape, depth bucket), not by layer index, so that
any model is served.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from generators.errors import ConfigError
from generators.inventory import MATRIX_ROLES, Role


@dataclass(frozen=True, order=True)
class GroupKey:
    """Name of a weight group.

    Attributes:
        role: "conv_weight" for kernels, "matrix" for row patches.
        shape: shape of the slices: the kernel, or `(1, patch)` for row patches.
        bucket: which part of the depth of a network, 0 (input) to `depth_buckets - 1` (output).
    """

    role: str
    shape: tuple[int, ...]
    bucket: int

    def __str__(self) -> str:
        return f"{self.role}-{'x'.join(map(str, self.shape))}-{self.bucket}"

    @classmethod
    def parse(cls, text: str) -> GroupKey:
        """The inverse of `str`."""
        try:
            role, shape, bucket = text.split("-")
            return cls(role, tuple(int(size) for size in shape.split("x")), int(bucket))
        except ValueError:
            raise ConfigError(f"weight group {text!r} is not written like 'conv_weight-3x3-0'") from None

    @property
    def patches(self) -> bool:
        """True if the slices are row patches of matrices, False if they are kernels."""
        return self.role == Role.MATRIX.value

    @property
    def slices(self) -> str:
        """What the group holds, for people: "3x3 kernels" or "row patches of 8"."""
        return f"row patches of {self.shape[1]}" if self.patches else f"{'x'.join(map(str, self.shape))} kernels"

    def lines(self, tensor_shape: tuple[int, ...]) -> tuple[int, int]:
        """How the numbers of a tensor lie: in so many lines of so many numbers, each of which is cut on its own.

        A line is a kernel, or a row of a matrix.
        """
        axes = 1 if self.patches else 2
        return math.prod(tensor_shape[:axes]), math.prod(tensor_shape[axes:])

    def cut(self, tensor: Tensor) -> Tensor:
        """Slices `[N, *shape]` of a tensor `[outputs, inputs, ...]`; what of a row fills no patch is left out."""
        lines, columns = self.lines(tuple(tensor.shape))
        size = math.prod(self.shape)
        return tensor.reshape(lines, columns)[:, : columns // size * size].reshape(-1, *self.shape)

    def count(self, tensor_shape: tuple[int, ...]) -> int:
        """How many slices a tensor takes; the last patch of a row may be used in part."""
        lines, columns = self.lines(tensor_shape)
        return lines * math.ceil(columns / math.prod(self.shape))

    def join(self, slices: Tensor, tensor_shape: tuple[int, ...]) -> Tensor:
        """A tensor from its `count` slices `[N, *shape]`; the inverse of `cut` where the patches fit."""
        lines, columns = self.lines(tensor_shape)
        return slices.reshape(lines, -1)[:, :columns].reshape(tensor_shape)


def group_key(
    role: Role | str, shape: tuple[int, ...], depth: float, *, patch: int, depth_buckets: int
) -> GroupKey | None:
    """The group of a tensor of `shape` at `depth` (0 to 1), or None for what is no weight of a layer."""
    role = Role(role)
    if role not in MATRIX_ROLES or len(shape) < 2:
        return None
    bucket = min(int(depth * depth_buckets), depth_buckets - 1)
    if role is Role.CONV_WEIGHT and math.prod(shape[2:]) > 1:
        return GroupKey(role.value, tuple(shape[2:]), bucket)
    return GroupKey(Role.MATRIX.value, (1, patch), bucket)


def nearest(key: GroupKey, known: tuple[GroupKey, ...]) -> GroupKey | None:
    """The group of `known` with the role and slice shape of `key` and the nearest depth bucket (the earlier of two)."""
    alike = [group for group in known if (group.role, group.shape) == (key.role, key.shape)]
    return min(alike, key=lambda group: (abs(group.bucket - key.bucket), group.bucket), default=None)
