"""Variants of a GHN at equal training time: what differs between them, and a tiny study from end to end."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from collect.zoo import Zoo
from generators.errors import CheckpointError, UnknownNameError
from scripts import BENCHMARKS, load_script


def test_a_tiny_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One collapsed GHN, one that is judged, and He at the rate that ends best on validation images."""
    module = load_script(BENCHMARKS / "variants.py")

    def here(jobs, *, workers, on_tick):  # in this process, where what is patched is
        assert workers == 1
        for job in jobs:
            yield job(on_tick)

    def fit(config, out, **options):
        if config.name == "block":
            raise CheckpointError("collapsed")
        return trained(config, out, **options)

    trained = module.fit
    monkeypatch.setattr(module, "in_processes", here)
    monkeypatch.setattr(module, "step_seconds", lambda config, steps: 0.1 if config.ghn.decoder == "core" else 0.25)
    monkeypatch.setattr(module, "fit", fit)
    study = {
        "json_file": tmp_path / "figures.json", "quick": True, "variants": ("core", "block"),
        "starts": ("orthogonal",), "seeds": (0, 1),
        "architectures": ("vgg-3-w6",), "he_rates": (1e-5, 0.1), "seconds": 1.0, "out": tmp_path,
    }  # fmt: skip
    module.benchmark(**study)
    figures, out = json.loads((tmp_path / "figures.json").read_text()), tmp_path / "quick"
    assert figures["steps"] == {"core": 10, "block": 4}, "a second of CPU time each"
    assert figures["refused"] == {"block-0": "collapsed", "block-1": "collapsed"}
    assert set(figures["cpu_seconds"]) == {"core-0", "core-1"} and min(figures["cpu_seconds"].values()) > 0
    ends: dict[float, list[float]] = {}
    for seed in (0, 1):
        for found in Zoo(out / f"he-{seed}" / "zoo").populations:
            assert list(found.seeds) == [module.FIRST_SEED + seed]
            ends.setdefault(found.recipe.lr, []).append(found.metrics[0, -1, found.metric_names.index("test_accuracy")])
    with (out / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["start"], row["lr"]) for row in rows} == {("he", "0.1"), ("core", "0.1"), ("orthogonal", "0.1")}
    last = max(int(row["step"]) for row in rows)
    assert figures[f"vgg-3-w6/he/0.1/accuracy_{last}"] == pytest.approx(sum(ends[0.1]) / 2)
    shown = [float(row["test_accuracy"]) for row in rows if row["start"] == "he" and int(row["step"]) == last]
    assert shown == pytest.approx(ends[0.1], abs=1e-4)
    assert (out / "variants.md").read_text().count("| vgg-3-w6 |") == 3 and (out / "vgg-3-w6.png").exists()
    times = (out / "core-0" / "cpu_seconds.json").read_text()
    monkeypatch.setattr(module, "step_seconds", None)  # what was timed is not timed again
    module.benchmark(**study)
    assert json.loads((tmp_path / "figures.json").read_text())["steps"] == figures["steps"]
    assert (out / "core-0" / "cpu_seconds.json").read_text() == times, "a GHN that was there has no time of its own"


def test_variants_differ_in_what_their_names_say_and_leave_unseen_unseen() -> None:
    module = load_script(BENCHMARKS / "variants.py")
    assert not set(module.TRAINED_ON) & set(module.UNSEEN)
    for name, changes in module.VARIANTS.items():
        made = replace(module.NOISE.ghn, **changes)  # every one is a GHN
        differing = {field for field in changes if getattr(made, field) != getattr(module.NOISE.ghn, field)}
        assert differing == set(changes), f"{name} says that it changes what is so by default"
    with pytest.raises(UnknownNameError, match="core-no-anchor"):
        module.benchmark(json_file=Path("never"), quick=True, variants=("core-no-ancor",))


def test_steps_are_timed_in_cpu_seconds() -> None:
    module = load_script(BENCHMARKS / "variants.py")
    config = replace(module.NOISE, architectures=("vgg-3-w4",), data="digits")
    assert 0 < module.step_seconds(config, 2) < 60
    seconds, done = module.stopwatch()
    done(0)
    assert seconds == [], "the first call starts the clock"
    done(1)
    done(1)
    assert len(seconds) == 2 and min(seconds) >= 0
