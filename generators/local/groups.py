"""Weight groups: which slices of which tensors one local generator models, and how tensors are cut and put together.

A slice is one spatial kernel of a convolution: `[h, w]`, or `[k]` or `[d, h, w]` if it has one axis or three. What
mixes channels without looking around (linear layers, attention and recurrent projections, 1x1 convolutions) is a
matrix, cut into row patches: `patch` neighbouring weights of one row, a `[1, patch]` slice. A group is keyed by (role,
slice shape, depth bucket), not by layer index, so that any model is served: a tensor whose own group no generator knows
is drawn from the nearest (`nearest`), whose slices are resized if need be (`generators.local.resize`).
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


def _stretch(key: GroupKey, group: GroupKey) -> float:
    """By how much the axis that differs most is longer or shorter: 1 if none is, infinite if there is no way."""
    if key.role != group.role or len(key.shape) != len(group.shape):
        return math.inf
    pairs = list(zip(key.shape, group.shape, strict=True))
    if any((wanted == 1) != (size == 1) for wanted, size in pairs):
        return math.inf
    return max(max(wanted / size, size / wanted) for wanted, size in pairs)


def nearest(key: GroupKey, known: tuple[GroupKey, ...], *, most_stretch: float = 1.0) -> GroupKey | None:
    """The group whose slices serve `key`, or None: the least stretched one, then that at the nearest depth.

    A group serves if it has the role of `key` and slices of as many axes, of which each is at most `most_stretch` times
    longer or shorter. An axis of one weight is never stretched, nor are row patches. Of two depths that are equally
    near, it is the earlier one.
    """
    most_stretch = 1.0 if key.patches else most_stretch
    able = [group for group in known if _stretch(key, group) <= most_stretch]
    return min(able, key=lambda group: (_stretch(key, group), abs(group.bucket - key.bucket), group), default=None)


def explained(key: GroupKey, found: GroupKey) -> str:
    """How the group that was `found` for `key` serves it, for reports."""
    if found == key:
        return str(found)
    if found.shape == key.shape:
        return f"{found}, the nearest in depth to {key}"
    return f"{found}, resized to {key.slices}: the nearest in size to {key}"
