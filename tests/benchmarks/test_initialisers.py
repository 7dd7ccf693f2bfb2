"""The benchmark of initialisers: what it lists, how costs are counted, and a tiny study from end to end."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from collect.data import load
from generators import initialiser
from generators.initialiser import list_initialisers
from generators.published import list_generators
from scripts import BENCHMARKS, load_script, operations


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which registers a start of its own."""
    list_initialisers()
    monkeypatch.setattr(initialiser, "_REGISTRY", dict(initialiser._REGISTRY))
    script = load_script(BENCHMARKS / "initialisers.py")
    monkeypatch.setattr(script, "cpu_seconds", operations)
    return script


def test_every_registered_method_is_in_a_study_unless_it_cannot_be(benchmark: ModuleType) -> None:
    found = {name for chain in benchmark.methods("fashion") for name in chain.split("+")}
    left_out = {info.name for info in list_initialisers()} - found
    assert left_out == {
        "weight-selection", "layer-fusion", "hyperfan", "hyperfan-out", "hyperfan-harmonic", benchmark.EXPLODING
    }  # fmt: skip


def test_learned_starts_are_compared_on_the_data_that_they_have_seen(benchmark: ModuleType) -> None:
    published = {entry.name: entry.data for entry in list_generators()}
    for data, chains in benchmark.LEARNED.items():
        assert {published[chain.removesuffix("+lsuv")] for chain in chains} == {data}
        assert set(chains) < set(benchmark.methods(f"folder/{data}.npz"))


def test_a_curve_between_its_evaluations(benchmark: ModuleType) -> None:
    steps, curve = np.array([0, 10, 20]), np.array([0.1, 0.5, 0.7])
    assert [benchmark.at_step(steps, curve, step) for step in (0, 10, 15, 99)] == pytest.approx([0.1, 0.5, 0.6, 0.7])


def test_a_tiny_study(benchmark: ModuleType, tmp_path: Path) -> None:
    study = replace(benchmark.QUICK["mlp"], inits=("he", "he+lsuv", benchmark.EXPLODING))
    figures = benchmark.carry_out("mlp", study, "digits", tmp_path)
    for chain in study.inits:
        of = {key.split("/")[2]: value for key, value in figures.items() if key.startswith(f"mlp/{chain}/")}
        assert of["lr"] == 0.1 and of["finished"] == 2 and of["cost_steps"] > 0
        assert 0 <= of["accuracy_10"] <= 1 and of["train_loss_10"] > 0
    assert figures["mlp/he+lsuv/cost_steps"] > figures["mlp/he/cost_steps"]  # it runs the model besides
    assert (tmp_path / "report" / "report.md").exists()
    with (tmp_path / "records.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["start"] == "he"]
    assert [(row["seed"], row["chosen"], row["lr"]) for row in rows] == [("0", "1", "0.1"), ("1", "1", "0.1")]
    ends = [float(row["test_accuracy_end"]) for row in rows]
    assert sum(ends) / 2 == pytest.approx(figures["mlp/he/accuracy_end"], abs=1e-4)
    assert benchmark.picture("mlp", study, figures).startswith(b"\x89PNG")
    text = benchmark.markdown(["mlp"], {"mlp": study}, figures)
    assert f"{100 * figures['mlp/he/accuracy_end']:.1f} ± {100 * figures['mlp/he/accuracy_end_std']:.1f}" in text
    order = benchmark.by_end("mlp", figures)
    assert sorted(order) == sorted(study.inits) and text.index(f"| {order[0]} |") < text.index(f"| {order[1]} |")
    assert figures["mlp/he+lsuv/counted_accuracy_10"] < figures["mlp/he+lsuv/accuracy_10"]  # ten steps, less its cost


def test_the_cost_is_that_of_filling(benchmark: ModuleType) -> None:
    """A hundred iterations of NIO cost far more than drawing He's weights."""
    study, images = benchmark.QUICK["mlp"], load("digits")
    assert benchmark.cost_in_steps(study, images, "he+nio") > 3 * benchmark.cost_in_steps(study, images, "he")
