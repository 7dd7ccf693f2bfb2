"""The population file, schema 1: one HDF5 file per population, complete and durable from the moment it has its name.

Axes: K runs, C checkpoints, P weights, B buffer entries, E evaluations, M metrics.

    weights            float32 [K, C, P]  contiguous and unfiltered: readers memory-map it by its offset
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

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from collect.durable import durable
from collect.population import Population, TensorSpec
from collect.provenance import provenance
from collect.recipe import canonical_json, population_id, run_id
from collect.tables import plain, rows_of, table_of, text
from generators.errors import ZooError

FORMAT = "powerhouse-population"
SCHEMA = 1
SUFFIX = ".h5"
AXES = {
    "weights": ("run", "checkpoint", "weight"),
    "buffers": ("run", "checkpoint", "entry"),
    "metrics": ("run", "evaluation", "metric"),
}
# What h5py raises for files that are not as they should be.
FAULTS = (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError)


class NewerSchemaError(ZooError):
    """A file that a newer version wrote: not damaged, but not for this one."""


# --- what a file says --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Where a contiguous float32 dataset lies in its file."""

    offset: int
    shape: tuple[int, ...]

    def map(self, path: Path) -> np.ndarray:
        """The dataset as a read-only memory map; a plain empty array if it has no entries."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, dtype=np.float32)
        return np.memmap(path, dtype="<f4", mode="r", offset=self.offset, shape=self.shape)


@dataclass(frozen=True)
class Header:
    """Everything of a population file but its weights and buffers, which it locates.

    Attributes:
        path: the file.
        attributes: the root attributes as plain values.
        architecture_json: canonical JSON of the architecture.
        layout: where each parameter lies in a row of `weights`.
        buffer_layout: the same for `buffers`.
        runs: one dict per run: id, seed, status and every field of the recipe.
        metrics: float32 [K, E, M].
        metric_names: the names of the last axis of `metrics`.
        evaluation_epochs: float64 [E].
        evaluation_steps: int64 [E].
        checkpoint_epochs: int64 [C].
        weights: where the float32 [K, C, P] lie.
        buffers: where the float32 [K, C, B] lie.
    """

    path: Path
    attributes: dict[str, Any]
    architecture_json: str
    layout: tuple[TensorSpec, ...]
    buffer_layout: tuple[TensorSpec, ...]
    runs: tuple[dict[str, Any], ...]
    metrics: np.ndarray
    metric_names: tuple[str, ...]
    evaluation_epochs: np.ndarray
    evaluation_steps: np.ndarray
    checkpoint_epochs: np.ndarray
    weights: Block
    buffers: Block

    @property
    def id(self) -> str:
        return self.attributes["population"]

    @property
    def digest(self) -> str:
        """The digest of the whole content."""
        return self.attributes["digest"]

    def datasets(self) -> dict[str, np.ndarray]:
        """The small datasets as they are stored."""
        return {
            "layout": _layout_table(self.layout),
            "buffer_layout": _layout_table(self.buffer_layout),
            "runs": table_of(self.runs, self.runs[0]),
            "metrics": self.metrics,
            "evaluation_epochs": self.evaluation_epochs,
            "evaluation_steps": self.evaluation_steps,
            "checkpoint_epochs": self.checkpoint_epochs,
        }


def _layout_table(layout: Sequence[TensorSpec]) -> np.ndarray:
    names = [field.name for field in fields(TensorSpec)]
    rows = [
        {name: getattr(spec, name) for name in names} | {"role": str(spec.role), "shape": list(spec.shape)}
        for spec in layout
    ]
    return table_of(rows, names)


def _layout(table: np.ndarray) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(**row | {"shape": tuple(json.loads(row["shape"]))}) for row in rows_of(table))


def _row_digest(run: dict[str, Any], *arrays: np.ndarray) -> str:
    """The digest of one run: its columns and its rows of `weights`, `buffers` and `metrics`.

    The column `data` is left out: for an `.npz` it says where the file lay; the run's id stands for what is in it.
    """
    columns = {name: value for name, value in run.items() if name != "data"}
    digest = hashlib.blake2b(json.dumps(columns, sort_keys=True).encode(), digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return digest.hexdigest()


def _whole_digest(header: Header, rows: Sequence[str]) -> str:
    """The digest of what the networks are; times, versions and machine are left out, so equal collections are equal."""
    content = {name: header.attributes[name] for name in ("population", "data_digest")}
    content |= {"architecture": header.architecture_json, "metric_names": header.metric_names, "rows": rows}
    for name in ("evaluation_epochs", "evaluation_steps", "checkpoint_epochs"):
        content[name] = getattr(header, name).tolist()
    for name in ("layout", "buffer_layout"):
        content[name] = [vars(spec) for spec in getattr(header, name)]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


# --- writing -----------------------------------------------------------------------------------------------------


def path_of(folder: str | Path, population: str) -> Path:
    """Where the population with this id lies in the zoo `folder`."""
    return Path(folder) / f"{population}{SUFFIX}"


def _describe(population: Population, folder: Path) -> Header:
    """The header that the file of `population` will have, but for its digests."""
    recipe, data_digest = population.recipe, population.data_digest
    identity = population_id(recipe, data_digest, population.seeds)
    factors = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    runs = [
        {"id": run_id(recipe, data_digest, seed), "seed": int(seed), "status": str(status)} | factors
        for seed, status in zip(population.seeds, population.status, strict=True)
    ]
    return Header(
        path=path_of(folder, identity),
        attributes={
            "format": FORMAT,
            "schema": SCHEMA,
            "population": identity,
            "recipe": canonical_json(recipe),
            "data_digest": data_digest,
            "K": len(runs),
            "form": population.form,
            "seconds": float(population.seconds),
            "device": "cpu",
            "precision": "float32",
            "threads": torch.get_num_threads(),
            **provenance(),
        },
        architecture_json=population.architecture_json,
        layout=tuple(population.layout),
        buffer_layout=tuple(population.buffer_layout),
        runs=rows_of(table_of(runs, runs[0])),
        metrics=np.ascontiguousarray(population.metrics, dtype="<f4"),
        metric_names=tuple(population.metric_names),
        evaluation_epochs=np.asarray(population.evaluation_epochs, dtype="<f8"),
        evaluation_steps=np.asarray(population.evaluation_steps, dtype="<i8"),
        checkpoint_epochs=np.asarray(population.checkpoint_epochs, dtype="<i8"),
        weights=Block(0, population.weights.shape),
        buffers=Block(0, population.buffers.shape),
    )


def _image(header: Header, weights: np.ndarray, buffers: np.ndarray, rows: Sequence[str], digest: str) -> bytes:
    """The bytes of the file. Made in memory: HDF5 is not to be trusted after the disk has refused a write."""
    in_memory = {"driver": "core", "backing_store": False}
    versions = ("v110", "v110")  # the oldest format with checksums over all that is not array data
    aligned = {"alignment_threshold": 1, "alignment_interval": 64}
    with h5py.File(header.path.name, "w", libver=versions, **in_memory, **aligned) as file:
        for name, array in ({"weights": weights, "buffers": buffers} | header.datasets()).items():
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
    header = _describe(population, Path(folder))
    try:
        _check_shapes(header)
    except ValueError as error:
        raise ZooError(f"population {header.id} was not written: {error}; this is a fault of the engine") from error
    weights, buffers = (np.ascontiguousarray(array, dtype="<f4") for array in (population.weights, population.buffers))
    rows = [_row_digest(*parts) for parts in zip(header.runs, weights, buffers, header.metrics, strict=True)]
    digest = _whole_digest(header, rows)
    if header.path.exists():
        there = verify(header.path)
        if there.digest != digest:
            raise ZooError(
                f"{header.path} is there with other content (digest {there.digest}, this one {digest}) though data, "
                "recipe and seeds are the same: another machine or torch version made it; collect into another folder"
            )
        return header.path
    with durable(header.path) as temporary:
        temporary.write_bytes(_image(header, weights, buffers, rows, digest))
    return header.path


# --- reading -----------------------------------------------------------------------------------------------------


def _unusable(path: Path, reason: str) -> ZooError:
    return ZooError(
        f"{path} {reason}; collecting into its folder again moves a damaged file aside and trains its networks anew; "
        "a file that does not belong there can be moved elsewhere"
    )


def _block(dataset: h5py.Dataset) -> Block:
    offset = dataset.id.get_offset()
    if dataset.dtype != np.dtype("<f4") or dataset.chunks is not None or (offset is None and dataset.size):
        raise ValueError(f"{dataset.name} is not stored as contiguous float32")
    return Block(offset or 0, dataset.shape)


def _check_shapes(header: Header) -> None:
    """Raise `ValueError` unless all parts speak of the same runs, checkpoints, tensors and metrics."""
    runs, checkpoints = len(header.runs), len(header.checkpoint_epochs)
    for name, block, layout in (
        ("weights", header.weights, header.layout),
        ("buffers", header.buffers, header.buffer_layout),
    ):
        total = 0
        for spec in layout:
            if spec.offset != total or spec.length != math.prod(spec.shape):
                raise ValueError(f"the layout of {name} has a gap or an overlap at {spec.name}")
            total += spec.length
        if tuple(block.shape) != (runs, checkpoints, total):
            raise ValueError(f"{name} has shape {tuple(block.shape)}, its tables say {(runs, checkpoints, total)}")
    expected = (runs, len(header.evaluation_epochs), len(header.metric_names))
    if header.metrics.shape != expected or len(header.evaluation_steps) != expected[1]:
        raise ValueError(f"metrics has shape {header.metrics.shape}, its axes say {expected}")


def read_group(file: h5py.Group, path: Path) -> Header:
    """What lies in `file`, or in one group of the packed zoo `path`, checked without a look at the weights.

    Raises:
        ZooError: foreign, incomplete or of a future schema.
        Exception: one of `FAULTS`; damaged, or its parts do not fit together.
    """
    attributes = {name: plain(value) for name, value in file.attrs.items()}
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
    header = Header(
        path=path,
        attributes=attributes,
        architecture_json=plain(file["architecture"][()]),
        layout=_layout(file["layout"][()]),
        buffer_layout=_layout(file["buffer_layout"][()]),
        runs=rows_of(file["runs"][()]),
        metrics=file["metrics"][()],
        metric_names=plain(file["metrics"].attrs["names"]),
        weights=_block(file["weights"]),
        buffers=_block(file["buffers"]),
        **axes,
    )
    _check_shapes(header)
    if len(attributes["row_digests"]) != len(header.runs):
        raise ValueError("it lacks digests of some runs")
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


def damage(header: Header) -> str:
    """What does not match its digest, computed anew from what is on the disk; "" if all is well."""
    arrays = header.weights.map(header.path), header.buffers.map(header.path), header.metrics
    rows = header.attributes["row_digests"]
    for expected, *parts in zip(rows, header.runs, *arrays, strict=True):
        if _row_digest(*parts) != expected:
            return f"run {parts[0]['id']} does not match its digest"
    return "" if _whole_digest(header, rows) == header.digest else "its tables do not match its digest"


def verify(path: str | Path) -> Header:
    """The deep check: `read_header`, then every digest computed anew from what is on the disk.

    Raises:
        ZooError: as `read_header`; or a digest does not match, and the message names the first run that is damaged.
    """
    header = read_header(path)
    if fault := damage(header):
        raise _unusable(header.path, f"is damaged: {fault}")
    return header
