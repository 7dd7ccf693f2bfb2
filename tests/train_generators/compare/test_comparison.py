"""The whole comparison on a really collected tiny zoo, against slow recomputations from the stored networks."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console

from collect import data
from collect.plan import plan, sweep
from collect.recipe import Recipe
from collect.runner import collect
from collect.zoo import Zoo
from generators.errors import ConfigError, DataError, PowerhouseError
from train_generators.cli import main as command_line
from train_generators.compare import CompareConfig, run

SEEDS, EPOCHS = 5, 2
MLP, RESNET = "mlp-1-w16", "resnet-8-w2"
DIVERGING = 1e6


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """5 runs per initialiser: an MLP at two learning rates, of which one diverges, and a small ResNet at one. Each set
    of 5 lies in two populations.
    """
    folder = tmp_path_factory.mktemp("zoo")
    base = Recipe(epochs=EPOCHS, saved=(0, EPOCHS))
    recipes = sweep(base, architecture=[MLP], init=["he", "xavier"], lr=[0.1, DIVERGING])
    recipes += sweep(base, architecture=[RESNET], init=["he", "xavier"], lr=[0.1])
    collect(plan(recipes, runs=SEEDS, together=3), folder, workers=0)  # seeds 0 to 2 and 3, 4 in two files
    return folder


@pytest.fixture(scope="module")
def config(zoo, tmp_path_factory):
    return CompareConfig(zoo=(zoo,), out=tmp_path_factory.mktemp("out"), shifts=("noise",), shift_images=60)


@pytest.fixture(scope="module")
def screen():
    return Console(file=io.StringIO(), record=True, width=110)


@pytest.fixture(scope="module")
def result(config, screen):
    return run(config, console=screen)


def test_curves_and_differences_are_those_of_the_zoo(result, zoo):
    """Final accuracies by seed straight from the columns of the zoo."""
    runs = Zoo(zoo).where(architecture=RESNET).runs
    by_seed = {(one["init"], one["seed"]): one["test_accuracy"] for one in runs}
    he = np.array([by_seed["he", seed] for seed in range(SEEDS)])
    xavier = np.array([by_seed["xavier", seed] for seed in range(SEEDS)])
    figures = result.figures
    assert figures[f"{RESNET}/he/accuracy_end_mean"] == pytest.approx(he.mean())
    assert figures[f"{RESNET}/he/accuracy_end_std"] == pytest.approx(he.std(ddof=1))
    last = 2 * (len(data.load("digits").train) // 64)
    assert figures[f"{RESNET}/xavier/step_{last}/difference_mean"] == pytest.approx((xavier - he).mean(), abs=1e-7)
    assert figures[f"{RESNET}/xavier/step_{last}/difference_n"] == SEEDS
    losses = {(one["init"], one["seed"]): one["test_loss"] for one in runs}
    gaps = [losses["xavier", seed] - losses["he", seed] for seed in range(SEEDS)]
    assert figures[f"{RESNET}/he/step_{last}/loss_mean"] == pytest.approx(np.mean([losses["he", s] for s in range(5)]))
    assert figures[f"{RESNET}/xavier/step_{last}/loss_difference_mean"] == pytest.approx(np.mean(gaps), abs=1e-6)


def test_ensembles_are_those_of_the_stored_networks(result, zoo, images):
    """One module at a time in evaluation mode; the MLP has no batch statistics, so nothing is calibrated."""
    view = Zoo(zoo).where(architecture=MLP, init="xavier", lr=0.1)
    for when, checkpoint in (("before", 0), ("after", -1)):
        with torch.inference_mode():
            logits = torch.stack([view.module(i, checkpoint=checkpoint)(images.test.images) for i in range(SEEDS)])
        probabilities = logits.double().softmax(-1).mean(0)
        right = (probabilities.argmax(-1) == images.test.labels).double().mean()
        nll = torch.nn.functional.nll_loss(probabilities.log(), images.test.labels)
        name = f"{MLP}/xavier/ensemble_{when}/clean"
        assert result.figures[f"{name}/accuracy"] == pytest.approx(float(right))
        assert result.figures[f"{name}/nll"] == pytest.approx(float(nll), rel=1e-5)
        assert result.figures[f"{MLP}/xavier/ensemble_{when}/members"] == SEEDS


def test_predictions_repeat_the_accuracies_of_training(result):
    """Batch statistics included: the recipe's own evaluation and the ensemble's members are the same networks."""
    for row in result.rows:
        np.testing.assert_allclose(row.ensembles["after"].member_accuracies, row.arm.final, atol=1.5 / 360)
        np.testing.assert_allclose(row.ensembles["before"].member_accuracies, row.arm.curves[:, 0], atol=1.5 / 360)
    assert not any("may not describe the same networks" in note for note in result.notes)


def test_diverged_runs_are_counted_and_shown(result, zoo):
    """The rate at which every run diverges is not chosen, but stays in the report and in the records."""
    assert set(Zoo(zoo).where(lr=DIVERGING).column("status")) == {"diverged"}
    row = result.of(MLP)[0]
    assert (row.arm.lr, [int(arm.finished.sum()) for arm in row.choice.tried]) == (0.1, [SEEDS, 0])
    text = (result.folder / "report.md").read_text()
    assert "| he | 1e+06 | none | none | 0 of 5 |" in text
    with (result.folder / "records/curves.csv").open() as file:
        lost = [line for line in csv.DictReader(file) if line["status"] == "diverged"]
    assert {line["seed"] for line in lost} == set("01234")
    assert {line["chosen"] for line in lost} == {"0"}


@pytest.mark.parametrize("baseline", ["he", "xavier"])
def test_where_all_runs_of_one_side_diverge_nothing_is_claimed(zoo, tmp_path, baseline):
    """Only the diverging rate is left for xavier: its row is there, without final accuracy, ensembles or verdict."""
    part = tmp_path / "zoo"
    part.mkdir()
    for view in Zoo(zoo).where(architecture=MLP).populations:
        if (view.recipe.init, view.recipe.lr) in (("he", 0.1), ("xavier", DIVERGING)):
            shutil.copy(view.header.path, part)
    found = run(
        CompareConfig(zoo=(part,), out=tmp_path / "out", shifts=(), baseline=baseline), console=Console(quiet=True)
    )
    by_label = {row.label: row for row in found.rows}
    assert by_label["xavier"].unfinished == {"diverged": SEEDS}
    assert by_label["xavier"].horizons[-1].accuracy.n == 0
    assert by_label["xavier"].ensembles == {}
    assert [row.horizons[-1].difference.n for row in found.rows if not row.is_baseline] == [0]
    assert any("xavier: 5 of 5 runs diverged" in note for note in found.notes)
    assert any("only 0 of its runs finished" in note for note in found.notes)
    assert "0 of 5 (5 diverged)" in (tmp_path / "out/report.md").read_text()


def test_report_is_whole_and_self_contained(result):
    """HTML: every picture inside, none outside. Markdown: every picture beside it."""
    page = (result.folder / "report.html").read_text()
    inside = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(inside) == page.count("<img ") == len(list((result.folder / "plots").glob("*.png")))
    assert all(base64.b64decode(one).startswith(b"\x89PNG") for one in inside)
    text = (result.folder / "report.md").read_text()
    linked = re.findall(r"\]\((plots/[^)]+)\)", text)
    assert len(linked) == len(inside)
    assert all((result.folder / one).is_file() for one in linked)
    assert f"kernels-{RESNET}" in text
    assert f"kernels-{MLP}" not in text  # no kernels in an MLP
    assert not list(result.folder.rglob("*.tmp"))


def test_results_hold_the_figures_and_where_they_come_from(result, config, zoo):
    results = json.loads((result.folder / "results.json").read_text())
    assert results["config"]["zoo"] == [str(zoo)]
    assert {"machine", "versions", "git_commit", "data_digest", "seconds"} <= results.keys()
    assert all(value is None or isinstance(value, int | float) for value in results["figures"].values())
    for name, value in results["figures"].items():
        assert value == (result.figures[name] if np.isfinite(result.figures[name]) else None)


def test_records_hold_every_run_and_every_ensemble(result):
    with (result.folder / "records/curves.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6 * SEEDS * (EPOCHS + 1)
    with (result.folder / "records/ensembles.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * 2 * (1 + 5)  # rows, before and after, clean and 5 severities
    assert {line["shift"] for line in lines} == {"clean", "noise"}
    assert {line["initialiser"] for line in lines} == {row.arm.label for row in result.rows}


def test_screen_shows_one_line_per_initialiser(result, screen):
    shown = screen.export_text(clear=False)
    for architecture in (MLP, RESNET):
        block = (
            shown.split(f" {architecture} ", 1)[1] if f" {architecture} " in shown else shown.split(architecture, 1)[1]
        )
        assert re.search(r"\bhe\b.*\n.*\bxavier\b", block)
    assert f"{100 * result.figures[f'{RESNET}/he/accuracy_end_mean']:.1f} ± " in shown


def test_same_figures_again(result, config, tmp_path):
    """The same zoo gives the same figures to the last bit, from the command line too."""
    again = tmp_path / "again"
    command_line([
        "compare", "--zoo", str(config.zoo[0]), "--out", str(again), "--shifts", "noise", "--shift-images", "60",
    ])  # fmt: skip
    first, second = (json.loads((one / "results.json").read_text())["figures"] for one in (result.folder, again))
    assert first == second


def test_one_architecture_without_shifts(config, tmp_path):
    small = dataclasses.replace(config, out=tmp_path, architectures=(MLP,), shifts=(), target=0.5)
    found = run(small, console=Console(quiet=True))
    assert found.architectures == [MLP]
    assert all(row.target == 0.5 for row in found.rows)
    assert all(list(row.ensembles["after"].cells) == [("", 0)] for row in found.rows)


def test_without_initial_weights_the_rest_is_reported(tmp_path):
    """Populations that kept their last weights only: no ensembles before training, with a note that says why."""
    recipes = sweep(Recipe(epochs=1), architecture=[RESNET], init=["he", "xavier"])
    collect(plan(recipes, runs=3), tmp_path / "zoo", workers=0)
    found = run(CompareConfig(zoo=(tmp_path / "zoo",), out=tmp_path / "out", shifts=()), console=Console(quiet=True))
    assert all(list(row.ensembles) == ["after"] and row.ensembles["after"].members == 3 for row in found.rows)
    assert any("no ensemble before training, because their weights were not saved (" in note for note in found.notes)
    assert any("have 3 members instead of 5" in note for note in found.notes)
    names = {path.name for path in (tmp_path / "out/plots").iterdir()}
    assert names == {f"curves-{RESNET}.png", f"kernels-{RESNET}.png", "final-accuracy.png", "ensembles-after.png"}


def test_a_damaged_file_is_named_and_not_used(result, config, zoo, tmp_path):
    """The figures are those without it."""
    with_damage = tmp_path / "zoo"
    shutil.copytree(zoo, with_damage)
    (with_damage / "0123456789abcdef.h5").write_bytes(b"no HDF5 file")
    changed = dataclasses.replace(config, zoo=(with_damage,), out=tmp_path / "out", architectures=(MLP,), shifts=())
    found = run(changed, console=Console(quiet=True))
    assert any("0123456789abcdef.h5" in note for note in found.notes)
    for name in ("accuracy_end_mean", "ensemble_after/clean/nll"):
        assert found.figures[f"{MLP}/xavier/{name}"] == result.figures[f"{MLP}/xavier/{name}"]


def test_wrong_input_says_what_to_do_and_writes_nothing(config, zoo, tmp_path):
    out = tmp_path / "out"
    for changes, error, words in (
        ({"zoo": (tmp_path / "nowhere",)}, PowerhouseError, "no zoo at"),
        ({"baseline": "hee"}, PowerhouseError, "did you mean 'he'"),
        ({"data": _other_images(tmp_path)}, DataError, "digest"),
    ):
        with pytest.raises(error, match=words):
            run(dataclasses.replace(config, out=out, **changes), console=Console(quiet=True))
    assert not out.exists()
    for changes in ({"zoo": ()}, {"target": 1.5}, {"ensemble_size": 1}, {"shifts": ("fog",)}, {"horizons": (-1,)}):
        with pytest.raises(ConfigError):
            dataclasses.replace(config, **changes)


def _other_images(folder) -> str:
    """An .npz of noise that is not what the zoo was trained on."""
    numbers = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 80), ("test", 20)):
        arrays[f"x_{part}"] = numbers.integers(0, 255, (count, 8, 8), dtype=np.uint8)
        arrays[f"y_{part}"] = np.arange(count) % 10
    np.savez(folder / "other.npz", **arrays)
    return str(folder / "other.npz")
