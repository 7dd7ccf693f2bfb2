"""The GHN benchmark at its smallest: every figure that it promises, in a sane range."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import BENCHMARKS, load_script


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_figures_table_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    module = load_script(BENCHMARKS / "ghn.py")
    size = module.Size(models=("squeezenet1_1",), rounds=1, measured=2, meta_batch=("resnet-8-w4",), processes=1)
    monkeypatch.setattr(module, "QUICK", size)
    module.benchmark(json_file=tmp_path / "figures.json", quick=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {"git_commit", "torch_version", "machine", "load_average"} < set(figures)
    for key in (
        "graph_s",
        "total_s",
        "encode_s",
        "peak_extra_ratio",
        "distinct_share",
        "rank_share",
        "stable_rank_share",
        "least_stable_rank_share",
        "least_std_ratio",
        "greatest_std_ratio",
    ):
        for prefix in ("", "noise_", "trained_"):
            assert 0 < figures[f"{prefix}{key}/squeezenet1_1"] == figures[f"median_{prefix}{key}"], key
    assert figures["noise_distinct_share/squeezenet1_1"] > 0.95 and figures["noise_rank_share/squeezenet1_1"] == 1
    assert figures["trained_least_std_ratio/squeezenet1_1"] > 0.9
    assert figures["sample100_ratio"] == pytest.approx(figures["sample100_s"] / figures["sample1_s"])
    assert 0 < figures["train_ghn_share"] < 1
    assert "train_ghn_share" in capsys.readouterr().out


def test_a_hundred_members_alone(tmp_path: Path) -> None:
    """In a process of their own, and nothing else is measured."""
    module = load_script(BENCHMARKS / "ghn.py")
    module.benchmark(json_file=tmp_path / "figures.json", quick=True, only_members=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["sample100_ratios"] == [pytest.approx(figures["sample100_ratio"], abs=0.01)]
    assert not [key for key in figures if key.startswith(("median_", "train_"))]
