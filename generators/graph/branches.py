"""Residual branches: which layers of a graph compute what is added to a stream that goes around them.

An addition ends a branch if its streams have a common origin, the fork, and one of them, the shortcut, comes from there
through no matrix, or through one (the projection where a ResNet changes its width), and the other through more, which
nothing else reads. Sums of attention scores are none. The fork is the last node that all ways from the input to the
addition pass (immediate dominator).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import reduce

from generators.graph.graph import MATRIX_KINDS, Graph

_JOINS = ("add", "multiply", "concatenate", "merge")


@dataclass(frozen=True)
class Branch:
    """One residual branch.

    Attributes:
        fork: node whose result goes into the branch and around it.
        merge: node, of kind "add", that adds the branch to the shortcut.
        end: last node of the branch; it feeds `merge`.
        shortcut: node that carries the other stream into `merge`; the fork itself if nothing lies between.
        nodes: every node of the branch in topological order, `end` included, with its free parameters.
        length: m, the fewest matrices on a way from the fork to the end.
    """

    fork: int
    merge: int
    end: int
    shortcut: int
    nodes: tuple[int, ...]
    length: int


def branches(graph: Graph) -> tuple[Branch, ...]:
    """Every residual branch, ordered by where it is added.

    A branch may hold others (a long skip around residual blocks). Several that are added up before they meet the
    shortcut are one. Where a layer or an attention reads several streams, its origin is that of the first: the queries.

    The walk is linear in the edges, but for branches within branches, whose nodes are listed in each.
    """
    fed, fork, matrices = _origins(graph)
    found: list[Branch] = []
    for node in graph.nodes:
        streams = [index for index in graph.predecessors[node.index] if fed[index]]
        origin = fork[node.index]
        if node.kind != "add" or len(streams) < 2 or origin < 0:
            continue
        shortcut = min(streams, key=lambda index: (matrices[index], index))
        projected = matrices[shortcut] - matrices[origin]
        if projected > 1:
            continue
        around = _between(graph, origin, shortcut) if shortcut != origin else ()
        if any(graph.nodes[index].kind == "attention" for index in around):
            continue
        for end in streams:
            length = matrices[end] - matrices[origin]
            if length <= projected:
                continue
            nodes = _between(graph, origin, end)
            readers = {reader for index in nodes if fed[index] for reader in graph.successors[index]}
            if readers <= {*nodes, node.index}:
                found.append(Branch(origin, node.index, end, shortcut, nodes, length))
    return tuple(found)


def last_nodes(graph: Graph, branch: Branch, kinds: Collection[str]) -> tuple[int, ...]:
    """The nodes of `kinds` that are met first on the way back from the end of the branch.

    Of a product the first stream is followed, the others are its gates; parameters count where they multiply a stream.
    Of an attention the values are followed.
    """
    found, ahead, seen = set[int](), [branch.end], set[int]()
    while ahead:
        index = ahead.pop()
        if index in seen or index <= branch.fork:
            continue
        seen.add(index)
        kind, before = graph.nodes[index].kind, graph.predecessors[index]
        if kind in kinds:
            found.add(index)
            continue
        streams = sorted(other for other in before if graph.nodes[other].kind != "parameter")
        scales = set(before).difference(streams) if kind == "multiply" and "parameter" in kinds else set()
        found |= scales
        if not scales:
            ahead += streams[:1] if kind == "multiply" else before[-1:] if kind == "attention" else streams
    return tuple(sorted(found))


def _origins(graph: Graph) -> tuple[list[bool], list[int], list[int]]:
    """Per node: whether an input feeds it, its immediate dominator (-1 for none), the fewest matrices on the way to it.

    Ways start at the inputs; those through parameters do not count. Every way to a node passes its dominators, so the
    fewest matrices from a dominator to it are the difference of the two numbers.
    """
    fed, fork, matrices = list[bool](), list[int](), list[int]()

    def meet(one: int, other: int) -> int:
        """The last node that dominates both; indices fall on the way up."""
        while one != other:
            one, other = min(one, other), fork[max(one, other)]
        return one

    for node in graph.nodes:
        before = [index for index in graph.predecessors[node.index] if fed[index]]
        if node.kind not in (*_JOINS, "output"):
            before = before[:1]  # a layer's data, an attention's queries
        fed.append(bool(before) or node.kind == "input")
        fork.append(reduce(meet, before) if before else -1)
        matrices.append(min((matrices[index] for index in before), default=0) + (node.kind in MATRIX_KINDS))
    return fed, fork, matrices


def _between(graph: Graph, fork: int, end: int) -> tuple[int, ...]:
    """The nodes after `fork` that `end` depends on, itself included."""
    found, ahead = {end}, [end]
    while ahead:
        new = {index for index in graph.predecessors[ahead.pop()] if index > fork} - found
        found |= new
        ahead += new
    return tuple(sorted(found))
