"""The benchmark of sampling at its smallest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import BENCHMARKS, load_script


def test_every_kind_has_a_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    module = load_script(BENCHMARKS / "sampling.py")
    measure = module.measure
    monkeypatch.setattr(module, "measure", lambda rounds, channels: measure(1, 16))
    module.benchmark(json_file=tmp_path / "figures.json", quick=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    rates = {name: figures[f"slices_per_s/{name}"] for name in ("he", *module.SLICE_MODELS)}
    assert all(rate > 0 for rate in rates.values())
    assert "slices_per_s/conv-vae" in capsys.readouterr().out and "git_commit" in figures
