"""The storage benchmark at its smallest: it checks itself that both ways hold the same networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import BENCHMARKS, load_script


def test_figures_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    module = load_script(BENCHMARKS / "zoo_io.py")
    monkeypatch.setattr(module, "QUICK", module.Size(rounds=1, files=1, batches=2))
    monkeypatch.setattr(module, "LARGE", 64)
    module.benchmark(json_file=tmp_path / "figures.json", quick=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(module.MEANING) < set(figures) and {"git_commit", "torch_version", "machine"} < set(figures)
    assert figures["group_per_net_ratio"] == pytest.approx(
        figures["durable_nets_per_s"] / figures["group_per_net_nets_per_s"]
    )
    assert figures["group_per_net_ratio"] > 0 and figures["group_per_net_read_ratio"] > 0
    assert figures["nets"] == 64
    assert "random_nets_per_s" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
