"""Every count on the card against the zoo that it was made for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from collect import card, failures, packed
from collect.plan import plan, sweep
from collect.recipe import Recipe
from collect.runner import collect
from collect.zoo import Zoo, scan
from generators.errors import ZooError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven runs with two states each: 2 rates x 3 seeds, 3 that diverge, 2 of another width; damage; an error."""
    path = tmp_path_factory.mktemp("zoo")
    base = Recipe(architecture="mlp-1-w4", epochs=1, batch_size=256, saved=(0, 1))
    collect(plan(sweep(base, lr=[0.05, 0.1, 1e30]), runs=3), path, workers=0)
    collect(plan(sweep(base, architecture=["mlp-1-w8"], lr=[0.05]), runs=2), path, workers=0)
    again = plan(sweep(base, lr=[0.1]), runs=1)
    collect(again, path, workers=0)  # found in two populations
    for task in (*again, replace(again[0], seeds=(99,))):  # one has succeeded since
        failures.record(path, task, "out of memory")
    (path / "foreign.h5").write_text("mine")
    return path


def test_counts_factors_and_failures(folder: Path) -> None:
    zoo = Zoo(folder)
    path = card.write(zoo, card.place_of(folder), licence="CC-BY-4.0")
    text = path.read_text()
    for line in (
        "| runs (networks trained) | 11 |",
        "| states (runs x stored epochs) | 22 |",
        f"| numbers in all states | {2 * (9 * (64 * 4 + 4 + 4 * 10 + 10) + 2 * (64 * 8 + 8 + 8 * 10 + 10))} |",
        "| seed | 3 | 0, 1, 2 |",
        "| lr | 3 | 0.05, 0.1, 1e+30 |",
        "| architecture | 2 | mlp-1-w4, mlp-1-w8 |",
        "| runs that diverged (kept and flagged) | 3 of 11 (27.27%) |",
        "| runs that were stopped (kept and flagged) | 0 of 11 (0.00%) |",
        "| populations whose training ended in an error (not counted above) | 1 |",
        "| populations that are damaged (not counted above) | 1 |",
        "| runs found in two populations (counted once) | 1 |",
        "Of the networks: CC-BY-4.0.",
        "arXiv:2310.16695",
    ):
        assert line in text
    assert 'optimiser "sgd"' in text and "| optimiser" not in text
    chosen = zoo.where(architecture="mlp-1-w8")
    accuracies = chosen.column("test_accuracy")
    row = f"| digits | mlp-1-w8 | he | 2 | {accuracies.mean():.4f} | {accuracies.std():.4f} | {accuracies.min():.4f} |"
    assert row in text
    assert packed.zoo_digest([each.header for each in zoo.populations]) in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG") and f"({path.stem}.png)" in text


def test_equal_states_against_comparing_all_pairs(folder: Path) -> None:
    """Three learning rates share three seeds, so six of nine states at epoch 0 were there before."""
    zoo = Zoo(folder)
    states = [state.tobytes() for each in zoo.populations for row in each.weights for state in row]
    expected = sum(any(states[i] == states[j] for j in range(i)) for i in range(len(states)))
    assert card._equal_states(zoo.populations) == expected >= 6


def test_a_packed_zoo_has_its_card_beside_it(folder: Path, tmp_path: Path) -> None:
    good, bad = scan(folder)
    left_out = {damaged.name: str(error) for damaged, error in bad.items()}
    out = packed.write(good, tmp_path / "digits.h5", left_out=left_out)
    path = card.write(Zoo(out), card.place_of(out))
    assert path == tmp_path / "digits.card.md" and (tmp_path / "digits.card.png").is_file()
    text = path.read_text()
    assert "| runs (networks trained) | 11 |" in text and "none stated" in text
    assert "| populations that are damaged (not counted above) | 1 |" in text
    with pytest.raises(ZooError, match="cannot write"):
        card.write(Zoo(out), out / "card.md")
