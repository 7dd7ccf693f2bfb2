"""Which architectures can be traced and filled? Every classification model of torchvision, timm, transformers, and kin.

Of each architecture one model is built; its graph is traced; `he` and a graph hypernetwork fill it. It counts as
covered if the graph is found, both reports account for every tensor (counted here on its own, not by the report), and
a forward, batch norms on the statistics of its batch, is finite in all layers after both. The tracer guesses inputs,
but for models whose control flow depends on values (detection, T5).

    python benchmarks/coverage.py --json coverage.json [--quick] [--only timm/vision_transformer ...]

Prints a table and writes its figures as flat JSON with machine, versions and commit: per family `FAMILY_ok` and
`FAMILY_total`; over all `unaccounted_tensors` and `unknown_roles` (parameters that no rule names); per model
`nodes/MODEL`, `trace_s/MODEL` and `generated/MODEL` (share of the values of its parameters that the GHN makes), and
for one that is not covered `reason/MODEL`, a text. Times are processor seconds.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

# Or `collect` would be the benchmark of that name beside this file.
sys.path = [str(Path(__file__).parents[1]), *(place for place in sys.path if Path(place) != Path(__file__).parent)]

import torch  # noqa: E402
import tyro  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.modules.batchnorm import _NormBase  # noqa: E402

import generators  # noqa: E402
from benchmarks import coverage_models as registry  # noqa: E402
from benchmarks.measuring import store  # noqa: E402
from generators.commandline import Interrupted, progress, run  # noqa: E402
from generators.errors import unknown_name  # noqa: E402
from generators.graph import trace  # noqa: E402
from generators.graph.drafts import tensors_in  # noqa: E402
from generators.inventory import Role, inventory  # noqa: E402

log = logging.getLogger(__name__)

GHN = "noise-ghn-digits"
CHAIN = 1000  # nodes of the model whose trace is timed


@dataclass
class Outcome:
    """What became of one model.

    Attributes:
        name: family/name.
        reason: why it is not covered, "" if it is.
        unaccounted: names of tensors that a report lacks or made up.
        unknown: parameters without a role.
        nodes: of its graph.
        trace_s: processor seconds of its trace.
        generated: share of the values of its parameters that the GHN makes.
    """

    name: str
    reason: str = ""
    unaccounted: set[str] = field(default_factory=set)
    unknown: int = 0
    nodes: int = 0
    trace_s: float = 0.0
    generated: float = 0.0


# ---- the contract ---------------------------------------------------------------------------------------------------


def tensors_of(model: nn.Module) -> set[str]:
    """Every name of every parameter, and every buffer that a state dict holds."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return names | {name for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def finite_forward(model: nn.Module, inputs: Any) -> bool:
    """Whether the outputs, and the results of every module with parameters of its own, are finite.

    A detector that is unsure returns no box at all, so its outputs alone would tell little. In evaluation mode, but for
    batch norms, which have nothing but this batch to go by.
    """
    finite: list[bool] = []

    def look(result: Any) -> None:
        finite.extend(bool(value.isfinite().all()) for value in tensors_in(result) if value.is_floating_point())

    hooks = []
    for module in model.eval().modules():
        if isinstance(module, _NormBase):
            module.train()
        if next(module.parameters(recurse=False), None) is not None:
            hooks.append(module.register_forward_hook(lambda module, args, result: look(result)))
    try:
        with torch.no_grad():
            look(model(**inputs) if isinstance(inputs, dict) else model(*inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return bool(finite) and all(finite)


def check(name: str, ghn: Any) -> Outcome:
    """Trace and fill the model `family/name`; whatever goes wrong is the reason why it is not covered."""
    outcome = Outcome(name)
    family, _, own = name.partition("/")
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(0)
            contract(registry.FAMILIES[family].build(own), ghn, outcome)
    except Interrupted:
        raise
    except Exception as error:
        outcome.reason = " ".join(f"{type(error).__name__}: {error}".split())
    return outcome


def contract(case: registry.Case, ghn: Any, outcome: Outcome) -> None:
    """Fill in `outcome`."""
    model = case.model
    start = time.process_time()
    graph = trace(model, case.example)
    outcome.trace_s = time.process_time() - start
    outcome.nodes = len(graph)
    outcome.unknown = len(inventory(model, graph).where(Role.MATRIX, Role.OTHER))
    inputs = None
    for initialiser in ("he", ghn):
        report = generators.init(model, initialiser, example_inputs=case.example)
        accounted = [*report.generated, *report.fallbacks, *report.kept]
        outcome.unaccounted |= tensors_of(model) ^ set(accounted)
        unnamed = [*report.generated.values(), *report.fallbacks.values(), *report.kept.values()].count("")
        if outcome.unaccounted or unnamed or len(accounted) > len(set(accounted)):
            outcome.reason = f"{report.initialiser} accounts badly for {sorted(outcome.unaccounted)[:3]}, ..."
            return
        if inputs is None:
            inputs = fitting(model, case.inputs)
        if not finite_forward(model, inputs):
            outcome.reason = f"the forward after {report.initialiser} is not finite"
            return
    sizes = {key: value.numel() for key, value in model.named_parameters()}
    outcome.generated = sum(sizes.get(key, 0) for key in report.generated) / sum(sizes.values())


def fitting(model: nn.Module, candidates: tuple[Any, ...]) -> Any:
    """The first of `candidates` that the model accepts; the last one must do."""
    for inputs in candidates[:-1]:
        try:
            finite_forward(model, inputs)
            return inputs
        except (RuntimeError, AssertionError, ValueError):
            continue
    return candidates[-1]


# ---- the time of a trace --------------------------------------------------------------------------------------------


def chain(nodes: int) -> nn.Module:
    """Residual blocks of linear, normalisation and add with `nodes` nodes in all, input and output included."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(self.norm(x))

    return nn.Sequential(nn.Linear(8, 8), *(Block() for _ in range((nodes - 3) // 3)))


def trace_times(nodes: int, repeats: int = 5) -> tuple[float, float]:
    """Processor seconds of a trace of a chain, and of its own forward on the meta device: the best of some repeats."""
    model = chain(nodes)
    bare = chain(nodes).to("meta")
    inputs = torch.zeros(2, 8, device="meta")

    def best(function: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        return min(times)

    with torch.no_grad():
        return best(lambda: trace(model, inputs)), best(lambda: bare(inputs))


# ---- the entry point ------------------------------------------------------------------------------------------------


def figures_of(outcomes: list[Outcome]) -> dict[str, float | str]:
    total = Counter(outcome.name.partition("/")[0] for outcome in outcomes)
    covered = Counter(outcome.name.partition("/")[0] for outcome in outcomes if not outcome.reason)
    figures: dict[str, float | str] = {}
    for family in registry.FAMILIES:
        figures[f"{family}_ok"], figures[f"{family}_total"] = covered[family], total[family]
    figures["unaccounted_tensors"] = sum(len(outcome.unaccounted) for outcome in outcomes)
    figures["unknown_roles"] = sum(outcome.unknown for outcome in outcomes)
    for outcome in outcomes:
        if outcome.reason:
            figures[f"reason/{outcome.name}"] = outcome.reason
        for key in ("unknown", "nodes", "trace_s", "generated"):
            if getattr(outcome, key):
                figures[f"{key}/{outcome.name}"] = round(getattr(outcome, key), 4)
    return figures


def selected(only: tuple[str, ...]) -> list[str]:
    """The models that `only` names, by themselves or with their whole family.

    Raises:
        UnknownNameError: it names nothing.
    """
    known = registry.every(without=set(registry.FAMILIES) - {name.partition("/")[0] for name in only})
    for name in only:
        if name not in known and name not in registry.FAMILIES:
            raise unknown_name("model", name, [*known, *registry.FAMILIES])
    return [name for name in known if name in only or name.partition("/")[0] in only]


def benchmark(
    *, json_file: Annotated[Path, tyro.conf.arg(name="json")], quick: bool = False, only: tuple[str, ...] = ()
) -> None:
    """Trace and fill every architecture of the registries.

    Args:
        json_file: Where the figures go.
        quick: A fixed subset that ends within a minute.
        only: These models or families alone, as family/name or family.
    """
    ghn = generators.load(GHN)
    outcomes = []
    names = selected(only) if only else registry.SUBSET if quick else registry.every()
    with progress("architectures", len(names)) as bar:
        for name in names:
            bar.describe(name)
            outcomes.append(check(name, ghn))
            if outcomes[-1].reason:
                log.warning("%s: %s", name, outcomes[-1].reason)
            gc.collect()
            bar.advance()
    figures = figures_of(outcomes)
    whole, alone = trace_times(CHAIN)
    longer, _ = trace_times(4 * CHAIN)
    figures |= {
        "trace_1000_nodes_s": whole,
        "forward_1000_nodes_s": alone,
        "trace_4000_nodes_ratio": longer / whole,
    }
    table = Table("figure", "value")
    for key, value in figures.items():
        if "/" not in key:
            table.add_row(key, f"{value:.3g}")
    for outcome in outcomes:
        if outcome.reason:
            table.add_row(outcome.name, outcome.reason)
    Console(soft_wrap=True).print(table)
    store(json_file, figures, ghn=GHN)


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(run(partial(tyro.cli, benchmark)))
