"""Runs as rows of numbers: the weights of one layout, in RAM, mapped, or by shuffled blocks.

    flat = zoo.where(architecture="resnet-8-w8", status="ok").flat(role="conv_weight", kernel=(3, 3))
    flat.matrix()                                      # RAM: float32 [runs, columns]
    flat.batch([7, 1, 5])                              # mapped: random rows, read by the page
    for indices, rows in flat.blocks(256, generator): ...     # block shuffle: whole populations, one after the other
    DataLoader(flat, batch_size=256, shuffle=True, num_workers=2)
    zoo.flat(labels=("test_accuracy", "lr"))           # items are (row, labels)

All three ways give the same rows. Mapped access is the fastest in random order once the files are in the page cache;
block shuffle reads each file once from start to end, which is what slow disks want.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from collect.packed import group_of
from collect.population import TensorSpec
from generators.errors import ConfigError, unknown_name
from generators.inventory import Role

if TYPE_CHECKING:
    from collect.view import PopulationView

MAPS = 256  # files that one process keeps mapped; each holds a file descriptor
BLOCK = 4096  # runs that a block shuffle holds in RAM


def matching(
    layout: Sequence[TensorSpec], *, role: str | None = None, kernel: tuple[int, ...] | None = None
) -> list[TensorSpec]:
    """The tensors of a layout with this role and these spatial axes; None stands for any.

    Raises:
        UnknownNameError: there is no such role.
        ConfigError: `kernel` is no tuple.
    """
    if kernel is not None and not isinstance(kernel, tuple | list):
        raise ConfigError(f"kernel has one number per spatial axis, as in (3, 3), got {kernel!r}")
    if role is not None and role not in {each.value for each in Role}:
        raise unknown_name("role", role, [each.value for each in Role])
    return [
        spec
        for spec in layout
        if role in (None, spec.role) and (kernel is None or tuple(spec.shape[2:]) == tuple(kernel))
    ]


def _spans(specs: Sequence[TensorSpec]) -> list[tuple[int, int]]:
    """Where the tensors lie in a row: (start, end), neighbours joined."""
    spans: list[tuple[int, int]] = []
    for spec in specs:
        if spans and spans[-1][1] == spec.offset:
            spans[-1] = (spans[-1][0], spec.offset + spec.length)
        else:
            spans.append((spec.offset, spec.offset + spec.length))
    return spans


class Flat(Dataset):
    """The weights of runs of one layout as rows, a map-style data set; row i belongs to run i of the zoo or view.

    Holds paths and small arrays; files are mapped on first use in each process, so it can be sent to loader workers.

    Args:
        populations: of the view, in its order.
        role, kernel: only tensors with this role and these spatial axes, as for `Zoo.tensors`.
        checkpoint: index of the checkpoint.
        labels: float32 [runs, L], what is to be known of each run; items are then pairs (row, labels of the run).

    Attributes:
        layout: what lies where in a row: offsets count from the start of the row.
        columns: how many numbers a row has.
        labels: as given.

    Raises:
        UnknownNameError: no such role.
        ConfigError: no runs, no such tensors or checkpoint, or runs whose chosen tensors differ.
    """

    def __init__(
        self,
        populations: Sequence[PopulationView],
        *,
        role: str | None = None,
        kernel: tuple[int, ...] | None = None,
        checkpoint: int = -1,
        labels: Tensor | None = None,
    ) -> None:
        if not populations:
            raise ConfigError("flat: no run was chosen, so there is no layout; loosen the conditions of `where`")
        places = [population.place for population in populations]
        chosen = matching(places[0].layout, role=role, kernel=kernel)
        if not chosen:
            kinds = sorted({f"{spec.role} {list(spec.shape)}" for spec in places[0].layout})
            raise ConfigError(
                f"flat: {populations[0].recipe.architecture} has no tensor with role={role!r}, kernel={kernel!r}; it "
                f"has {', '.join(kinds)}"
            )
        for number in {id(place.layout): number for number, place in enumerate(places)}.values():  # few are distinct
            if matching(places[number].layout, role=role, kernel=kernel) != chosen:
                first, other = populations[0].recipe.architecture, populations[number].recipe.architecture
                raise ConfigError(
                    f"flat: the runs have several layouts ({first} and {other} with "
                    f"{places[number].weights.shape[2]} weights); choose one with where(architecture=...), or read "
                    "tensor by tensor with Zoo.tensors"
                )
        for place in places:
            if not -place.checkpoints <= checkpoint < place.checkpoints:
                raise ConfigError(
                    f"flat: no checkpoint {checkpoint}, population {place.id} has {place.checkpoints} of them"
                )
        starts = np.cumsum([0, *(spec.length for spec in chosen)]).tolist()
        self.layout = tuple(
            TensorSpec(spec.name, spec.role, spec.shape, start, spec.length)
            for spec, start in zip(chosen, starts, strict=False)
        )
        self.columns = starts[-1]
        self.labels = labels
        self._spans, self._checkpoint, self._places = _spans(chosen), checkpoint, places
        self._file = np.repeat(np.arange(len(populations)), [len(each) for each in populations])
        self._row = np.concatenate([np.asarray(each.rows, dtype=np.int64) for each in populations])
        self._open()

    def _open(self) -> None:
        self._mapped = functools.lru_cache(maxsize=MAPS)(self._map)

    def _map(self, file: int) -> np.ndarray:
        return np.asarray(self._places[file].state(self._checkpoint))  # not a memmap: rows of a plain array are cheap

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_mapped"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._row)

    def __repr__(self) -> str:
        return f"Flat({len(self)} runs, {self.columns} columns)"

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Rows `indices` (in the range of `len`, or negative from the end) as float32 [len(indices), columns].

        Raises:
            IndexError: a row that is not there.
        """
        out = np.empty((len(indices), self.columns), dtype=np.float32)
        wanted = np.asarray(indices, dtype=np.int64)
        for target, file, row in zip(out, self._file[wanted].tolist(), self._row[wanted].tolist(), strict=True):
            source, start = self._mapped(file)[row], 0
            for begin, end in self._spans:
                target[start : start + end - begin] = source[begin:end]
                start += end - begin
        return torch.from_numpy(out)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor] | list[tuple[Tensor, Tensor]]:
        """One read for a whole batch, as a torch `DataLoader` asks for it."""
        rows = self.batch(indices)
        return list(rows) if self.labels is None else list(zip(rows, self.labels[indices], strict=True))

    def matrix(self) -> np.ndarray:
        """All rows in RAM, float32 [runs, columns], a copy."""
        return self.batch(np.arange(len(self))).numpy()

    def blocks(
        self, size: int, generator: torch.Generator, *, block: int = BLOCK
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Every row once, in batches: populations in random order, at least `block` runs at a time, mixed in RAM.

        Args:
            size: rows per batch; only the last batch is smaller.
            generator: draws the order.
            block: how many runs are mixed; the larger, the closer to a true shuffle.

        Yields:
            indices of the runs, int64 [B] (their labels are `labels[indices]`); their rows, float32 [B, columns].
        """
        if size < 1:
            raise ConfigError(f"blocks: size must be at least 1, got {size}")
        indices = np.empty(0, dtype=np.int64)
        rows = np.empty((0, self.columns), dtype=np.float32)
        order = torch.randperm(len(self._places), generator=generator).tolist()
        members = {file: np.flatnonzero(self._file == file) for file in order}
        for group in _groups(order, members, block):
            indices = np.concatenate([indices, *(members[file] for file in group)])
            rows = np.concatenate([rows, *(self._read(file, members[file]) for file in group)])
            mixed = torch.randperm(len(indices), generator=generator).numpy()
            indices, rows = indices[mixed], rows[mixed]
            whole = len(indices) if group[-1] == order[-1] else len(indices) // size * size
            for begin in range(0, whole, size):
                end = min(begin + size, whole)
                yield indices[begin:end], torch.from_numpy(rows[begin:end])
            indices, rows = indices[whole:], rows[whole:]

    def _read(self, file: int, members: np.ndarray) -> np.ndarray:
        """The rows of one population by plain HDF5, whole file at once."""
        place = self._places[file]
        name, index = place.find(self._checkpoint)
        with h5py.File(place.path, "r", locking=False) as opened:
            weights = group_of(opened, place.id)[name][:, index].astype(np.float32, copy=False)
        return np.concatenate([weights[self._row[members], begin:end] for begin, end in self._spans], axis=1)


def _groups(order: Sequence[int], members: dict[int, np.ndarray], least: int) -> Iterator[list[int]]:
    """`order` cut into groups of files that together have at least `least` runs."""
    group, runs = list[int](), 0
    for file in order:
        group.append(file)
        runs += len(members[file])
        if runs >= least:
            yield group
            group, runs = [], 0
    if group:
        yield group
