"""The benchmark of the index at its smallest: it checks itself that the filter finds what it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import BENCHMARKS, load_script


def test_figures_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    module = load_script(BENCHMARKS / "zoo_index.py")
    monkeypatch.setattr(module, "QUICK", module.Size(runs=2000, rounds=1, real=2))
    module.benchmark(json_file=tmp_path / "figures.json", quick=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(module.MEANING) < set(figures) and {"git_commit", "torch_version", "machine"} < set(figures)
    assert figures["index_runs"] == 2000 and figures["index_files"] == 8 and figures["index_files_small_files"] == 250
    assert figures["index_filter_s"] > 0 and figures["index_open_s"] > 0
    for name in ("status_s", "resume_s"):
        assert figures[name] > 0 and figures[f"{name}_small_files"] > 0
    assert "index_open_s" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
