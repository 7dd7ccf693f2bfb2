"""The initialiser protocol, the registry of names, and chains of them.

An initialiser is anything with `propose(model, request) -> Proposal`: new values for tensors, computed without touching
the model. `resolve` turns a chain such as `"he+lsuv"` into its initialisers; `generators.filling` writes what they
propose.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from generators.arguments import whole_number
from generators.errors import ConfigError, unknown_name
from generators.inventory import Inventory

if TYPE_CHECKING:
    from generators.graph import Graph

log = logging.getLogger(__name__)


class Kind(str, Enum):
    """What an initialiser looks at; REFINING ones improve what is there, the others fill every weight.

    INHERITED ones look at a trained relative of the model.
    """

    POINTWISE = "pointwise"
    LOCAL = "local"
    GLOBAL = "global"
    INHERITED = "inherited"
    REFINING = "refining"


@dataclass(frozen=True)
class Request:
    """Everything an initialiser may use besides the model.

    Attributes:
        inventory: the parameters of the model with their roles.
        seed: root seed of all draws.
        member: index in the population named by `seed`; the draws of a member do not depend on how many there are.
        data: batches for initialisers that need data: an iterable of `(inputs, targets)`.
        loss: `loss(outputs, targets) -> scalar` for initialisers that need one.
        example_inputs: inputs for the tracer, if the shape of the model's input cannot be guessed.
        graph: of the model, if it has been traced already, or an initialiser needs it.
        relative: a trained model to inherit from.
        codes: `[M, ...]`, noise codes of the M members that are asked for, instead of those that `seed` gives.
        shared_noise: of several members, all have the draws of the first but for their codes.
    """

    inventory: Inventory
    seed: int = 0
    member: int = 0
    data: Iterable | None = None
    loss: Callable | None = None
    example_inputs: Any = None
    graph: Graph | None = None
    relative: nn.Module | None = None
    codes: Tensor | None = None
    shared_noise: bool = False

    def __post_init__(self) -> None:
        for name in ("seed", "member"):
            whole_number(name, getattr(self, name))


@dataclass
class Proposal:
    """New values for some tensors of a model, and who stands behind each.

    `sources` and `fallbacks` have disjoint keys that together are those of `values`; a tensor that is in neither is
    kept, with the reason in `kept` if there is a better one than "not touched by ...". `statistics` are figures of a
    tensor (such as `scale`, the factor by which it was multiplied), `figures` those of the step as a whole (such as
    `iterations`); both are for the report.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    statistics: dict[str, dict[str, float]] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Initialiser(Protocol):
    """What all initialisers share. `name` appears in reports, `kind` decides where in a chain it may stand.

    One that cannot do without something may have an attribute `needs`, a tuple of `NEEDS`; it is asked only if they are
    given (and the graph traced).
    """

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def kind(self) -> Kind:
        """What it looks at."""

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """New values for `model`, which is not changed."""


@dataclass(frozen=True)
class InitialiserInfo:
    """One row of `list_initialisers()`."""

    name: str
    kind: str
    needs: tuple[str, ...]
    paper: str
    summary: str


NEEDS = {
    "data": "data=batches, an iterable of (inputs, targets)",
    "loss": "loss=function, such as torch.nn.functional.cross_entropy",
    "relative": "relative=model, a trained one to inherit from",
    "graph": "example_inputs=..., if the model cannot be traced without",
}
"""What initialisers may need, and how it is given to `init`."""

_REGISTRY: dict[str, tuple[InitialiserInfo, Callable[[], Initialiser]]] = {}
_ENTRY_POINTS = "powerhouse.initialisers"
_BUILT_IN = (
    "pointwise", "torch_default", "structured", "architecture_aware", "stabilised", "refining.lsuv",
    "refining.emergence", "refining.rewiring", "refining.residual", "refining.mimetic", "hyperfan",
    "inherited.selection", "inherited.fusion", "refining.nio", "refining.gradinit", "refining.metainit",
)  # fmt: skip


