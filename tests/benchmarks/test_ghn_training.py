"""The benchmark of a GHN's training step at its smallest: every figure that it promises, in a sane range."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import BENCHMARKS, load_script


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_figures_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    module = load_script(BENCHMARKS / "ghn_training.py")
    module.benchmark(json_file=tmp_path / "figures.json", rounds=1, architectures=("resnet-8-w4",))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"git_commit", "torch_version", "machine", "load_average"} < set(figures)
    assert figures["architectures"] == ["resnet-8-w4"]
    assert figures["train_step_s"] > 0
    assert 0 < figures["train_ghn_share"] < 1
    assert 0 <= figures["train_peak_bytes"] < 2**30
    assert "train_ghn_share" in capsys.readouterr().out
