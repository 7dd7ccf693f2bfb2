"""Any architecture: one contract over the registries of `benchmarks/coverage_models.py`, and models of rare kinds.

Every commit covers a fixed subset, `SUBSET` of the benchmark, in about 30 seconds on one quiet core. All models, some
200 in an hour:

    POWERHOUSE_COVERAGE=all python -m pytest tests/generators/test_coverage.py

Models of timm and transformers are skipped where these are not installed (extra `coverage`).
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import generators
from generators.errors import ModelError, TraceError
from generators.generator import Generator
from scripts import BENCHMARKS, load_script
from small_models import Forward

NEEDS = {"timm": "timm", "transformers": "transformers"}

benchmark = load_script(BENCHMARKS / "coverage.py")


def chosen() -> list[str]:
    """The names of the models to be covered; a family whose package is missing stands for all of its models."""
    wanted = os.environ.get("POWERHOUSE_COVERAGE", "subset")
    if wanted not in ("subset", "all"):
        raise pytest.UsageError(f"POWERHOUSE_COVERAGE is 'subset' or 'all', not {wanted!r}")
    if wanted == "subset":
        return list(benchmark.registry.SUBSET)
    missing = [name for name, package in NEEDS.items() if importlib.util.find_spec(package) is None]
    return benchmark.registry.every(without=missing) + missing


@pytest.fixture(scope="module")
def ghn() -> Generator:
    return generators.load(benchmark.GHN)


@pytest.mark.parametrize("name", chosen())
def test_every_tensor_is_accounted_for_and_the_forward_is_finite(name: str, ghn: Generator) -> None:
    package = NEEDS.get(name.partition("/")[0])
    if package is not None:
        pytest.importorskip(package, reason=f"{package} is not installed; it comes with the extra `coverage`")
    outcome = benchmark.check(name, ghn)
    assert not outcome.reason and not outcome.unaccounted
    assert outcome.nodes > 2


# ---- the contract can fail ------------------------------------------------------------------------------------------


class Overflowing(nn.Module):
    """Its forward is infinite whatever its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.inf


class Hiding(Overflowing):
    """A layer is infinite, but nothing of it is returned."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + torch.inf)[:0]


class Unreported(nn.Module):
    """Its state dict holds a tensor that is no buffer of it, of which no report can know."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_state_dict_post_hook(self._invent)

    @staticmethod
    def _invent(module: nn.Module, state: dict[str, Tensor], *_: object) -> None:
        state["lost"] = torch.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Overflowing, "the forward after he is not finite"),
        (Hiding, "the forward after he is not finite"),
        (Unreported, "lost"),
        (lambda: nn.ReLU(), "ModelError: ReLU has no parameters"),
    ],
)
def test_a_model_that_is_not_covered_has_its_reason(model, reason, ghn: Generator, monkeypatch) -> None:
    case = benchmark.registry.Case(model(), ((torch.ones(2, 3),),), torch.ones(2, 3))
    monkeypatch.setitem(
        benchmark.registry.FAMILIES, "bad", benchmark.registry.Family(lambda: ["one"], lambda name: case)
    )
    assert reason in benchmark.check("bad/one", ghn).reason


# ---- models of rare kinds -------------------------------------------------------------------------------------------


def accounted(model: nn.Module, report: generators.InitReport) -> bool:
    return sorted([*report.generated, *report.fallbacks, *report.kept]) == sorted(benchmark.tensors_of(model))


def steered() -> nn.Module:
    """Which of its layers runs depends on values."""
    return Forward(
        lambda m, x: m.head(m.body(x) if x.sum() > 0 else m.other(x)),
        body=nn.Linear(3, 8), other=nn.Linear(3, 8), head=nn.Linear(8, 10), gain=nn.Parameter(torch.ones(3)),
    )  # fmt: skip


