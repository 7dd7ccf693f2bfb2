"""Slices where they lie: read from memory-mapped files, in shuffled batches that depend on seed and step only.

Nothing is copied out of the files but what is asked for. Batches come from windows of a few megabytes. A window draws
strips of neighbouring slices of one tensor: every slice is as likely a first one as any other of its tensor, and a
strip that reaches the end goes on at the beginning. A batch holds one slice of each of its strips, the first batches of
a window the first ones, so the slices of a batch are independent draws. Neighbours are met in later batches only, and
files are read in pieces long enough to be fast.

    slices = groups[key].train
    for step, batch in enumerate(slices.batches(128, seed=0, first=done), start=done): ...
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from collect.flat import MAPS
from generators.errors import ConfigError, ZooError
from generators.local.groups import GroupKey
from generators.seeds import derive, stream

T = TypeVar("T")

STRIP = 256  # slices of a strip at most; shorter ones mix better and take longer to read
WINDOW = 1 << 22  # bytes of a window at most, or of a single batch if that is larger
RAM_LIMIT = 1 << 28  # bytes of the slices of one group that are held in RAM at most, unless told otherwise


def strongest(norms: np.ndarray, fraction: float) -> np.ndarray:
    """Which slices stay when `floor(fraction N)` of the smallest norm go: ascending int32 places in `norms` `[N]`.

    Of slices of equal norm the first goes first.
    """
    return np.sort(np.argsort(norms, kind="stable")[math.floor(fraction * len(norms)) :]).astype(np.int32)


@dataclass(frozen=True, eq=False)
class TensorStack:
    """One tensor of K networks that share a file.

    Attributes:
        values: gives the mapped file, [rows, numbers], of any float type.
        networks: K names.
        rows: the row of each network in the file.
        name: of the tensor.
        shape: of the tensor.
        offset: where it begins in a row.
        depth: of its layer, 0 (input) to 1 (output).
        fan_in: numbers that make one output; NaN if it is not known.
        key: the group that cuts it into N slices of d numbers.
        pruned: share of its slices that are left out, those of the smallest norm.
        kept: the places of the others, int32 [K, N - floor(pruned N)], in RAM; None if all are kept.
        powers: mean square of the whole tensors, [K].
        scales: what slices are multiplied by, float32 [K]: one over the root mean square of those that are kept.
    """

    values: Callable[[], np.ndarray]
    networks: tuple[str, ...]
    rows: tuple[int, ...]
    name: str
    shape: tuple[int, ...]
    offset: int
    depth: float
    fan_in: float
    key: GroupKey
    pruned: float = 0.0
    kept: np.ndarray | None = None
    powers: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()

    @cached_property
    def size(self) -> int:
        """Numbers of a slice: d."""
        return math.prod(self.key.shape)

    @cached_property
    def count(self) -> int:
        """Slices of one network that are kept."""
        return self._all if self.kept is None else self.kept.shape[1]

    @cached_property
    def _all(self) -> int:
        lines, columns = self.key.lines(self.shape)
        return lines * (columns // self.size)

    def reader(self) -> Callable[[np.ndarray, int, int], None]:
        """A function of (out, index, start): it fills `out` [n, d] with kept slices of network `index` from `start` on.

        What is the same for every call is done once, here.
        """
        rows, kept, size = self.rows, self.kept, self.size
        count, columns = self.key.lines(self.shape)
        fit = columns // size
        numbers = self.values()[:, self.offset : self.offset + count * columns]
        if columns % size:  # the rest of a line fills no slice
            lines = numbers.reshape(-1, count, columns)[..., : fit * size].reshape(-1, count, fit, size)

            def by_line(out: np.ndarray, index: int, start: int) -> None:
                stop = start + len(out)
                places = np.arange(start, stop) if kept is None else kept[index, start:stop]
                line = int(places[0]) // fit
                near = lines[rows[index], line : int(places[-1]) // fit + 1].reshape(-1, size)
                out[:] = near.take(places - line * fit, axis=0)

            return by_line
        slices = numbers.reshape(-1, count * fit, size)

        def neighbours(out: np.ndarray, index: int, start: int) -> None:
            out[:] = slices[rows[index], start : start + len(out)]

        if kept is None:
            return neighbours

        def chosen(out: np.ndarray, index: int, start: int) -> None:
            places = kept[index, start : start + len(out)]
            if slices.dtype == out.dtype:
                slices[rows[index]].take(places, 0, out, "clip")  # nothing to clip; other modes work on a copy of `out`
            else:
                out[:] = slices[rows[index]].take(places, axis=0)

        return chosen

    def stored(self, index: int, start: int, stop: int) -> np.ndarray:
        """Kept slices `start` to `stop` of network `index` as they are stored, [stop - start, d]."""
        found = np.empty((stop - start, self.size), self.values().dtype)
        self.reader()(found, index, start)
        return found

    def measured(self, pruned: float) -> TensorStack:
        """The stack with `pruned`, `kept`, `powers` and `scales`; reads every number once."""
        powers, scales, kept = [], [], []
        whole = replace(self, kept=None)
        for index, row in enumerate(self.rows):
            numbers = self.values()[row, self.offset : self.offset + math.prod(self.shape)]
            powers.append(float(np.square(numbers, dtype=np.float64).mean()))
            squares = np.square(whole.stored(index, 0, self._all), dtype=np.float64)
            if pruned:
                kept.append(strongest(squares.sum(1), pruned))
                squares = squares[kept[-1]]
            power = float(squares.mean())
            scales.append(float(np.float32(power**-0.5)) if 0 < power < math.inf else 0.0)
        return replace(
            self, pruned=pruned, kept=np.stack(kept) if kept else None, powers=tuple(powers), scales=tuple(scales)
        )

    def of(self, indices: Sequence[int]) -> TensorStack:
        """The same of some of the networks."""
        chosen = list(indices)

        def some(values: tuple[T, ...]) -> tuple[T, ...]:
            return tuple(values[index] for index in chosen)

        return replace(
            self, networks=some(self.networks), rows=some(self.rows), powers=some(self.powers),
            scales=some(self.scales), kept=None if self.kept is None else self.kept[chosen],
        )  # fmt: skip


@dataclass(frozen=True)
class TensorSlices:
    """The slices [N, h, w] of one tensor of one network, of unit second moment."""

    network: str
    name: str
    shape: tuple[int, ...]
    depth: float
    slices: Tensor


class Slices:
    """The slices of one weight group in some networks, each tensor divided by its root mean square.

    Args:
        key: the group.
        stacks: where its tensors lie; with slices, and measured.
        per_tensor: a tensor with more slices counts as one of so many, lest wide layers outweigh the others.
        ram_limit: bytes of slices that `in_ram` gives at most.
    """

    def __init__(
        self, key: GroupKey, stacks: Sequence[TensorStack], *, per_tensor: int, ram_limit: int = RAM_LIMIT
    ) -> None:
        self.key, self.stacks, self.per_tensor, self.ram_limit = key, tuple(stacks), per_tensor, ram_limit
        networks = np.array([len(stack.rows) for stack in stacks], dtype=np.int64)
        self._counts = np.array([stack.count for stack in stacks], dtype=np.int64)
        self._weights = self._counts.clip(max=per_tensor)  # of one network's tensor
        self._ends = np.cumsum(self._weights * networks)
        self._begins = self._ends - self._weights * networks
        self._firsts = np.cumsum(networks) - networks
        self._scales = np.array([scale for stack in stacks for scale in stack.scales], dtype=np.float32)

    def __len__(self) -> int:
        """Slices that count."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def __repr__(self) -> str:
        return f"Slices({self.key}: {len(self)} of {len(self.networks)} networks)"

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that they are of, sorted."""
        return tuple(sorted({network for stack in self.stacks for network in stack.networks}))

    def of(self, networks: Sequence[str]) -> Slices:
        """The slices of some of the networks."""
        wanted = set(networks)
        chosen = [(stack, [i for i, name in enumerate(stack.networks) if name in wanted]) for stack in self.stacks]
        return self._with([stack.of(each) for stack, each in chosen if each])

    def _with(self, stacks: Sequence[TensorStack]) -> Slices:
        return Slices(self.key, stacks, per_tensor=self.per_tensor, ram_limit=self.ram_limit)

    def halves(self) -> tuple[Slices, Slices]:
        """The slices of one half of the networks, and of the other; the first has one more if their number is odd."""
        mixed = sorted(self.networks, key=lambda network: derive(0, "halves", network))
        return self.of(mixed[::2]), self.of(mixed[1::2])

    def pruned(self, fraction: float) -> Slices:
        """Without the `fraction` of the slices of every tensor that have the smallest norms, rounded down.

        The fraction is one of the slices that the tensor had at first, so doing it again changes nothing, and of two
        fractions the larger holds. What is left of a tensor has unit second moment again.

        Raises:
            ConfigError: the fraction is not in [0, 1).
        """
        check_fraction(fraction)
        return self._with([each if fraction <= each.pruned else each.measured(fraction) for each in self.stacks])

    def tensors(self, *, seed: int = 0) -> Iterator[TensorSlices]:
        """Every tensor of every network, with at most `per_tensor` of its slices, which `seed` chooses."""
        for stack in self.stacks:
            for index, network in enumerate(stack.networks):
                slices = torch.from_numpy(stack.stored(index, 0, stack.count).astype(np.float32))
                if len(slices) > self.per_tensor:
                    order = torch.randperm(len(slices), generator=stream(seed, "slices", network, stack.name))
                    slices = slices[order[: self.per_tensor]]
                slices = (slices * stack.scales[index]).reshape(-1, *self.key.shape)
                yield TensorSlices(network, stack.name, stack.shape, stack.depth, slices)

    def in_ram(self, *, seed: int = 0) -> Tensor:
        """All slices, `[len(self), *shape]`, or a random share of them, in strips, if they take more than `ram_limit`.

        A share takes at most `ram_limit` bytes, or is a single strip.
        """
        size = 4 * math.prod(self.key.shape)
        if len(self) * size <= self.ram_limit:
            found = [tensor.slices for tensor in self.tensors(seed=seed)]
            return torch.cat(found) if found else torch.empty(0, *self.key.shape)
        strips = max(self.ram_limit // (STRIP * size), 1)
        return self._window(strips, STRIP, stream(seed, "share", str(self.key))).reshape(-1, *self.key.shape)

    def batches(self, size: int, *, seed: int, first: int = 0) -> Iterator[Tensor]:
        """Batches `[size, *shape]` of random slices for the steps `first`, `first + 1`, ..., without end.

        The batch of a step depends on seed, group and step only (and on the slices there are).

        Raises:
            ZooError: there are no slices.
        """
        if not len(self):
            raise ZooError(f"weight group {self.key} has no slices on this side of the split; collect more networks")
        most = max(WINDOW // (size * 4 * math.prod(self.key.shape)), 1)  # batches
        length = min(most, STRIP)
        wide = most // length
        number, skip = divmod(first, length * wide)
        while True:
            window = self._window(size * wide, length, stream(seed, "window", str(self.key), number))
            yield from window.reshape(-1, size, *self.key.shape)[skip:].unbind()
            number, skip = number + 1, 0

    def _window(self, strips: int, length: int, draws: torch.Generator) -> Tensor:
        """Strips of `length` slices, [length, strips, d]: the first slices of all, the second ones, and so on."""
        which, starts = torch.randint(2**62, (2, strips), generator=draws).numpy()  # remainders of such are even enough
        which %= len(self)
        found = np.searchsorted(self._ends, which, side="right")
        indices = (which - self._begins[found]) // self._weights[found]
        starts %= self._counts[found]
        window = torch.empty(strips, length, math.prod(self.key.shape))
        reader = functools.lru_cache(maxsize=MAPS)(lambda number: self.stacks[number].reader())
        facts = (each.tolist() for each in (found, indices, starts, self._counts[found]))
        for strip, number, index, start, count in zip(window.numpy(), *facts, strict=True):
            read = reader(number)
            while start + len(strip) > count:  # on from the beginning
                read(strip[: count - start], index, start)
                strip, start = strip[count - start :], 0
            read(strip, index, start)
        window *= torch.from_numpy(self._scales[self._firsts[found] + indices])[:, None, None]
        return window.transpose(0, 1).contiguous()


def check_fraction(fraction: float) -> None:
    """Raise `ConfigError` unless such a share of all slices can be pruned."""
    if not 0 <= fraction < 1:
        raise ConfigError(f"the share of slices to prune must be in [0, 1), got {fraction}")
