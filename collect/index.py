"""The index of a zoo: what its population files say of their runs and where their arrays lie, in one small file.

Opening a zoo of a million runs file by file takes minutes; its index takes less than a second. It is made from the
files and never trusted against them: a file whose size or time of change is another, or that is new, is read; one that
is gone drops out; damaged files are not in it. Losing it costs the time to make it anew.

    index.npz   arrays `runs/...` (columns, one value per run), `populations/...` (one value per file), `repeated`, and
                `texts`, JSON: for what version of this module, distinct layouts, and the values of coded columns

Nothing in it is pickled. It is renamed into place, so that readers at the same time do no harm, and a folder that
cannot be written is read without it.
"""

from __future__ import annotations

import json
import logging
import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from collect import zoo_file
from collect.durable import durable
from collect.header import DEFAULTS, Block, Header, Place
from collect.population import TensorSpec
from collect.runs import Coded, Column, Runs, join
from collect.split import SPLITS, split_of
from collect.tables import plain
from generators.errors import ZooError

log = logging.getLogger(__name__)

NAME = "index.npz"
VERSION = 3
ENTRY = ("id", "file", "size", "mtime_ns", "digest", "weights", "buffers", "trajectory", "runs", "checkpoints", "early",
         "layout", "buffer_layout", "seconds")  # fmt: skip
MADE_FOR = json.loads(json.dumps([VERSION, SPLITS, DEFAULTS]))  # an index that was made for another is made anew
FAULTS = (*zoo_file.FAULTS, EOFError, zipfile.BadZipFile, zlib.error)  # of an index that is not as it should be

Layout = tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Index:
    """All runs of some populations, and where these lie.

    Attributes:
        runs: the columns id, population, row, seed, status, split, every field of the recipe, family, depth and width
            of the architecture, and the last value of every metric; the codes of `population` are numbers of
            populations.
        populations: arrays [number of populations] named by `ENTRY`: the id, the file's name, size and mtime_ns, the
            digest, where weights, buffers and trajectory start, how many runs, checkpoints and float16 checkpoints
            there are, the numbers of its layouts, and the seconds of its training.
        layouts: the distinct layouts.
        repeated: places of the runs that are in an earlier population too: collected twice, in files of other sizes.
    """

    runs: Runs
    populations: dict[str, np.ndarray]
    layouts: tuple[Layout, ...]
    repeated: np.ndarray

    def __len__(self) -> int:
        return len(self.populations["file"])

    def once(self) -> Runs:
        """The runs without the repeated ones."""
        return self.runs.take(np.delete(np.arange(len(self.runs)), self.repeated)) if len(self.repeated) else self.runs

    def entries(self, name: str) -> dict[str, Any]:
        """Id of every population -> its value of `populations[name]`."""
        ids = np.char.decode(self.populations["id"]).tolist()
        return dict(zip(ids, self.populations[name].tolist(), strict=True))

    def place(self, number: int, root: Path) -> Place:
        """Where a population lies: a file of the folder `root`, or a group of the packed zoo `root`."""
        entry = {name: column[number].item() for name, column in self.populations.items()}
        layout, buffer_layout = self.layouts[entry["layout"]], self.layouts[entry["buffer_layout"]]
        runs, checkpoints, early = entry["runs"], entry["checkpoints"], entry["early"]
        weights, buffers = (sum(spec.length for spec in each) for each in (layout, buffer_layout))
        return Place(
            path=root / entry["file"].decode(),
            id=entry["id"].decode(),
            digest=entry["digest"].decode(),
            layout=layout,
            buffer_layout=buffer_layout,
            weights=Block(entry["weights"], (runs, checkpoints - early, weights)),
            buffers=Block(entry["buffers"], (runs, checkpoints, buffers)),
            trajectory=Block(entry["trajectory"], (runs, early, weights), "<f2"),
        )


def _ids(runs: Runs) -> Coded:
    ids = runs.columns["population"]
    assert isinstance(ids, Coded)
    return ids


def numbers(runs: Runs) -> np.ndarray:
    """The number in the index of the population of every run, [number of runs]."""
    return _ids(runs).codes.astype(np.int64)


