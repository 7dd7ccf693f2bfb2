"""From drafts to the graph: dead merges dropped, distances and depths computed, nodes numbered. Linear in the edges."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from generators.graph.drafts import Draft
from generators.graph.graph import MERGE_KINDS, Graph, Node


def assemble(drafts: list[Draft], *, grid: tuple[float, int], names: Iterable[str], tied: Mapping[str, str]) -> Graph:
    """The graph of `drafts`, which are in topological order with the output last.

    Args:
        drafts: changed in place.
        grid: number of positions of the model's input and of its grid axes.
        names: every parameter of the model.
        tied: every further name of a shared parameter -> its first name.
    """
    _see_through_normalisation(drafts)
    alive, to_output = _reach(drafts)
    depths = _depths(drafts)
    numbers: dict[int, int] = {}
    nodes: list[Node] = []
    edges: list[tuple[int, int]] = []
    for index, draft in enumerate(drafts):
        if not alive[index]:
            continue
        numbers[index] = len(nodes)
        edges += [(numbers[source], numbers[index]) for source in draft.sources]
        attributes = {**draft.attributes, "to_output": to_output[index]}
        if draft.kind == "input" or (draft.sources and draft.kind != "output"):
            attributes["resolution"] = _resolution(draft, grid)
        if draft.kind not in ("parameter", "output"):
            attributes.setdefault("activation", "")
            attributes.setdefault("out_channels", draft.channels)
        nodes.append(
            Node(numbers[index], draft.kind, draft.parameters, draft.slots, draft.shape, attributes, depths[index])
        )
    used = {tied.get(name, name) for node in nodes for name in node.parameters}
    unused = tuple(name for name in names if tied.get(name, name) not in used)
    pairs = torch.tensor(edges, dtype=torch.int64, device="cpu").reshape(-1, 2).T.contiguous()
    return Graph(tuple(nodes), pairs, unused, tied)


def _reach(drafts: list[Draft]) -> tuple[list[bool], list[int]]:
    """Per draft: whether it leads to the output or a layer, and the edges on the shortest way to the output (-1)."""
    alive = [draft.kind not in MERGE_KINDS for draft in drafts]
    to_output = [-1] * len(drafts)
    to_output[-1] = 0
    for index in range(len(drafts) - 1, -1, -1):
        step = to_output[index] + 1
        for source in drafts[index].sources if alive[index] else ():
            alive[source] = True
            if step and (to_output[source] < 0 or step < to_output[source]):
                to_output[source] = step
    return alive, to_output


def _depths(drafts: list[Draft]) -> list[float]:
    """Longest way from an input, relative to that of the output; what no input feeds stands right before its use."""
    steps = [0] * len(drafts)
    fed = [False] * len(drafts)
    for index, draft in enumerate(drafts):
        steps[index] = max((steps[source] + 1 for source in draft.sources), default=0)
        fed[index] = draft.kind in ("input", "output") or any(fed[source] for source in draft.sources)
    length = max(steps[-1], 1)
    first_use = [length] * len(drafts)
    for index in range(len(drafts) - 1, -1, -1):
        if not fed[index]:
            steps[index] = max(first_use[index] - 1, 0)
        for source in drafts[index].sources:
            first_use[source] = min(first_use[source], steps[index])
    return [min(count / length, 1.0) for count in steps]


def _resolution(draft: Draft, grid: tuple[float, int]) -> float:
    positions, axes = grid
    if draft.positions <= 0 or positions <= 0:
        return 0.0
    return round(math.log2(draft.positions / positions) / axes, 3)


def _see_through_normalisation(drafts: list[Draft]) -> None:
    """The activation after a normalisation is also that of the layer before it."""
    for draft in reversed(drafts):
        activation = draft.attributes.get("activation")
        if draft.kind == "normalisation" and activation and draft.sources:
            source = drafts[draft.sources[0]]
            if source.kind in ("convolution", "linear"):
                source.attributes.setdefault("activation", activation)
