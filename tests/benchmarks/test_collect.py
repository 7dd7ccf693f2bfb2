"""The training benchmark at its smallest; both sides reach the accuracies that such short trainings reach."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import BENCHMARKS, load_script


def test_figures_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    module = load_script(BENCHMARKS / "collect.py")
    variants = ("channels-last", "channels-last + bfloat16")
    size = module.Size(rounds=2, epochs=3, others=(), networks=9, steps=1, variants=variants)
    monkeypatch.setattr(module, "QUICK", size)
    monkeypatch.setattr(module, "MAIN", "mlp-1-w16")
    monkeypatch.setattr(module, "RESNET", module.replace(module.RESNET, architecture="resnet-8-w4", batch_size=16))
    module.benchmark(json_file=tmp_path / "figures.json", quick=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"tiny_speedup", "tiny_k", "resnet20_speedup", "git_commit", "torch_version"} < set(figures)
    assert figures["tiny_nets_per_core_minute"] > 0 and figures["plain_nets_per_core_minute"] > 0
    assert figures["tiny_speedup_lowest"] <= figures["tiny_speedup"] <= figures["tiny_speedup_highest"]
    assert figures["resnet20_speedup"] == figures["resnet20_speedup_channels_last_bfloat16"] > 0
    assert figures["tiny_accuracy"] == pytest.approx(figures["plain_accuracy"], abs=0.1) and figures["tiny_k"] in (
        2,
        4,
        8,
    )
    assert "mlp-1-w16" in capsys.readouterr().out
