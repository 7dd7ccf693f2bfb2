"""Reading a zoo: columns of runs, views by condition, weights as memory maps.

    zoo = Zoo("zoo")
    good = zoo.where(architecture="resnet-8-w8", status="ok", split="train")
    good.column("test_accuracy"), good.state_dict(0), good.populations[0].weights

Opening reads the index of the zoo (`collect.index`) and the small parts of files that are not in it yet. Weights are
mapped when they are asked for and read by the page, so a zoo may be larger than the memory. A `Zoo` holds paths and
small arrays only; it can be pickled to loader processes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from collect import index, packed, zoo_file
from collect.conditions import select
from collect.flat import Flat, matching
from collect.header import Header
from collect.population import TensorSpec
from collect.runs import Runs
from collect.split import split_of
from collect.view import PopulationView
from generators.errors import ConfigError, ZooError

log = logging.getLogger(__name__)


def scan(folder: str | Path, *, verify: bool = False) -> tuple[list[Header], dict[Path, ZooError]]:
    """The usable populations of a folder or of a packed zoo, and the others, each with its fault; sorted by name.

    Raises:
        ZooError: there is no such folder, or a file that is no packed zoo.
    """
    if Path(folder).is_file():
        return packed.read(folder, verify=verify)
    if not Path(folder).is_dir():
        how = f"pack FOLDER {folder}" if Path(folder).suffix == zoo_file.SUFFIX else f"run --out {folder} ..."
        raise ZooError(f"there is no zoo at {folder}; make one with `python -m collect {how}`")
    read = zoo_file.verify if verify else zoo_file.read_header
    good, bad = [], {}
    for path in sorted(Path(folder).glob(f"*{zoo_file.SUFFIX}")):
        try:
            good.append(read(path))
        except ZooError as error:
            bad[path] = error
    return good, bad


class Zoo:
    """A folder of population files, one packed file of them, or a view on some of its runs (`where`).

    Args:
        folder: the zoo: a folder, or a file that `python -m collect pack` made.
        verify: compare every byte with its digest (the deep check) instead of opening and checking shapes only.

    Attributes:
        runs: one dict per run, made when it is asked for (`collect.runs.Runs`): id, population, row, seed, status,
            split, every field of the recipe (architecture, init, lr, ...), family, depth and width of the architecture,
            and the last value of every metric under the metric's name (test_accuracy, ...).
        bad: file -> why it cannot be used. Bad files are neither used nor deleted.
        repeated: how many runs were found a second time, in another population; each run counts once.

    Raises:
        ZooError: no such folder or packed file, or no usable population in it.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        if verify or not self.folder.is_dir():
            headers, self.bad = scan(self.folder, verify=verify)
            found = index.of(headers, self.folder)
        else:
            found, self.bad = index.open_index(self.folder)
        for error in self.bad.values():
            log.warning("not used: %s", error)
        if found is None:
            reasons = "".join(f"; {error}" for error in self.bad.values())
            raise ZooError(f"no usable population in {folder}; make some with `python -m collect run`{reasons}")
        self._index = replace(found, runs=Runs({}))  # a view holds its own runs and no others
        self.runs: Runs = found.once()
        self.repeated = len(found.runs) - len(self.runs)
        if self.repeated:
            log.info("%d runs of %s are in two populations; each counts once", self.repeated, folder)

    def __len__(self) -> int:
        return len(self.runs)

    def __repr__(self) -> str:
        return f"Zoo({str(self.folder)!r}: {len(self.runs)} runs, {len(self._starts)} populations)"

    @staticmethod
    def split_of(run: str) -> str:
        """See `collect.split.split_of`."""
        return split_of(run)

    def where(self, **conditions: Any) -> Zoo:
        """The runs for which every condition holds, as a view on the same files.

        Args:
            conditions: column = value; column = a list, tuple, set or range of values of which one must be met; or a
                comparison by suffix (`collect.conditions.COMPARISONS`), such as
                `where(status="ok", lr__le=0.1, validation_accuracy__gt=0.9, architecture__startswith="resnet")`. Some
                columns have short names (`collect.runs.ALIASES`): `where(arch="resnet-8-w8", val_acc__gt=0.9)`.

        Raises:
            UnknownNameError: no such column or no such comparison.
            ConfigError: a value that cannot be compared with the column's.
        """
        view = copy.copy(self)
        view.runs = select(self.runs, conditions)
        return view

    def column(self, name: str) -> np.ndarray:
        """One column over all runs, [number of runs]; numbers that a run does not have are NaN.

        Raises:
            UnknownNameError: no such column.
        """
        return self.runs.column(name)

    @property
    def _numbers(self) -> np.ndarray:
        """The number of the population of every run; they ascend."""
        return index.numbers(self.runs)

    @property
    def _starts(self) -> np.ndarray:
        """The first run of every population that has one."""
        return np.flatnonzero(np.diff(self._numbers, prepend=-1))

    @property
    def populations(self) -> list[PopulationView]:
        """The populations that have a chosen run, each with its chosen runs."""
        starts = self._starts
        rows = np.split(self.runs.column("row"), starts[1:])
        places = (self._index.place(number, self.folder) for number in self._numbers[starts].tolist())
        return [PopulationView(place, tuple(each.tolist())) for place, each in zip(places, rows, strict=False)]

    def _view(self, run: int) -> PopulationView:
        if not -len(self) <= run < len(self):
            raise IndexError(f"no run {run}: {self} counts from 0")
        one = self.runs.take(np.array([run]))
        return PopulationView(self._index.place(index.numbers(one).item(), self.folder), (one.column("row").item(),))

    def state_dict(self, index: int, *, checkpoint: int = -1) -> dict[str, Tensor]:
        """Weights and buffers of one run by name.

        Raises:
            IndexError: no such run or checkpoint.
        """
        return {name: value[0] for name, value in self._view(index).states(checkpoint).items()}

    def module(self, index: int, *, checkpoint: int = -1) -> nn.Module:
        """One run as a module in evaluation mode; raises what `state_dict` raises."""
        module = self._view(index).build()
        module.load_state_dict(self.state_dict(index, checkpoint=checkpoint))
        return module.eval()

    def flat(
        self,
        *,
        role: str | None = None,
        kernel: tuple[int, ...] | None = None,
        checkpoint: int = -1,
        labels: Sequence[str] = (),
    ) -> Flat:
        """The runs as rows of numbers, a data set for `torch.utils.data.DataLoader`; row i belongs to `runs[i]`.

        All runs must agree in the chosen tensors (name, shape and place), so that a column means one weight. Where they
        do not, narrow the view with `where(architecture=...)`, or go tensor by tensor with `tensors`.

        Args:
            role, kernel: only these tensors, as in `tensors`; all weights if neither is given.
            checkpoint: index of the checkpoint.
            labels: columns of numbers that come with every row, such as `("test_accuracy", "lr")`: items are then pairs
                of a row and its labels, float32 [len(labels)].

        Raises:
            UnknownNameError: no such role or column.
            ConfigError: no runs, no such tensors or checkpoint, runs of several layouts, or a label that is text.
        """
        values = self._labels(labels) if labels else None
        return Flat(self.populations, role=role, kernel=kernel, checkpoint=checkpoint, labels=values)

    def _labels(self, names: Sequence[str]) -> Tensor:
        """Columns as float32 [runs, len(names)]."""
        if isinstance(names, str):
            raise ConfigError(f"labels are several columns, as in ({names!r},), got {names!r}")
        columns = [self.column(name) for name in names]
        for name, column in zip(names, columns, strict=True):
            if column.dtype.kind not in "bif":
                raise ConfigError(f"labels: {name!r} is text, a label is a number; columns of text are in Zoo.column")
        return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))

    def matrix(
        self, *, role: str | None = None, kernel: tuple[int, ...] | None = None, checkpoint: int = -1
    ) -> np.ndarray:
        """The chosen weights of all runs in RAM, float32 [runs, columns]: `flat(...).matrix()`, and raises the same."""
        return self.flat(role=role, kernel=kernel, checkpoint=checkpoint).matrix()

    def tensors(
        self, *, role: str | None = None, kernel: tuple[int, ...] | None = None, checkpoint: int = -1
    ) -> Iterator[tuple[str, str, TensorSpec, float, np.ndarray]]:
        """Every weight tensor of every run.

        Args:
            role: only tensors with this role (`generators.inventory.Role`), such as "conv_weight".
            kernel: only tensors with these spatial axes, such as (3, 3).
            checkpoint: index of the checkpoint.

        Yields:
            run id; architecture; spec (name, role, shape, ...); depth of the owning module from 0 (input) to 1
            (output), as in the inventory; the values, float32 of the spec's shape, as a view on the memory map.

        Raises:
            UnknownNameError: no such role.
        """
        ids, architectures = iter(self.column("id").tolist()), iter(self.column("architecture").tolist())
        for population in self.populations:
            places = dict(zip(population.layout, depths(population.layout), strict=True))
            chosen = [(spec, places[spec]) for spec in matching(population.layout, role=role, kernel=kernel)]
            for values, run, architecture in zip(population.state(checkpoint), ids, architectures, strict=False):
                for spec, depth in chosen:
                    tensor = values[spec.offset : spec.offset + spec.length].reshape(spec.shape)
                    yield run, architecture, spec, depth, tensor


def depths(layout: tuple[TensorSpec, ...]) -> list[float]:
    """Position of the owner of every tensor among all owners, 0 to 1, as `generators.inventory` counts it."""
    owners = [spec.name.rpartition(".")[0] for spec in layout]
    order = {owner: index for index, owner in enumerate(dict.fromkeys(owners))}
    return [order[owner] / max(len(order) - 1, 1) for owner in owners]