def test_control_flow_that_depends_on_values(ghn: Generator) -> None:
    """Without inputs the error names the line and the way out, and nothing is written; with real ones it is filled."""
    model = steered()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TraceError, match=r"test_coverage.py:\d+ `.*x.sum\(\) > 0.*real inputs as `example_inputs=`"):
        generators.init(model, ghn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = generators.init(model, ghn, example_inputs=torch.ones(2, 3))
    assert accounted(model, report) and report.generated.keys() == {"body.weight", "head.weight"}
    assert "no operation of the traced graph consumes it" in report.fallbacks["other.weight"]
    assert not torch.equal(model.body.weight, before["body.weight"]) and model(torch.ones(2, 3)).isfinite().all()


def test_roles_that_need_a_trace_are_unknown_without_one() -> None:
    """Pointwise initialisers go on where a model cannot be traced; the report's note has the reason."""
    model = steered()
    report = generators.init(model, "he")
    assert accounted(model, report) and "roles of 1 parameters (gain, ...) are unknown" in report.notes[0]
    assert generators.init(model, "he", example_inputs=torch.ones(2, 3)).notes == ()


NO_FLOATS = {
    "complex": lambda: torch.ones(4, 4, dtype=torch.complex64),
    "integer": lambda: torch.ones(4, 4, dtype=torch.int8),
    "boolean": lambda: torch.ones(4, 4, dtype=torch.bool),
    "float8": lambda: torch.ones(4, 4).to(torch.float8_e4m3fn),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:.*quantized.*:DeprecationWarning", "ignore:.*quantized.*:UserWarning")
@pytest.mark.parametrize("kind", NO_FLOATS)
@pytest.mark.parametrize("spec", ["he", "ghn"])
def test_parameters_that_are_no_floats_are_kept_and_named(kind: str, spec: str, ghn: Generator) -> None:
    """Even when frozen ones are to be filled: what is written would not be what was meant."""
    value = NO_FLOATS[kind]()
    read = {"complex": lambda v: v.abs(), "quantised": lambda v: v.dequantize()}.get(kind, lambda v: v.float())
    model = Forward(
        lambda m, x: m.head(x @ read(m.table)),
        table=nn.Parameter(value.clone(), requires_grad=kind == "complex"), head=nn.Linear(4, 10),
    )  # fmt: skip
    initialiser = ghn if spec == "ghn" else spec
    report = generators.init(model, initialiser, frozen=True, example_inputs=torch.ones(2, 4))
    assert accounted(model, report) and "integer_complex_or_quantised" in report.kept["table"]
    assert torch.equal(read(model.table), read(value)) and model.table.dtype == value.dtype
    assert "head.weight" in report.generated


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_modules_have_nothing_to_fill(ghn: Generator) -> None:
    """Their weights are packed and no parameters."""
    whole = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), {nn.Linear})
    for initialiser in ("he", ghn):
        with pytest.raises(ModelError, match="Sequential has no parameters: there is nothing to initialise"):
            generators.init(whole, initialiser)


@pytest.mark.parametrize("spec", ["he", "ghn"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2)), "1.weight is a lazy parameter.*run the model once"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, device="meta")), r"1.weight is on the meta.*to_empty"),
    ],
)
def test_models_without_storage_are_refused_before_anything_is_written(model, message, spec, ghn: Generator) -> None:
    model = model()
    before = model[0].weight.clone()
    for call in (generators.init, lambda *args: ghn.sample(model, 2)):
        with pytest.raises(ModelError, match=message):
            call(model, ghn if spec == "ghn" else spec)
    assert torch.equal(model[0].weight, before)


def test_lazy_models_are_filled_after_one_forward(ghn: Generator) -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(10))
    model(torch.ones(2, 3))
    assert accounted(model, report := generators.init(model, ghn)) and len(report.generated) == 2


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("spec", ["he", "ghn"])
def test_every_precision_is_filled_in_its_own(dtype: torch.dtype, spec: str, ghn: Generator) -> None:
    """With the values of float32, rounded once."""
    initialiser = ghn if spec == "ghn" else spec
    model, single = small_net().to(dtype), small_net()
    assert generators.init(model, initialiser).generated.keys() == generators.init(single, initialiser).generated.keys()
    assert {value.dtype for value in model.parameters()} == {dtype}
    for name, value in model.named_parameters():
        assert torch.equal(value, single.get_parameter(name).to(dtype))
    states = ghn.sample(model, 2)
    assert torch.equal(states["4.weight"][0], model[4].weight) or spec == "he"
    assert {value.dtype for value in states.values()} == {dtype, torch.int64}


def test_mixed_precision_models() -> None:
    model = small_net()
    model[4].half()
    generators.init(model, "he")
    assert [value.dtype for value in model.parameters()] == [torch.float32] * 4 + [torch.float16] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no second device")
@pytest.mark.parametrize("spec", ["he", "ghn"])
def test_models_on_another_device_are_filled_where_they_are(spec: str, ghn: Generator) -> None:
    """With the values that they get on the CPU; real example inputs on the CPU are moved to the model."""
    here, there = small_net(), small_net().cuda()
    initialiser = ghn if spec == "ghn" else spec
    for model in (here, there):
        generators.init(model, initialiser)
    assert {value.device.type for value in there.parameters()} == {"cuda"}
    assert all(torch.equal(there.get_parameter(name).cpu(), value) for name, value in here.named_parameters())
    assert "body.weight" in generators.trace(steered().cuda(), torch.ones(2, 3)).by_parameter


def test_frozen_parameters_are_kept_unless_asked(ghn: Generator) -> None:
    model = small_net()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    report = generators.init(model, ghn)
    assert torch.equal(model[0].weight, before) and report.kept["0.weight"].startswith("frozen")
    assert torch.equal(ghn.sample(model, 2)["0.weight"], before.expand(2, -1, -1, -1, -1))
    report = generators.init(model, ghn, frozen=True)
    assert not torch.equal(model[0].weight, before) and report.generated["0.weight"] == ghn.name
    assert not model[0].weight.requires_grad


def test_parameters_in_lists_and_dictionaries(ghn: Generator) -> None:
    """`nn.ParameterList` and `nn.ParameterDict`, as adapters and ensembles keep them."""
    model = Forward(
        lambda m, x: F.linear(F.linear(x, m.many[0]) + m.named["shift"], m.many[1]),
        many=nn.ParameterList([torch.zeros(8, 3), torch.zeros(10, 8)]),
        named=nn.ParameterDict({"shift": torch.ones(8)}),
    )  # fmt: skip
    report = generators.init(model, ghn)
    assert accounted(model, report) and report.generated.keys() == {"many.0", "many.1"}
    assert "linear_bias 0" in report.fallbacks["named.shift"]
