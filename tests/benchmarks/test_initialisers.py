"""The benchmark of initialisers: what it lists, how costs are counted, and a tiny study from end to end."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import initialiser_studies as studies
from collect.architectures import build
from collect.data import load
from generators import grad_cosine, init, initialiser
from generators.initialiser import Kind, Proposal, Request, list_initialisers
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
    found = {name for chain in studies.methods("fashion") for name in chain.split("+")}
    left_out = {info.name for info in list_initialisers() if "checkpoint" not in info.needs} - found
    assert left_out == {
        "weight-selection", "layer-fusion", "hyperfan", "hyperfan-out", "hyperfan-harmonic", benchmark.EXPLODING
    }  # fmt: skip


def test_a_curve_between_its_evaluations(benchmark: ModuleType) -> None:
    steps, curve = np.array([0, 10, 20]), np.array([0.1, 0.5, 0.7])
    assert [benchmark.at_step(steps, curve, step) for step in (0, 10, 15, 99)] == pytest.approx([0.1, 0.5, 0.6, 0.7])


def test_a_tiny_study(benchmark: ModuleType, tmp_path: Path) -> None:
    study = replace(benchmark.QUICK["mlp"], inits=("he", "he+lsuv", benchmark.EXPLODING))
    figures = benchmark.carry_out("mlp", study, "digits", tmp_path)
    for chain in study.inits:
        of = {key.split("/")[2]: value for key, value in figures.items() if key.startswith(f"mlp/{chain}/")}
        assert of["lr"] == 0.1 and of["finished"] == 2 and of["cost_steps"] > 0 and -1 <= of["grad_cosine"] <= 1
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


def test_a_study_on_the_first_images_chooses_rates_on_other_networks(benchmark: ModuleType, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images, labels = generator.random((400, 8, 8), dtype=np.float32), np.arange(400) % 10
    path = tmp_path / "blobs.npz"
    images += labels[:, None, None]
    np.savez(path, x_train=images[:300], y_train=labels[:300], x_test=images[300:], y_test=labels[300:])
    study = replace(
        benchmark.QUICK["mlp"], inits=("he", "xavier"), rates=(1e-9, 0.03), tuning_runs=1, images=200
    )  # fmt: skip
    study = replace(study, recipe=replace(study.recipe, batch_size=30))
    figures = benchmark.carry_out("mlp", study, str(path), tmp_path)
    assert figures["mlp/he/lr"] == figures["mlp/xavier/lr"] == 0.03  # at the other nothing is learned
    with (tmp_path / "records.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["start"] == "he"]
    found = sorted((row["chosen"], row["lr"], row["seed"]) for row in rows)
    assert found == [("0", "0.03", "1000"), ("0", "1e-09", "1000"), ("1", "0.03", "0"), ("1", "0.03", "1")]
    part = load(str(tmp_path / "data" / "blobs.npz"))
    assert (len(part.train), len(part.validation), len(part.test)) == (180, 20, 100)
    with np.load(tmp_path / "data" / "blobs.npz") as stored:
        assert np.array_equal(stored["x_train"][..., 0], images[:200])


def test_the_cost_is_that_of_filling_and_gradients_are_those_of_the_start(benchmark: ModuleType) -> None:
    """A hundred iterations of NIO cost far more than drawing He's weights."""
    study, images = benchmark.QUICK["mlp"], load("digits")
    he, nio = (benchmark.at_start(study, images, start) for start in ("he", "he+nio"))
    assert nio["cost_steps"] > 3 * he["cost_steps"]
    model = build(study.recipe.architecture, shape=images.shape, classes=10)
    init(model, "he")
    expected = grad_cosine(model, benchmark.first_batches(images), nn.functional.cross_entropy)
    assert (he["grad_cosine"], he["gradient_norm"]) == (expected.cosine, expected.gradient_norm)


def test_a_start_without_a_finite_loss_has_no_gradients(benchmark: ModuleType) -> None:
    class Infinite:
        name, kind = "infinite", Kind.POINTWISE

        def propose(self, model: nn.Module, request: Request) -> Proposal:
            values = {name: torch.full_like(value, 1e38) for name, value in model.named_parameters()}
            return Proposal(values, dict.fromkeys(values, self.name))

    found = benchmark.at_start(benchmark.QUICK["mlp"], load("digits"), Infinite())
    assert np.isnan(found["grad_cosine"]) and np.isnan(found["gradient_norm"])
