"""He against a generator at each start's own learning rate: the choice, and a tiny study from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from collect.zoo import Zoo
from scripts import BENCHMARKS, load_script


def test_a_tiny_study(tmp_path: Path) -> None:
    """The rate is the one that ends best on validation images, and is used for seeds that the search has not seen."""
    module = load_script(BENCHMARKS / "unseen.py")
    module.benchmark(
        json_file=tmp_path / "figures.json", quick=True, start="orthogonal", architectures=("bare-resnet-8-w4",),
        rates=(1e-5, 0.1), runs=2, out=tmp_path,
    )  # fmt: skip
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["runs"] == 2 and "git_commit" in figures
    searched, compared = Zoo(tmp_path / "search" / "bare-resnet-8-w4"), Zoo(tmp_path / "zoo")
    ends: dict[str, dict[float, float]] = {}
    for found in searched.populations:
        assert list(found.seeds) == [3]
        column = found.metric_names.index("validation_accuracy")
        ends.setdefault(found.recipe.init, {})[found.recipe.lr] = found.metrics[0, -1, column]
    assert sorted(ends) == ["he", "he+lsuv", "orthogonal+lsuv"]
    for found in compared.populations:
        tried = ends[found.recipe.init]
        assert sorted(tried) == [1e-5, 0.1] and tried[found.recipe.lr] == max(tried.values())
        assert not set(found.seeds) & {3}
        assert len(found.seeds) == 2
        end = figures[f"bare-resnet-8-w4/{found.recipe.init}/{found.recipe.lr:g}/accuracy_10"]
        assert end == pytest.approx(found.metrics[:, -1, found.metric_names.index("test_accuracy")].mean())
    assert (tmp_path / "search.md").read_text().count("| bare-resnet-8-w4 |") == 6
    assert (tmp_path / "unseen.md").read_text().count("| bare-resnet-8-w4 |") == 3
    assert (tmp_path / "bare-resnet-8-w4.png").exists()
