"""The chosen runs of one population: what its file says of them, and the memory map of their weights."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from collect import packed
from collect.architectures import Architecture, build
from collect.header import Header, Place
from collect.population import TensorSpec
from collect.recipe import Recipe, from_json
from generators.errors import unknown_name


@dataclass(frozen=True)
class PopulationView:
    """The chosen runs of one population.

    Axes: K chosen runs, C checkpoints, P weights, B buffer entries, E evaluations, M metrics.

    Attributes:
        place: where its networks lie.
        rows: which of its runs are chosen.
    """

    place: Place
    rows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def _chosen(self, array: np.ndarray) -> np.ndarray:
        """The chosen rows; without a copy if they are consecutive."""
        first, last = self.rows[0], self.rows[-1]
        consecutive = self.rows == tuple(range(first, last + 1))
        return array[first : last + 1] if consecutive else array[list(self.rows)]

    @property
    def id(self) -> str:
        return self.place.id

    @functools.cached_property
    def header(self) -> Header:
        """What the file says, read when it is first asked for.

        Raises:
            ZooError: the file has changed since the zoo was opened.
        """
        return packed.header_at(self.place)

    @property
    def recipe(self) -> Recipe:
        return from_json(self.header.attributes["recipe"])

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.header.runs[row]["seed"] for row in self.rows)

    @property
    def status(self) -> tuple[str, ...]:
        """ok, diverged or stopped, for every run."""
        return tuple(self.header.runs[row]["status"] for row in self.rows)

    @property
    def metrics(self) -> np.ndarray:
        """float32 [K, E, M]; NaN after a run diverged."""
        return self._chosen(self.header.metrics)

    @property
    def metric_names(self) -> tuple[str, ...]:
        return self.header.metric_names

    @property
    def evaluation_epochs(self) -> np.ndarray:
        """float64 [E], 0 first."""
        return self.header.evaluation_epochs

    @property
    def evaluation_steps(self) -> np.ndarray:
        """int64 [E], 0 first."""
        return self.header.evaluation_steps

    @property
    def checkpoint_epochs(self) -> np.ndarray:
        """int64 [C]."""
        return self.header.checkpoint_epochs

    @property
    def layout(self) -> tuple[TensorSpec, ...]:
        return self.place.layout

    @property
    def buffer_layout(self) -> tuple[TensorSpec, ...]:
        return self.place.buffer_layout

    @property
    def weights(self) -> np.ndarray:
        """float32 [K, C, P], a read-only memory map; a copy if some checkpoints are stored in half precision."""
        return self._chosen(self.place.states())

    @property
    def buffers(self) -> np.ndarray:
        """float32 [K, C, B], a read-only memory map."""
        return self._chosen(self.place.buffers.map(self.place.path))

    def state(self, checkpoint: int = -1) -> np.ndarray:
        """The weights at one checkpoint, float32 [K, P], mapped if they are stored in float32.

        Raises:
            IndexError: no such checkpoint.
        """
        return self._chosen(self.place.state(checkpoint)).astype(np.float32, copy=False)

    def curve(self, metric: str) -> np.ndarray:
        """One metric over the evaluations, float32 [K, E].

        Raises:
            UnknownNameError: no such metric.
        """
        if metric not in self.metric_names:
            raise unknown_name("metric", metric, self.metric_names)
        return self.metrics[:, :, self.metric_names.index(metric)]

    def states(self, checkpoint: int = -1) -> dict[str, Tensor]:
        """Weights and buffers of all chosen runs, stacked: tensor name -> float32 [K, *shape]."""
        parts = ((self.layout, self.state(checkpoint)), (self.buffer_layout, self.buffers[:, checkpoint]))
        return {
            spec.name: torch.from_numpy(np.array(rows[:, spec.offset : spec.offset + spec.length])).reshape(
                len(self), *spec.shape
            )
            for layout, rows in parts
            for spec in layout
        }

    def build(self) -> nn.Module:
        """A module of this architecture, with weights of no meaning."""
        stored = json.loads(self.header.architecture_json)
        shape, classes = stored.pop("shape"), stored.pop("classes")
        return build(Architecture(**stored), shape=tuple(shape), classes=classes)
