"""Powerhouse: learned weight initialisation for any `torch.nn.Module`.

`generators.init(model, "noise-ghn-digits", seed=0)` fills a model in place and returns an account of every tensor;
`generators.load(...)` gives a generator to sample ensembles from. The names below are the whole public interface; each
is imported when it is first used (PEP 562), so `import generators` costs next to nothing over `import torch`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Imported at once because the function has the name of its module: importing the module later, from anywhere, would
# put the module in the function's place.
from generators.inventory import inventory

if TYPE_CHECKING:
    from generators.architecture_aware import architecture_learning_rate
    from generators.checkpoint import load, save
    from generators.errors import PowerhouseError
    from generators.filling import init
    from generators.generator import Generator
    from generators.ghn.codes import interpolate_codes
    from generators.gradients import GradCosine, grad_cosine
    from generators.graph import Graph, trace
    from generators.hyperfan import hyperfan_
    from generators.initialiser import Initialiser, Kind, Proposal, Request, list_initialisers, register
    from generators.published import GeneratorEntry, list_generators
    from generators.report import InitReport

__version__ = "0.1.0"

__all__ = [
    "init", "load", "save", "list_initialisers", "list_generators", "trace", "inventory", "register", "hyperfan_",
    "interpolate_codes", "architecture_learning_rate", "grad_cosine", "GradCosine", "Generator", "GeneratorEntry",
    "Graph", "Initialiser", "InitReport", "Kind", "Proposal", "Request", "PowerhouseError", "__version__",
]  # fmt: skip

_HOMES = {
    "architecture_learning_rate": "architecture_aware",
    "init": "filling",
    "grad_cosine": "gradients",
    "GradCosine": "gradients",
    "hyperfan_": "hyperfan",
    "interpolate_codes": "ghn.codes",
    "list_initialisers": "initialiser",
    "register": "initialiser",
    "Initialiser": "initialiser",
    "Kind": "initialiser",
    "Proposal": "initialiser",
    "Request": "initialiser",
    "load": "checkpoint",
    "save": "checkpoint",
    "list_generators": "published",
    "GeneratorEntry": "published",
    "trace": "graph",
    "Graph": "graph",
    "Generator": "generator",
    "InitReport": "report",
    "PowerhouseError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"generators.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