def register(name: str, *, kind: Kind, needs: tuple[str, ...] = (), paper: str = "", summary: str = "") -> Callable:
    """Decorator: make a zero-argument factory of an `Initialiser` known under `name`.

    Third parties call it in a module that they name under the entry point group `powerhouse.initialisers`.

    Args:
        name: what chains call it.
        kind: what it looks at.
        needs: keys of `NEEDS`: what it cannot do without.
        paper: authors, venue and number of the source, "" for what has none.
        summary: what it does, in a few words.

    Raises:
        ConfigError: `name` is taken, or holds a character that the chain syntax needs.
        UnknownNameError: a need, or the kind.
    """

    def decorate(factory: Callable[[], Initialiser]) -> Callable[[], Initialiser]:
        if name in _REGISTRY:
            raise ConfigError(f"initialiser {name!r} is registered already; choose another name")
        if "+" in name or "/" in name or not name:
            raise ConfigError(f"initialiser name {name!r} must not be empty or hold '+' or '/'")
        if kind not in list(Kind):
            raise unknown_name("kind of an initialiser", str(kind), [known.value for known in Kind])
        unknown = [need for need in needs if need not in NEEDS]
        if unknown:
            raise unknown_name("need of an initialiser", unknown[0], NEEDS)
        _REGISTRY[name] = (InitialiserInfo(name, Kind(kind).value, tuple(needs), paper, summary), factory)
        return factory

    return decorate


def _registry() -> dict[str, tuple[InitialiserInfo, Callable[[], Initialiser]]]:
    """The registry with the built-in initialisers and those of installed third parties loaded."""
    for module in _BUILT_IN:
        importlib.import_module(f"generators.{module}")  # they register by being imported
    for entry in importlib.metadata.entry_points(group=_ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # whatever a foreign module raises: one that is broken must not break the others
            log.warning("the initialisers of %s (%s) cannot be loaded: %r", entry.name, entry.value, error)
    return _REGISTRY


def needs_of(step: Initialiser) -> frozenset[str]:
    """What `step` says that it needs, and what it was registered with."""
    registered = _REGISTRY[step.name][0].needs if step.name in _REGISTRY else ()
    return frozenset((*registered, *getattr(step, "needs", ())))


def check_needs(chain: Iterable[Initialiser], **given: Any) -> None:
    """Raise `ConfigError` if a step of the chain needs something that was not passed to `init`."""
    for step in chain:
        for need in sorted(needs_of(step)):
            if need in given and given[need] is None:
                raise ConfigError(f"{step.name} needs {need}; pass {NEEDS[need]}")


def list_initialisers() -> list[InitialiserInfo]:
    """Every name that `init` takes: its kind, what it needs (data, loss, a graph, ...), source paper and a summary.

    First the registered ones, then the published generators, which need their checkpoint and are told more of in
    `generators.list_generators()`.

    Raises:
        CheckpointError: the index of published generators is damaged.
    """
    from generators.generator import generator_class
    from generators.published import list_generators

    published = [
        InitialiserInfo(entry.name, generator_class(entry.kind).kind.value, ("checkpoint",), entry.paper, entry.summary)
        for entry in list_generators()
    ]
    return [*(info for info, _ in _registry().values()), *published]


def resolve(spec: str | Initialiser) -> list[Initialiser]:
    """The chain of initialisers that `spec` names, checked for order.

    Args:
        spec: an initialiser or generator object; or names joined by `+`, each a registered initialiser, a published
            generator, or where a checkpoint lies (folder, https url, hub id).

    Raises:
        UnknownNameError: a step is none of these.
        ConfigError: the chain is empty, or a full initialiser follows another step and would undo it.
    """
    from generators.checkpoint import load
    from generators.published import list_generators, looks_like_location

    if not isinstance(spec, str):
        if isinstance(spec, type):
            raise ConfigError(f"expected an initialiser, got the class {spec.__name__}; pass an instance of it")
        if not isinstance(spec, Initialiser):
            raise ConfigError(f"expected an initialiser, a generator or a name, got {type(spec).__name__}")
        return [spec]
    registry = _registry()
    published = {entry.name for entry in list_generators()}
    parts = [spec] if Path(spec).expanduser().is_dir() else [part.strip() for part in spec.split("+")]
    chain: list[Initialiser] = []
    for part in parts:
        if not part:
            raise ConfigError(f"empty step in the chain {spec!r}; write it like 'he+lsuv'")
        if part in registry:
            chain.append(registry[part][1]())
        elif part in published or looks_like_location(part):
            chain.append(load(part))
        else:
            raise unknown_name(
                "initialiser or generator", part, [*registry, *published],
                way_out="`python -m generators list` shows all.",
            )  # fmt: skip
    for step in chain[1:]:
        if step.kind != Kind.REFINING:
            raise ConfigError(
                f"{step.name!r} fills every weight from nothing, so it would undo the steps before it in {spec!r}; "
                "put it first"
            )
    return chain
