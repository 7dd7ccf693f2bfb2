"""The computational graph of any `nn.Module`, traced on the meta device: no data, no real forward, no side effects."""

from __future__ import annotations

from generators.graph.graph import LAYER_KINDS, MATRIX_KINDS, MERGE_KINDS, NODE_KINDS, Graph, Node
from generators.graph.tracer import trace

__all__ = ["LAYER_KINDS", "MATRIX_KINDS", "MERGE_KINDS", "NODE_KINDS", "Graph", "Node", "trace"]
