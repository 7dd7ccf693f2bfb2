"""Fidelity as cards say it: the table against the figures, the records in docs, and cards that do not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from generators.checkpoint import load, save
from generators.errors import CheckpointError, ConfigError
from train_generators import cli
from train_generators.local_fidelity import SHOWN, recorded, span, table
from train_generators.training_state import save_state

RESULTS = Path(__file__).parents[2] / "docs" / "results"
ROWS = {
    f"conv_weight-3x3-{bucket}": {
        **dict.fromkeys(SHOWN, 1.0), "active_units": 7 + bucket, "latent_units": 9, "auroc": auroc
    }
    for bucket, auroc in enumerate((0.5, 0.49, 0.516))
}  # fmt: skip


def write(out: Path, metrics: dict[str, Any] = ROWS, **facts: Any) -> str:
    """The published generator with another card, as a checkpoint in `out`."""
    generator = load("conv-vae-digits")
    generator.name = out.name
    generator.card = {"metrics": metrics, "zoo": {"digest": 1}, **facts}
    save(generator, out)
    return str(out)


def test_a_line_has_the_least_and_the_greatest_of_the_groups(tmp_path):
    line = table(recorded([write(tmp_path / "one")])).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["`one`", "1.00 (1.00)", "1.000", "0.49 to 0.52", "1.00", "7/9, 8/9, 9/9", "1.000", ""]
    assert span([{"a": 0.494}, {"a": 0.491}], "a") == "0.49"


def test_the_command_writes_what_the_cards_say(tmp_path):
    checkpoints = [write(tmp_path / name, training={"seed": seed}) for seed, name in enumerate(("one", "two"))]
    save_state(tmp_path / "two" / "training" / "state.safetensors", {}, {"cpu_seconds": 12.4})
    cli.main(["fidelity", "--checkpoints", *checkpoints, "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert list(found) == ["one", "two"] and found["one"]["cpu_seconds"] is None and found["two"]["cpu_seconds"] == 12.4
    assert all(facts["metrics"] == ROWS and facts["zoo"] == {"digest": 1} for facts in found.values())
    assert [facts["training"]["seed"] for facts in found.values()] == [0, 1]
    text = (tmp_path / "out" / "fidelity.md").read_text()
    assert text.endswith(table(found)) and "| 12 |" in text


def test_generators_that_cannot_be_shown_side_by_side(tmp_path):
    good, lacking = write(tmp_path / "good"), {name: row.copy() for name, row in ROWS.items()}
    del lacking["conv_weight-3x3-1"]["auroc_normal"]
    again = tmp_path / "again" / "good"
    bad = {
        "noise-ghn-digits is a .*only local generators": "noise-ghn-digits",
        "lacks auroc_normal: fit it again": write(tmp_path / "lacking", lacking),
        "lacks all figures": write(tmp_path / "bare", {}),
        "two of the generators are called good": write(again),
        "fitted on other networks than good": write(tmp_path / "other", zoo={"digest": 2}),
    }
    for message, checkpoint in bad.items():
        with pytest.raises(ConfigError, match=message):
            cli.main(["fidelity", "--checkpoints", good, checkpoint, "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="give at least one"):
        cli.main(["fidelity", "--checkpoints", "--out", str(tmp_path / "out")])
    with pytest.raises(CheckpointError, match="nothing"):
        cli.main(["fidelity", "--checkpoints", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["local", "local-cifar10"])
def test_tables_in_the_results_are_those_of_their_records(name):
    record = json.loads((RESULTS / name / "fidelity.json").read_text())
    for file in ("fidelity.md", "README.md"):
        assert table(record) in (RESULTS / name / file).read_text(), file