# --- making ------------------------------------------------------------------------------------------------------


def _index(runs: Runs, populations: dict[str, np.ndarray], layouts: tuple[Layout, ...]) -> Index:
    _, first = np.unique(np.asarray(runs.columns["id"]), return_index=True)
    return Index(runs, populations, layouts, np.delete(np.arange(len(runs)), first))


def _coded(column: np.ndarray) -> Coded:
    coded = Coded.of(column.tolist())
    return replace(coded, values=tuple(map(plain, coded.values)))


def _entry(header: Header, *, file: str = "", size: int = 0, mtime_ns: int = 0) -> Index:
    """The index of one population."""
    runs, table = len(header.table), header.table
    ids = [plain(run) for run in table["id"].tolist()]
    factors = {name: _coded(table[name]) for name in table.dtype.names or () if name not in ("id", "seed")}
    defaults = {name: Coded.of([value]) for name, value in DEFAULTS.items() if name not in factors}
    older = {name: column[np.zeros(runs, dtype=int)] for name, column in defaults.items()}  # fields came later
    architecture = json.loads(header.architecture_json)
    columns: dict[str, Column] = {
        "id": np.array(ids, dtype=np.bytes_),
        "population": Coded.of([header.id] * runs),
        "row": np.arange(runs, dtype=np.int32),
        "split": Coded.of([split_of(run) for run in ids]),
        "seed": table["seed"].copy(),
        **factors,
        **older,
        **{name: Coded.of([architecture[name]] * runs) for name in ("family", "depth", "width")},
        **dict(zip(header.metric_names, header.metrics[:, -1].T.copy(), strict=True)),
    }
    populations = {
        "id": header.id.encode(),
        "file": file.encode(),
        "size": size,
        "mtime_ns": mtime_ns,
        "digest": header.digest.encode(),
        "weights": header.weights.offset,
        "buffers": header.buffers.offset,
        "trajectory": header.trajectory.offset,
        "runs": runs,
        "checkpoints": header.checkpoints,
        "early": header.trajectory.shape[1],
        "layout": 0,
        "buffer_layout": 1,
        "seconds": float(header.attributes["seconds"]),
    }
    arrays = {name: np.array([value]) for name, value in populations.items()}
    return _index(Runs(columns), arrays, (header.layout, header.buffer_layout))


def _joined(parts: Sequence[Index]) -> Index:
    """The populations of all parts, one after the other; none is in two."""
    known: dict[Layout, int] = {}
    populations = []
    for part in parts:
        mapped = np.array([known.setdefault(layout, len(known)) for layout in part.layouts])
        layouts = {name: mapped[part.populations[name]] for name in ("layout", "buffer_layout")}
        populations.append(part.populations | layouts)
    arrays = {name: np.concatenate([each[name] for each in populations]) for name in populations[0]}
    return _index(join([part.runs for part in parts]), arrays, tuple(known))


def _chosen(index: Index, chosen: np.ndarray) -> Index:
    """The populations with the numbers `chosen`, in this order."""
    place = np.full(len(index), len(index))
    place[chosen] = np.arange(len(chosen))
    new = place[numbers(index.runs)]
    runs, ids = index.runs.take(np.argsort(new, kind="stable")[: int((new < len(index)).sum())]), _ids(index.runs)
    codes = place[numbers(runs)].astype(np.min_scalar_type(len(chosen)))
    runs.columns["population"] = Coded(codes, tuple(ids.values[number] for number in chosen.tolist()))
    return _index(runs, {name: each[chosen] for name, each in index.populations.items()}, index.layouts)


def of(headers: Iterable[Header], root: Path) -> Index | None:
    """The index of populations of `root` that somebody has read, in their order, not to be stored; None if of none."""
    parts = [_entry(header, file="" if header.path == root else header.path.name) for header in headers]
    return _joined(parts) if parts else None


# --- reading and writing -----------------------------------------------------------------------------------------


