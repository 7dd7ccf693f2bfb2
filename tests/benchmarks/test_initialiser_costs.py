"""The costs of initialisers: every figure that is promised, with operations counted in place of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from scripts import BENCHMARKS, load_script, operations


def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """On smaller models. In operations NIO and GradInit keep the bound of four plain steps."""
    module = load_script(BENCHMARKS / "initialiser_costs.py")
    build = module.build
    monkeypatch.setattr(module, "build", lambda name, **facts: build("resnet-8-w4", **facts))
    monkeypatch.setattr(module.torchvision.models, "resnet50", module.torchvision.models.resnet18)
    monkeypatch.setattr(module, "BATCH", 16)
    monkeypatch.setattr(module, "cpu_seconds", operations)
    module.benchmark(json_file=tmp_path / "costs.json", quick=True)
    figures = json.loads((tmp_path / "costs.json").read_text())
    for name, most in (("nio", 4), ("gradinit", 4), ("metainit", 16)):
        assert 1 < figures[f"{name}_step_ratio"] <= most, name
    assert figures["rewire_resnet50_s"] == figures["rewire_by_choice_ratio"] == 1  # no product at all
    assert 1 <= figures["lsuv_forwards"] <= 3
    assert "nio_step_ratio" in capsys.readouterr().out


def test_the_slow_rewiring_permutes_rows_and_draws_columns_together() -> None:
    module, draws = load_script(BENCHMARKS / "initialiser_costs.py"), np.random.default_rng(0)
    before = draws.standard_normal((64, 64))
    after = before.copy()
    module.by_choice(after, draws)
    assert np.array_equal(np.sort(after, axis=1), np.sort(before, axis=1))
    assert after.sum(axis=0).var() < 0.3 * before.sum(axis=0).var()


def test_a_plain_step_is_one_of_sgd() -> None:
    module = load_script(BENCHMARKS / "initialiser_costs.py")
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    batch = (torch.ones(4, 3), torch.tensor([0, 1, 0, 0]))
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    slope = model.weight.grad.clone()
    module.plain_step(model, batch)()
    torch.testing.assert_close(model.weight.detach(), before - 1e-4 * slope)
