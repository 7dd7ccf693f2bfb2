"""The reader gives back what was trained, by every way of asking; bad files stand aside."""

from __future__ import annotations

import json
import logging
import pickle
import resource
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from collect import data, zoo_file
from collect.architectures import build
from collect.plan import plan, sweep
from collect.recipe import Recipe
from collect.runner import collect
from collect.zoo import Zoo, split_of
from generators.errors import UnknownNameError, ZooError
from generators.inventory import inventory

PINNED = {"train": (0, 1, 2, 10, 31), "validation": (29, 42, 52), "test": (11, 30, 33, 41)}
BASE = Recipe(epochs=2, batch_size=128, statistics="running", saved="all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two architectures x two learning rates x three runs, and a population that diverges."""
    path = tmp_path_factory.mktemp("zoo")
    recipes = sweep(BASE, architecture=["resnet-8-w4", "mlp-1-w8"], lr=[0.02, 0.1])
    recipes += sweep(BASE, architecture=["mlp-1-w8"], lr=[1e30])
    collect(plan(recipes, runs=3), path, workers=0)
    return path


@pytest.fixture
def zoo(folder: Path) -> Zoo:
    return Zoo(folder)


def test_runs_against_the_files(zoo: Zoo, folder: Path) -> None:
    assert len(zoo) == 15 and len(zoo.populations) == 5 and not zoo.bad
    for run in zoo.runs:
        with h5py.File(folder / f"{run['population']}.h5") as file:
            row = file["runs"][run["row"]]
            assert run["id"] == row["id"].decode() and run["seed"] == row["seed"] and run["lr"] == row["lr"]
            recipe = json.loads(file.attrs["recipe"])
            lists = {name: json.dumps(value) for name, value in recipe.items() if isinstance(value, list)}
            assert {name: run[name] for name in recipe} == recipe | lists
            names = [name.decode() for name in file["metrics"].attrs["names"]]
            last = file["metrics"][run["row"], -1]
            np.testing.assert_array_equal([run[name] for name in names], last)


def test_a_module_has_the_accuracy_that_is_stored(zoo: Zoo) -> None:
    """Weights, buffers, layout, architecture and metrics fit together, for every run and for all three checkpoints."""
    images = data.load("digits").test
    for index, run in enumerate(zoo.runs):
        if run["status"] != "ok":
            continue
        view = zoo._view(index)
        for checkpoint, accuracy in enumerate(view.curve("test_accuracy")[0]):
            with torch.no_grad():
                found = zoo.module(index, checkpoint=checkpoint)(images.images).argmax(1) == images.labels
            assert found.float().mean().item() == pytest.approx(float(accuracy), abs=1.5 / len(images))
    assert view.checkpoint_epochs.tolist() == view.evaluation_epochs.tolist() == [0, 1, 2]


def test_stacked_states_against_single_ones_and_hdf5(zoo: Zoo) -> None:
    index = 0
    for population in zoo.populations:
        states = population.states()
        assert set(states) == set(population.build().state_dict())
        for row in range(len(population)):
            single = zoo.state_dict(index)
            assert all(torch.equal(states[name][row], single[name]) for name in states)
            index += 1
        with h5py.File(population.header.path) as file:
            np.testing.assert_array_equal(population.weights, file["weights"][()])
            np.testing.assert_array_equal(population.buffers, file["buffers"][()])
    assert index == len(zoo)


def test_weights_are_mapped_and_cannot_be_written(zoo: Zoo) -> None:
    weights = zoo.populations[0].weights
    assert isinstance(weights, np.memmap) and not weights.flags.writeable
    name = zoo.populations[0].layout[0].name
    zoo.state_dict(0)[name].zero_()  # a copy: the file does not change
    assert zoo.state_dict(0)[name].abs().sum() > 0


def test_where_is_a_filter_over_the_runs(zoo: Zoo) -> None:
    chosen = zoo.where(architecture="mlp-1-w8", lr=[0.02, 0.1], seed={0, 2})
    expected = [
        run for run in zoo.runs if run["architecture"] == "mlp-1-w8" and run["lr"] < 1 and run["seed"] in (0, 2)
    ]
    assert chosen.runs == expected and len(chosen) == 4 and len(zoo) == 15
    for population in chosen.populations:  # rows 0 and 2 of 3
        assert population.seeds == (0, 2)
        whole = next(each for each in zoo.populations if each.id == population.id)
        np.testing.assert_array_equal(population.weights, whole.weights[[0, 2]])
        np.testing.assert_array_equal(population.metrics, whole.metrics[[0, 2]])
    assert chosen.where(seed=2).column("seed").tolist() == [2, 2]
    assert len(zoo.where(status="ok")) == 12 and set(zoo.where(status="diverged").column("lr")) == {1e30}
    nothing = zoo.where(architecture="vit-1-w8")
    assert len(nothing) == 0 and nothing.populations == [] and len(nothing.where(seed=0)) == 0


def test_short_names_of_columns(zoo: Zoo) -> None:
    chosen = zoo.where(arch="resnet-8-w4", val_acc__gt=0.5, split="train")
    assert chosen.runs == [
        run
        for run in zoo.runs
        if run["architecture"] == "resnet-8-w4" and run["validation_accuracy"] > 0.5 and run["split"] == "train"
    ]
    assert 0 < len(chosen) < len(zoo.where(arch="resnet-8-w4")) + 1
    assert zoo.column("test_acc").tolist() == pytest.approx(zoo.column("test_accuracy").tolist(), nan_ok=True)


def test_a_folder_without_an_index_is_left_as_it_is_when_it_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    """On a disk without room; what is read is the same."""
    for path in folder.glob("*.h5"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before, names = resource.getrlimit(resource.RLIMIT_FSIZE), set(tmp_path.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        zoo = Zoo(tmp_path).where(arch="resnet-8-w4")
        np.testing.assert_array_equal(zoo.matrix(), Zoo(folder).where(arch="resnet-8-w4").matrix())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert set(tmp_path.iterdir()) == names


def test_unknown_columns_and_metrics_have_near_names(zoo: Zoo) -> None:
    with pytest.raises(UnknownNameError, match="'architecture'"):
        zoo.where(architectur="mlp-1-w8")
    with pytest.raises(UnknownNameError, match="'status'"):
        zoo.column("statu")
    with pytest.raises(UnknownNameError, match="'test_accuracy'"):
        zoo.populations[0].curve("test_acuracy")


def test_tensors_against_state_dicts_and_the_inventory(zoo: Zoo) -> None:
    """Every convolution kernel of every run, with the depth that `generators.inventory` gives its layer."""
    depths = {info.name: info.depth for info in inventory(build("resnet-8-w4", shape=(1, 8, 8), classes=10))}
    found = Counter()
    index_of = {run["id"]: index for index, run in enumerate(zoo.runs)}
    for run, architecture, spec, depth, values in zoo.tensors(role="conv_weight", kernel=(3, 3)):
        assert architecture == "resnet-8-w4" and values.shape == spec.shape and spec.shape[2:] == (3, 3)
        assert depth == depths[spec.name]
        np.testing.assert_array_equal(values, zoo.state_dict(index_of[run])[spec.name].numpy())
        found[run] += 1
    assert set(found) == set(zoo.where(architecture="resnet-8-w4").column("id"))
    assert set(found.values()) == {7}  # a ResNet-8 has 7 3x3 convolutions
    total = sum(values.size for *_, values in zoo.where(architecture="mlp-1-w8", seed=0, lr=0.1).tensors())
    assert total == 64 * 8 + 8 + 8 * 10 + 10
    start = next(zoo.where(lr=0.1, seed=1).tensors(checkpoint=0))[-1]
    assert not np.array_equal(start, next(zoo.where(lr=0.1, seed=1).tensors())[-1])


def test_family_depth_and_width_are_columns(zoo: Zoo) -> None:
    for run in zoo.runs:
        assert run["architecture"] == f"{run['family']}-{run['depth']}-w{run['width']}"
    assert zoo.column("width").dtype == np.int64
    assert zoo.where(family="resnet").runs == zoo.where(width__lt=8).runs == zoo.where(arch="resnet-8-w4").runs


def test_what_is_not_there_is_named(zoo: Zoo) -> None:
    with pytest.raises(IndexError, match=r"no checkpoint 3: population .* has 3"):
        zoo.module(0, checkpoint=3)
    for number in (len(zoo), -len(zoo) - 1):
        with pytest.raises(IndexError, match=rf"no run {number}: .*{len(zoo)} runs"):
            zoo.state_dict(number)
    with pytest.raises(IndexError, match="no run 0: .* 0 runs"):
        zoo.where(architecture="vgg-3-w8").module(0)
    with pytest.raises(UnknownNameError, match=r"'val'.*validation"):
        zoo.where(split="val")
    with pytest.raises(UnknownNameError, match=r"status 'failed': known: diverged, ok, stopped"):
        zoo.where(status=["ok", "failed"])
    assert len(zoo.where(status__startswith="div")) == 3


def test_splits_depend_on_the_id_alone(zoo: Zoo) -> None:
    """Known ids stay where they are for ever; shares are 80, 10 and 10 %."""
    for name, numbers in PINNED.items():
        assert {split_of(f"{number:016x}") for number in numbers} == {name}
    counts = Counter(split_of(f"{number:016x}") for number in range(20_000))
    assert counts["train"] == pytest.approx(16_000, abs=300)
    assert counts["validation"] == pytest.approx(2_000, abs=200) and counts["test"] == pytest.approx(2_000, abs=200)
    assert all(run["split"] == split_of(run["id"]) == Zoo.split_of(run["id"]) for run in zoo.runs)
    parts = [zoo.where(split=name).column("id").tolist() for name in sorted(set(zoo.column("split")))]
    assert sorted(name for part in parts for name in part) == sorted(zoo.column("id"))


def test_bad_files_among_good_are_listed_and_nothing_else_happens_to_them(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = sorted(folder.glob("*.h5"))
    for path in files:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    truncated, flipped = tmp_path / files[0].name, tmp_path / files[1].name
    truncated.write_bytes(files[0].read_bytes()[:-100])
    content = bytearray(files[1].read_bytes())
    content[zoo_file.read_header(files[1]).weights.offset] ^= 1
    flipped.write_bytes(content)
    (tmp_path / "foreign.h5").write_text("mine")
    zoo = Zoo(tmp_path)
    assert set(zoo.bad) == {truncated, tmp_path / "foreign.h5"} and len(zoo.populations) == 4
    assert truncated.name in caplog.text
    deep = Zoo(tmp_path, verify=True)
    assert set(deep.bad) == {truncated, flipped, tmp_path / "foreign.h5"} and len(deep.populations) == 3
    assert flipped.read_bytes() == content and (tmp_path / "foreign.h5").read_text() == "mine"


def test_without_usable_files_the_reasons_are_given(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="no zoo at .*nowhere; make one with `python -m collect run --out"):
        Zoo(tmp_path / "nowhere")
    with pytest.raises(ZooError, match=r"no zoo at .*nowhere\.h5; make one with `python -m collect pack FOLDER"):
        Zoo(tmp_path / "nowhere.h5")
    with pytest.raises(ZooError, match="no usable population"):
        Zoo(tmp_path)
    (tmp_path / "foreign.h5").write_text("mine")
    with pytest.raises(ZooError, match=r"foreign\.h5"):
        Zoo(tmp_path)


def test_a_run_that_was_collected_twice_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = Recipe(architecture="mlp-1-w4", epochs=1, batch_size=256)
    collect(plan([recipe], runs=2), tmp_path, workers=0)
    collect(plan([recipe], runs=4), tmp_path, workers=0)
    with caplog.at_level(logging.INFO):
        zoo = Zoo(tmp_path)
    assert sorted(zoo.column("seed")) == [0, 1, 2, 3] and len(set(zoo.column("id"))) == 4
    assert "counts once" in caplog.text


def test_a_zoo_can_be_sent_to_another_process(zoo: Zoo) -> None:
    chosen = zoo.where(seed=1, status="ok")
    sent = pickle.loads(pickle.dumps(chosen))
    assert sent.runs == chosen.runs
    np.testing.assert_array_equal(sent.populations[0].weights, chosen.populations[0].weights)


def test_the_recipe_comes_back(zoo: Zoo) -> None:
    assert {population.recipe.lr for population in zoo.populations} == {0.02, 0.1, 1e30}
    assert all(population.recipe.saved == "all" for population in zoo.populations)
    assert repr(zoo).endswith("15 runs, 5 populations)")
