"""The coverage benchmark at its smallest: figures, table, JSON, and that a failure is told with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from generators.commandline import Interrupted
from generators.errors import UnknownNameError
from scripts import BENCHMARKS, load_script


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script(BENCHMARKS / "coverage.py")
    monkeypatch.setattr(module, "CHAIN", 30)
    return module


def test_figures_table_and_json(benchmark: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    broken = benchmark.registry.Case(nn.Linear(3, 2), ((torch.full((2, 3), torch.nan),),), torch.ones(2, 3))
    monkeypatch.setitem(benchmark.registry.PLAIN, "broken", lambda: broken)
    monkeypatch.setattr(benchmark.registry, "SUBSET", ("plain/mlp", "plain/lstm", "plain/broken"))
    benchmark.benchmark(json_file=tmp_path / "figures.json", quick=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"git_commit", "torch_version", "machine", "timm_ok", "timm_total"} < set(figures)
    assert (figures["plain_ok"], figures["plain_total"], figures["unaccounted_tensors"]) == (2, 3, 0)
    assert (figures["nodes/plain/mlp"], figures["generated/plain/mlp"]) == (4, pytest.approx(2368 / 2410, abs=1e-4))
    assert figures["reason/plain/broken"] == "the forward after he is not finite"
    assert figures["trace_1000_nodes_s"] > 0 and figures["forward_1000_nodes_s"] > 0
    assert "the forward after he is not finite" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_models_and_families_alone(benchmark: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown model 'plain/mpl'.*did you mean 'plain/mlp'"):
        benchmark.selected(("plain/mpl",))
    assert benchmark.selected(("plain/mlp", "transformers")) == [
        "transformers/gpt2", "transformers/bert", "transformers/llama", "transformers/t5", "plain/mlp"
    ]  # fmt: skip


def test_an_interruption_is_no_reason(benchmark: ModuleType, monkeypatch) -> None:
    def interrupted() -> None:
        raise Interrupted("asked to terminate")

    monkeypatch.setitem(benchmark.registry.PLAIN, "mlp", interrupted)
    with pytest.raises(Interrupted):
        benchmark.check("plain/mlp", "he")


def test_the_subset_is_part_of_the_whole(benchmark: ModuleType) -> None:
    pytest.importorskip("timm", reason="timm is not installed; it comes with the extra `coverage`")
    every = benchmark.registry.every()
    assert set(benchmark.registry.SUBSET) < set(every) and len(set(every)) == len(every)
    assert sum(name.startswith("torchvision/") for name in every) == 80
    assert {name.partition("/")[0] for name in benchmark.registry.SUBSET} == set(benchmark.registry.FAMILIES)


def test_a_chain_has_the_nodes_that_it_is_asked_for(benchmark: ModuleType) -> None:
    assert len(benchmark.trace(benchmark.chain(1000), torch.zeros(2, 8))) == 1000 - (1000 - 3) % 3
