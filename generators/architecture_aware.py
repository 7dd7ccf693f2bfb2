"""Architecture-aware scaling: variances and learning rates from the graph (Chen, Wu, Wang and Hanin, ICLR 2024).

A layer on an edge of the graph is drawn with variance 2 / (in-degree x fan-in), so that a sum of several branches has
the size of one. The largest learning rate that training bears goes with the depths L_p of all paths p from the input to
the output, and with the side q of the kernels of convolutions:

    learning rate  ~  (sum over p of L_p^3)^(-1/2) / q

The sum has as many terms as there are paths (2^n through n residual blocks), but one pass over the graph that carries
the sums of L^0, L^1, L^2 and L^3 finds it exactly.

What the formulas leave open, and is ours:

- In-degree: the number of streams that meet in the sum (node "add") in which the layer's output ends, perhaps through
  activations, normalisations or scales. Sums that follow each other directly are one sum; identity shortcuts count,
  free parameters that are added (biases, position tables) do not. An output that is read at several places ends at
  itself, and the streams of a concatenation or a product (a gate) do not add up: in-degree 1. So is that of a recurrent
  layer, whatever it sums inside. A weight that is used several times has the largest of its in-degrees.
- A path is one along the edges of the traced graph, and L_p counts the layers with a matrix on it: convolutions, linear
  and recurrent layers, embeddings.
- q is the geometric mean of the sides of all kernels of all convolutions, 1 without convolutions. That of a vision
  transformer is the side of its patches.
- The layer that makes the output is drawn like the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from generators.errors import ConfigError, ModelError
from generators.graph import MATRIX_KINDS, Graph, trace
from generators.initialiser import Kind, Proposal, Request, register
from generators.inventory import MATRIX_ROLES, ParameterInfo
from generators.pointwise import Pointwise, normal

_HANDED_ON = ("add", "multiply", "normalisation", "activation")  # what nodes of these kinds do to a single stream


def _is_term(graph: Graph, index: int) -> bool:
    """Whether a node is a sum that is nothing but a term of the next sum."""
    node, after = graph.nodes[index], graph.successors[index]
    is_sum = node.kind == "add" and not node.attributes.get("activation")
    return is_sum and len(after) == 1 and graph.nodes[after[0]].kind == "add"


def in_degrees(graph: Graph) -> dict[str, int]:
    """Name of every parameter of a layer with a matrix -> in-degree of the layer, at least 1. Linear in the edges."""
    nodes, before, after = graph.nodes, graph.predecessors, graph.successors
    fed: list[bool] = []  # by an input
    streams: list[int] = []  # that meet in a node, those of its terms included
    for node in nodes:
        sources = [index for index in before[node.index] if fed[index]]
        fed.append(node.kind == "input" or bool(sources))
        streams.append(sum(streams[index] if _is_term(graph, index) else 1 for index in sources))
    ends = [1] * len(nodes)  # streams in the sum where the result of a node ends
    degrees: dict[str, int] = {}
    for node in reversed(nodes):
        if len(after[node.index]) == 1:
            (target,) = after[node.index]
            meeting = ends[target] if _is_term(graph, target) else streams[target]
            if nodes[target].kind == "add" and meeting > 1:
                ends[node.index] = meeting
            elif nodes[target].kind in _HANDED_ON and meeting == 1:
                ends[node.index] = ends[target]
        for name in node.parameters if node.kind in MATRIX_KINDS else ():
            first = graph.tied.get(name, name)
            degrees[first] = max(degrees.get(first, 1), ends[node.index])
    return degrees


def path_sums(graph: Graph) -> tuple[int, int, int, int]:
    """Sums of L^0, L^1, L^2 and L^3 over all paths from an input to the output that have L layers with a matrix.

    Exact, in Python's integers, which hold any number of paths.
    """
    sums: list[tuple[int, int, int, int]] = []
    for node in graph.nodes:
        rows = [sums[index] for index in graph.predecessors[node.index]]
        count, first, second, third = (sum(row[power] for row in rows) for power in range(4))
        if node.kind == "input":
            count += 1
        if node.kind in MATRIX_KINDS:  # (L + 1)^k
            first, second, third = first + count, second + 2 * first + count, third + 3 * second + 3 * first + count
        sums.append((count, first, second, third))
    return sums[-1]


def kernel_side(graph: Graph) -> float:
    """Geometric mean of the sides of all kernels of all convolutions, 1 without convolutions."""
    sides = [side for node in graph.nodes if node.kind == "convolution" for side in node.attributes["kernel"]]
    return math.exp(sum(map(math.log, sides)) / max(len(sides), 1))


def _log_factor(graph: Graph) -> float:
    """Logarithm of the learning rate without its constant: that of a sum of any size is a float."""
    cubes = path_sums(graph)[3]
    if not cubes:
        raise ModelError(
            "no path from an input to the output passes a layer with a matrix, so depth says nothing of the learning "
            "rate; if the model has such layers, pass `example_inputs=` that reach them"
        )
    return -0.5 * math.log(cubes) - math.log(kernel_side(graph))


def architecture_learning_rate(
    model: nn.Module | Graph, *, base: nn.Module | Graph | None = None, learning_rate: float = 1.0,
    example_inputs: Any = None,
) -> float:  # fmt: skip
    """The learning rate of `model` that corresponds to a given one of `base`.

    Chen et al. find it for a small network and scale it by the ratio of `(sum over paths of L^3)^(-1/2) / q`; what that
    is, and what of it is ours, is said in the module. Both networks are to be initialised by `"architecture-aware"`.

    Args:
        model: any module, or its traced graph.
        base: the network that `learning_rate` was found for, or its graph. None: the factor alone, times
            `learning_rate`.
        learning_rate: the best or the largest of `base`.
        example_inputs: for the tracer, if it cannot guess the inputs of `model` and of `base`.

    Raises:
        ConfigError: `learning_rate` is not a positive number.
        ModelError: no path from an input to the output of a network passes a layer with a matrix.
        TraceError: a network cannot be traced.
    """
    if not (math.isfinite(learning_rate) and learning_rate > 0.0):
        raise ConfigError(f"learning_rate is {learning_rate}; give that of the base network, a positive number")

    def log_factor(network: nn.Module | Graph) -> float:
        return _log_factor(network if isinstance(network, Graph) else trace(network, example_inputs))

    return learning_rate * math.exp(log_factor(model) - (0.0 if base is None else log_factor(base)))


@dataclass(frozen=True)
class ArchitectureAware:
    """Normal weights of variance 2 / (in-degree x fan-in), everything else as `he` has it.

    The report has the `in_degree` of every matrix, and as figures of the step `learning_rate_factor` (see
    `architecture_learning_rate`), `kernel_side`, the `mean_depth` of the paths and `log10_paths`, their number.
    """

    name: str = "architecture-aware"
    kind: Kind = Kind.POINTWISE
    needs: tuple[str, ...] = ("graph",)

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """Values for every parameter whose role a pointwise rule covers."""
        graph = cast(Graph, request.graph)
        degrees = in_degrees(graph)

        def std(info: ParameterInfo) -> float:
            return math.sqrt(2.0 / (degrees.get(info.name, 1) * max(info.fan_in, 1)))

        proposal = Pointwise(self.name, normal(std)).propose(model, request)
        for info in request.inventory.where(*MATRIX_ROLES):
            degree = degrees.get(info.name, 1)
            proposal.sources[info.name] = f"{self.name}: in-degree {degree}"
            proposal.statistics[info.name] = {"in_degree": float(degree)}
        paths, depths, _, cubes = path_sums(graph)
        if cubes:
            proposal.figures = {
                "learning_rate_factor": math.exp(_log_factor(graph)), "kernel_side": kernel_side(graph),
                "mean_depth": depths / paths, "log10_paths": math.log10(paths),
            }  # fmt: skip
        else:
            proposal.notes.append(f"{self.name}: no path to the output passes a matrix, so no learning rate")
        return proposal


register(
    "architecture-aware", kind=Kind.POINTWISE, needs=("graph",), paper="Chen et al., ICLR 2024",
    summary="normal, variance 2 / (fan-in x streams in the sum that the layer ends in), and the learning rate's factor",
)(ArchitectureAware)  # fmt: skip