def save(index: Index, path: Path) -> None:
    """Write the index.

    Raises:
        ZooError: the folder cannot be written.
    """
    arrays = {f"populations/{name}": index.populations[name] for name in ENTRY}
    values = {}
    for name, column in index.runs.columns.items():
        arrays[f"runs/{name}"] = column.codes if isinstance(column, Coded) else column
        values[name] = column.values if isinstance(column, Coded) else None
    layouts = [[list(vars(spec).values()) for spec in layout] for layout in index.layouts]
    texts = json.dumps({"made_for": MADE_FOR, "layouts": layouts, "values": values})
    arrays |= {"texts": np.frombuffer(texts.encode(), np.uint8), "repeated": index.repeated}
    with durable(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load(path: Path) -> Index | None:
    """The index at `path`; None if there is none, or it is damaged, or of another version."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            texts = json.loads(file["texts"].tobytes())
            if texts["made_for"] != MADE_FOR:
                log.debug("%s was made for another version and is made anew", path)
                return None
            columns: dict[str, Column] = {}
            for name, values in texts["values"].items():
                array = file[f"runs/{name}"]
                columns[name] = array if values is None else Coded(array, tuple(values))
            populations = {name: file[f"populations/{name}"] for name in ENTRY}
            repeated = file["repeated"]
        layouts = tuple(tuple(_spec(*spec) for spec in layout) for layout in texts["layouts"])
    except FileNotFoundError:
        return None
    except FAULTS as error:
        log.debug("%s is damaged (%s) and is made anew", path, error)
        return None
    return Index(Runs(columns), populations, layouts, repeated)


def _spec(*values: Any) -> TensorSpec:
    spec = TensorSpec(**dict(zip((field.name for field in fields(TensorSpec)), values, strict=True)))
    return replace(spec, shape=tuple(spec.shape))


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Name -> size and mtime_ns of every population file; (-1, -1) if it cannot be read, or is a link to nothing."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(zoo_file.SUFFIX):
                found[entry.name] = (-1, -1)
                if os.access(entry, os.R_OK):
                    with suppress(OSError):  # it has just been deleted
                        status = entry.stat()
                        found[entry.name] = (status.st_size, status.st_mtime_ns)
    return found


def look(folder: Path) -> tuple[Index | None, dict[Path, ZooError], bool]:
    """The index of what is in `folder` now, and its bad files; nothing is written.

    Returns:
        None if no file is usable; file -> why it cannot be used, sorted by name; whether the index should be kept, for
        the stored one is another.
    """
    listing, stored = _listing(folder), load(folder / NAME)
    parts: list[Index] = []
    known: set[str] = set()
    if stored is not None:
        rows = zip(*(stored.populations[name].tolist() for name in ("file", "size", "mtime_ns")), strict=True)
        same = np.array([listing.get(file.decode()) == (size, mtime) for file, size, mtime in rows], dtype=bool)
        if same.all() and len(same) == len(listing):
            return stored, {}, False
        if same.any():
            parts.append(_chosen(stored, np.flatnonzero(same)))
            known = {file.decode() for file in parts[0].populations["file"].tolist()}
    bad: dict[Path, ZooError] = {}
    for name, (size, mtime_ns) in sorted(listing.items()):
        if name not in known:
            try:
                parts.append(_entry(zoo_file.read_header(folder / name), file=name, size=size, mtime_ns=mtime_ns))
            except ZooError as error:
                bad[folder / name] = error
    if not parts:
        return None, bad, False
    if len(parts) == 1 and known and stored is not None and len(known) == len(stored):
        return stored, bad, False  # but for bad files, nothing is new
    index = _joined(parts)
    return _chosen(index, np.argsort(index.populations["file"], kind="stable")), bad, True


def keep(index: Index, folder: Path) -> None:
    """Store the index of `folder`, unless it cannot be written."""
    try:
        save(index, folder / NAME)
    except ZooError as error:
        log.debug("the index is not kept: %s", error)


def open_index(folder: Path) -> tuple[Index | None, dict[Path, ZooError]]:
    """The index of what is in `folder` now, None if no file is usable, and its bad files, each with its fault, sorted
    by name; the stored index is renewed.
    """
    index, bad, new = look(folder)
    if index is not None and new:
        keep(index, folder)
    return index, bad
