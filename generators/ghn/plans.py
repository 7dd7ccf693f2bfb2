"""The decode plans that a GHN keeps: one for every architecture that it has seen lately."""

from __future__ import annotations

import torch
from torch import nn

from generators.ghn.config import GHNConfig
from generators.ghn.plan import DecodePlan, decode_plan
from generators.graph import Graph
from generators.inventory import inventory

PLANS_KEPT = 64


class Plans:
    """A cache by all that a plan depends on: the graph, every fact about the parameters, what the GHN knows.

    Roles are among these facts: a complex weight has the name and shape of a real one, and is not decoded. Whether a
    parameter is trained is not: what is frozen is decoded too, and left out by who writes.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple, DecodePlan] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def of(self, model: nn.Module, graph: Graph, config: GHNConfig, device: torch.device) -> DecodePlan:
        """The plan of `model`, whose graph is `graph`, on `device`."""
        found = inventory(model, graph)
        facts = tuple(tuple((vars(info) | {"trainable": True}).values()) for info in found)
        key = (graph.signature, facts, config.classes, config.met, config.distance_limit)
        if key not in self._kept:
            while len(self._kept) >= PLANS_KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = decode_plan(
                graph, found, classes=config.classes, met=config.met, distance_limit=config.distance_limit
            )  # fmt: skip
        if self._kept[key].table.features.device != device:
            self._kept[key] = self._kept[key].to(device)
        return self._kept[key]
