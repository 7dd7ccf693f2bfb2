"""The benchmark of slices at its smallest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import BENCHMARKS, load_script


def test_figures_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    module = load_script(BENCHMARKS / "slices.py")
    monkeypatch.setattr(module, "QUICK", module.Size(rounds=1, networks=12, batches=800, slow_batches=10))
    monkeypatch.setattr(module, "ARCHITECTURE", "resnet-8-w16")
    module.benchmark(json_file=tmp_path / "figures.json", quick=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(module.MEANING) < set(figures) and {"git_commit", "torch_version", "machine"} < set(figures)
    assert figures["slices_per_copy"] == pytest.approx(figures["slices_gb_per_s"] / figures["copy_gb_per_s"])
    assert figures["slices_per_ram"] > 0 and figures["slices_per_files"] > 0
    assert "slices_gb_per_s" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
