"""What a population file says: where its arrays lie, its tables, and the digests over all of it.

Axes: K runs, C checkpoints, of which T are stored in half precision, P weights, B buffer entries, E evaluations,
M metrics.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from collect.population import TensorSpec
from collect.recipe import ADDED, Recipe
from collect.tables import rows_of, table_of

# As columns hold them, which have lists as JSON.
DEFAULTS = {
    field.name: json.dumps(field.default) if isinstance(field.default, tuple) else field.default
    for field in fields(Recipe)
}
_encode = json.JSONEncoder(sort_keys=True).encode  # `json.dumps` makes an encoder for every row


@dataclass(frozen=True)
class Block:
    """Where a contiguous dataset lies in its file."""

    offset: int
    shape: tuple[int, ...]
    dtype: str = "<f4"

    def map(self, path: Path) -> np.ndarray:
        """The dataset as a read-only memory map; a plain empty array if it has no entries."""
        if not math.prod(self.shape):
            return np.zeros(self.shape, dtype=self.dtype)
        return np.memmap(path, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)


@dataclass(frozen=True)
class Place:
    """Where the networks of a population lie: all that is needed to read them.

    Attributes:
        path: the file.
        id: of the population.
        digest: of its whole content.
        layout: where each parameter lies in a row of weights.
        buffer_layout: the same for buffers.
        weights: where the float32 [K, C - T, P] lie, the last checkpoints.
        buffers: where the float32 [K, C, B] lie.
        trajectory: where the float16 [K, T, P] lie, the checkpoints before those in `weights`; T is 0 in most files.
    """

    path: Path
    id: str
    digest: str
    layout: tuple[TensorSpec, ...]
    buffer_layout: tuple[TensorSpec, ...]
    weights: Block
    buffers: Block
    trajectory: Block

    @property
    def checkpoints(self) -> int:
        """How many states of every run are stored: C."""
        return self.trajectory.shape[1] + self.weights.shape[1]

    def find(self, checkpoint: int) -> tuple[str, int]:
        """The dataset that holds a checkpoint, "weights" or "trajectory", and its place on the second axis.

        Raises:
            IndexError: no such checkpoint.
        """
        if not -self.checkpoints <= checkpoint < self.checkpoints:
            raise IndexError(f"no checkpoint {checkpoint}: population {self.id} has {self.checkpoints} of them")
        index, early = checkpoint % self.checkpoints, self.trajectory.shape[1]
        return ("trajectory", index) if index < early else ("weights", index - early)

    def state(self, checkpoint: int) -> np.ndarray:
        """The weights of all runs at one checkpoint, mapped, [K, P] float32, or float16 as they are stored.

        Raises:
            IndexError: no such checkpoint.
        """
        name, index = self.find(checkpoint)
        block: Block = getattr(self, name)
        return block.map(self.path)[:, index]

    def states(self) -> np.ndarray:
        """The weights at all checkpoints, float32 [K, C, P]: mapped, or a copy if some are in half precision."""
        last = self.weights.map(self.path)
        if not self.trajectory.shape[1]:
            return last
        return np.concatenate([self.trajectory.map(self.path), last], axis=1, dtype=np.float32)


@dataclass(frozen=True)
class Header(Place):
    """Everything of a population file but its weights and buffers, which it locates.

    Attributes:
        attributes: the root attributes as plain values.
        architecture_json: canonical JSON of the architecture.
        table: one row per run with the columns id, seed, status and every field of the recipe.
        metrics: float32 [K, E, M].
        metric_names: the names of the last axis of `metrics`.
        evaluation_epochs: float64 [E].
        evaluation_steps: int64 [E].
        checkpoint_epochs: int64 [C].
    """

    attributes: dict[str, Any]
    architecture_json: str
    table: np.ndarray
    metrics: np.ndarray
    metric_names: tuple[str, ...]
    evaluation_epochs: np.ndarray
    evaluation_steps: np.ndarray
    checkpoint_epochs: np.ndarray

    @functools.cached_property
    def runs(self) -> tuple[dict[str, Any], ...]:
        """The table as rows of plain Python values."""
        return rows_of(self.table)

    def datasets(self) -> dict[str, np.ndarray]:
        """The small datasets as they are stored."""
        return {
            "layout": _layout_table(self.layout),
            "buffer_layout": _layout_table(self.buffer_layout),
            "runs": self.table,
            "metrics": self.metrics,
            "evaluation_epochs": self.evaluation_epochs,
            "evaluation_steps": self.evaluation_steps,
            "checkpoint_epochs": self.checkpoint_epochs,
        }

    def check(self) -> None:
        """Raise `ValueError` unless all parts speak of the same runs, checkpoints, tensors and metrics."""
        runs, checkpoints, early = len(self.table), len(self.checkpoint_epochs), self.trajectory.shape[1]
        for name, block, layout, count in (
            ("weights", self.weights, self.layout, checkpoints - early),
            ("trajectory", self.trajectory, self.layout, early),
            ("buffers", self.buffers, self.buffer_layout, checkpoints),
        ):
            total = 0
            for spec in layout:
                if spec.offset != total or spec.length != math.prod(spec.shape):
                    raise ValueError(f"the layout of {name} has a gap or an overlap at {spec.name}")
                total += spec.length
            if tuple(block.shape) != (runs, count, total):
                raise ValueError(f"{name} has shape {tuple(block.shape)}, its tables say {(runs, count, total)}")
        expected = (runs, len(self.evaluation_epochs), len(self.metric_names))
        if self.metrics.shape != expected or len(self.evaluation_steps) != expected[1]:
            raise ValueError(f"metrics has shape {self.metrics.shape}, its axes say {expected}")


def _layout_table(layout: Sequence[TensorSpec]) -> np.ndarray:
    columns = {field.name: [getattr(spec, field.name) for spec in layout] for field in fields(TensorSpec)}
    return table_of(columns | {"role": [str(spec.role) for spec in layout], "shape": [list(s.shape) for s in layout]})


def layout_of(table: np.ndarray) -> tuple[TensorSpec, ...]:
    """The layout that a table holds."""
    return tuple(TensorSpec(**row | {"shape": tuple(json.loads(row["shape"]))}) for row in rows_of(table))


# --- digests -----------------------------------------------------------------------------------------------------


def _names_the_run(column: str, value: Any) -> bool:
    """Whether a column is part of a run's digest.

    `data` is not: for an `.npz` it says where the file lay; the run's id stands for what is in it. Nor are fields that
    recipes had not at first where they have their default: the run is then the one that an older version trained.
    """
    return column != "data" and not (column in ADDED and value == DEFAULTS[column])


def row_digests(header: Header, *arrays: np.ndarray) -> list[str]:
    """The digest of every run: its columns and its rows of `arrays`: weights, buffers and trajectory."""
    digests = []
    for run, metrics, *rows in zip(header.runs, header.metrics, *arrays, strict=True):
        columns = {name: value for name, value in run.items() if _names_the_run(name, value)}
        digest = hashlib.blake2b(_encode(columns).encode(), digest_size=16)
        weights, buffers, trajectory = rows
        for part in (weights, buffers, metrics, trajectory):
            digest.update(np.ascontiguousarray(part).data)
        digests.append(digest.hexdigest())
    return digests


def whole_digest(header: Header, rows: Sequence[str]) -> str:
    """The digest of what the networks are; times, versions and machine are left out, so equal collections are equal.

    Args:
        header: the population.
        rows: the digests of its runs.
    """
    content = {name: header.attributes[name] for name in ("population", "data_digest")}
    content |= {"architecture": header.architecture_json, "metric_names": header.metric_names, "rows": rows}
    for name in ("evaluation_epochs", "evaluation_steps", "checkpoint_epochs"):
        content[name] = getattr(header, name).tolist()
    for name in ("layout", "buffer_layout"):
        content[name] = [vars(spec) for spec in getattr(header, name)]
    return hashlib.blake2b(_encode(content).encode(), digest_size=16).hexdigest()


def damage(header: Header) -> str:
    """What does not match its digest, computed anew from what is on the disk; "" if all is well."""
    expected = header.attributes["row_digests"]
    arrays = (block.map(header.path) for block in (header.weights, header.buffers, header.trajectory))
    for run, found, stored in zip(header.runs, row_digests(header, *arrays), expected, strict=True):
        if found != stored:
            return f"run {run['id']} does not match its digest"
    return "" if whole_digest(header, expected) == header.digest else "its tables do not match its digest"
