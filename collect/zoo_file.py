"""The population file, schemas 1 and 2: one HDF5 file per population, complete and durable once it has its name.

Axes: K runs, C checkpoints, P weights, B buffer entries, E evaluations, M metrics.

    weights            float32 [K, C, P]  contiguous and unfiltered: readers memory-map it by its offset;
                       [K, 1, P], the last checkpoint, where there is a `trajectory`
    trajectory         float16 [K, C-1, P]  likewise; the checkpoints before the last, in files of schema 2 only
    buffers            float32 [K, C, B]  running statistics and the like, never mixed with the weights
    layout             table (name, role, shape, offset, length): where each tensor lies in a row of `weights`
    buffer_layout      the same for `buffers`
    metrics            float32 [K, E, M]  attribute `names` names the last axis; evaluation 0 is before training
    evaluation_epochs  float64 [E];  evaluation_steps int64 [E];  checkpoint_epochs int64 [C]
    runs               table (id, seed, status, every field of the recipe as a typed column)
    architecture       canonical JSON
    attributes         format, schema, population, recipe, data_digest, row_digests, digest, versions, ..., complete

HDF5 files that are appended to do not survive a kill; one that is renamed into place (`collect.durable`) does.
HDF5 1.10 or newer reads the files: their metadata have checksums, the arrays have the digests.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from collect.durable import durable
from collect.header import Block, Header, damage, layout_of, row_digests, whole_digest
from collect.population import Population
from collect.provenance import provenance
from collect.recipe import canonical_json, population_id, run_ids
from collect.tables import plain, table_of, text
from generators.errors import ZooError

__all__ = ["FAULTS", "SCHEMA", "SUFFIX", "Block", "Header", "NewerSchemaError", "path_of", "read_group", "read_header",
           "verify", "write"]  # fmt: skip

log = logging.getLogger(__name__)

FORMAT = "powerhouse-population"
SCHEMA = 2  # the newest that this version reads; 1 is still written where there is no `trajectory`
SUFFIX = ".h5"
TABLES = 1 << 18  # bytes set aside for tables and attributes when a file is made; it grows if need be
AXES = {
    "weights": ("run", "checkpoint", "weight"),
    "trajectory": ("run", "checkpoint", "weight"),
    "buffers": ("run", "checkpoint", "entry"),
    "metrics": ("run", "evaluation", "metric"),
}
# What h5py raises for files that are not as they should be.
FAULTS = (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError)


class NewerSchemaError(ZooError):
    """A file that a newer version wrote: not damaged, but not for this one."""


# --- writing -----------------------------------------------------------------------------------------------------


def path_of(folder: str | Path, population: str) -> Path:
    """Where the population with this id lies in the zoo `folder`."""
    return Path(folder) / f"{population}{SUFFIX}"


def _stored(population: Population) -> tuple[np.ndarray, np.ndarray]:
    """The weights as they are stored: float32 [K, C or 1, P], and float16 [K, 0 or C - 1, P] of what comes before."""
    weights = np.ascontiguousarray(population.weights, dtype="<f4")
    if population.recipe.trajectory == "float16":
        early, last = weights[:, :-1], weights[:, -1:]
        with np.errstate(over="ignore"):
            half = early.astype("<f2")
        if np.array_equal(np.isfinite(half), np.isfinite(early)):
            return np.ascontiguousarray(last), half
        log.warning("stored in float32: a state of %s has weights that float16 cannot hold", population.recipe)
    return weights, np.zeros((len(weights), 0, weights.shape[-1]), dtype="<f2")


def _describe(population: Population, folder: Path, weights: np.ndarray, trajectory: np.ndarray) -> Header:
    """The header that the file of `population` will have, but for its digests."""
    recipe, data_digest, runs = population.recipe, population.data_digest, len(population.seeds)
    identity = population_id(recipe, data_digest, population.seeds)
    columns: dict[str, Sequence[Any]] = {
        "id": run_ids(recipe, data_digest, population.seeds),
        "seed": [int(seed) for seed in population.seeds],
        "status": [str(status) for status in population.status],
    }
    return Header(
        path=path_of(folder, identity),
        id=identity,
        digest="",
        attributes={
            "format": FORMAT,
            "schema": 2 if trajectory.shape[1] else 1,
            "population": identity,
            "recipe": canonical_json(recipe),
            "data_digest": data_digest,
            "K": runs,
            "stack": population.stack or runs,
            "calibration": json.dumps(population.calibration),
            "form": population.form,
            "seconds": float(population.seconds),
            "device": population.device,
            "precision": recipe.precision,
            "threads": torch.get_num_threads(),
            **provenance(),
        },
        architecture_json=population.architecture_json,
        layout=tuple(population.layout),
        buffer_layout=tuple(population.buffer_layout),
        table=table_of(columns | {field.name: [getattr(recipe, field.name)] * runs for field in fields(recipe)}),
        metrics=np.ascontiguousarray(population.metrics, dtype="<f4"),
        metric_names=tuple(population.metric_names),
        evaluation_epochs=np.asarray(population.evaluation_epochs, dtype="<f8"),
        evaluation_steps=np.asarray(population.evaluation_steps, dtype="<i8"),
        checkpoint_epochs=np.asarray(population.checkpoint_epochs, dtype="<i8"),
        weights=Block(0, weights.shape),
        buffers=Block(0, population.buffers.shape),
        trajectory=Block(0, trajectory.shape, "<f2"),
    )


def _image(header: Header, arrays: dict[str, np.ndarray], rows: Sequence[str], digest: str) -> bytes:
    """The bytes of the file. Made in memory: HDF5 is not to be trusted after the disk has refused a write."""
    size = sum(array.nbytes for array in arrays.values())
    in_memory = {"driver": "core", "backing_store": False, "block_size": size + TABLES}
    versions = ("v110", "v110")  # the oldest format with checksums over all that is not array data
    aligned = {"alignment_threshold": 1, "alignment_interval": 64}
    with h5py.File(header.path.name, "w", libver=versions, **in_memory, **aligned) as file:
        for name, array in (arrays | header.datasets()).items():
            file.create_dataset(name, data=array)
            if name in AXES:
                file[name].attrs["axes"] = text(AXES[name])
        file["metrics"].attrs["names"] = text(header.metric_names)
        file["architecture"] = text(header.architecture_json)
        for name, value in (header.attributes | {"row_digests": rows, "digest": digest}).items():
            file.attrs[name] = text(value) if isinstance(value, str | list) else value
        file.attrs["complete"] = True  # last: a file without it was never finished
        file.flush()
        return file.id.get_file_image()


def write(population: Population, folder: str | Path) -> Path:
    """Store a population in the zoo `folder`, which is made if it is not there, under the name that its id gives.

    Returns:
        The path of the complete file. A file with the same id and the same content is left as it is.

    Raises:
        ZooError: the parts of the population do not fit together, the file cannot be written, or a file with the same
            id is there that is damaged or has other content; it is not overwritten.
    """
    weights, trajectory = _stored(population)
    buffers = np.ascontiguousarray(population.buffers, dtype="<f4")
    header = _describe(population, Path(folder), weights, trajectory)
    try:
        header.check()
    except ValueError as error:
        raise ZooError(f"population {header.id} was not written: {error}; this is a fault of the engine") from error
    rows = row_digests(header, weights, buffers, trajectory)
    digest = whole_digest(header, rows)
    if header.path.exists():
        there = verify(header.path)
        if there.digest != digest:
            raise ZooError(
                f"{header.path} is there with other content (digest {there.digest}, this one {digest}) though data, "
                "recipe and seeds are the same: another machine or torch version made it; collect into another folder"
            )
        return header.path
    arrays = {"weights": weights, "buffers": buffers} | ({"trajectory": trajectory} if trajectory.shape[1] else {})
    with durable(header.path) as temporary:
        temporary.write_bytes(_image(header, arrays, rows, digest))
    return header.path


# --- reading -----------------------------------------------------------------------------------------------------


def _unusable(path: Path, reason: str) -> ZooError:
    return ZooError(
        f"{path} {reason}; `python -m collect run`, as before and with --verify, moves a damaged file aside and trains "
        "its networks anew; a file that does not belong there can be moved elsewhere"
    )


def _block(dataset: h5py.Dataset, dtype: str = "<f4") -> Block:
    offset = dataset.id.get_offset()
    if dataset.dtype != np.dtype(dtype) or dataset.chunks is not None or (offset is None and dataset.size):
        raise ValueError(f"{dataset.name} is not stored as contiguous {np.dtype(dtype).name}")
    return Block(offset or 0, dataset.shape, dtype)


def read_group(file: h5py.Group, path: Path) -> Header:
    """What lies in `file`, or in one group of the packed zoo `path`, checked without a look at the weights.

    Raises:
        ZooError: foreign, incomplete or of a future schema.
        Exception: one of `FAULTS`; damaged, or its parts do not fit together.
    """
    attributes = {name: plain(value) for name, value in file.attrs.items()}
    if "populations" in file:
        raise ZooError(f"{path} is a packed zoo, which is a zoo of its own; move it out of this folder, then open it")
    if attributes.get("format") != FORMAT:
        raise _unusable(path, "is an HDF5 file, but not one of a zoo")
    if attributes["schema"] > SCHEMA:
        raise NewerSchemaError(
            f"{path} has schema {attributes['schema']} and this version reads up to {SCHEMA}: a newer version wrote "
            "it; upgrade powerhouse-init"
        )
    if not attributes.get("complete"):
        raise _unusable(path, "was never completed")
    for name in ("population", "recipe", "data_digest", "digest", "row_digests", "seconds", "form"):
        attributes[name]  # a damaged file may lack it: KeyError
    axes = {name: file[name][()] for name in ("evaluation_epochs", "evaluation_steps", "checkpoint_epochs")}
    weights = _block(file["weights"])
    none = Block(0, (weights.shape[0], 0, weights.shape[-1]), "<f2")
    header = Header(
        path=path,
        id=attributes["population"],
        digest=attributes["digest"],
        attributes=attributes,
        architecture_json=plain(file["architecture"][()]),
        layout=layout_of(file["layout"][()]),
        buffer_layout=layout_of(file["buffer_layout"][()]),
        table=file["runs"][()],
        metrics=file["metrics"][()],
        metric_names=plain(file["metrics"].attrs["names"]),
        weights=weights,
        buffers=_block(file["buffers"]),
        trajectory=_block(file["trajectory"], none.dtype) if "trajectory" in file else none,
        **axes,
    )
    header.check()
    if len(attributes["row_digests"]) != len(header.table):
        raise ValueError("it lacks digests of some runs")
    for name in header.table.dtype.names or ():
        if header.table.dtype[name].kind == "S":
            header.table[name].tobytes().decode()  # damaged text: UnicodeDecodeError
    return header


def read_header(path: str | Path) -> Header:
    """Open a population file and check all that needs no look at the weights: the cheap check.

    Raises:
        ZooError: missing, truncated, foreign, incomplete, of a future schema, under another name than its own, or its
            parts do not fit together.
    """
    path = Path(path)
    if not path.is_file():
        raise ZooError(f"{path} does not exist; `python -m collect status FOLDER` lists what a zoo holds")
    try:
        with h5py.File(path, "r", locking=False) as file:  # finished files never change
            header = read_group(file, path)
        if header.path != path_of(path.parent, header.id):
            raise ValueError(f"its content says it is {path_of('', header.id)}")
    except FAULTS as error:
        raise _unusable(path, f"is truncated, damaged or not an HDF5 file ({error})") from error
    return header


def verify(path: str | Path) -> Header:
    """The deep check: `read_header`, then every digest computed anew from what is on the disk.

    Raises:
        ZooError: as `read_header`; or a digest does not match, and the message names the first run that is damaged.
    """
    header = read_header(path)
    if fault := damage(header):
        raise _unusable(header.path, f"is damaged: {fault}")
    return header
