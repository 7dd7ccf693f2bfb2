"""Whatever is wrong with the input: exit code 2, a last line that names it, and not a byte written or lost."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from collect import cli
from collect.durable import STALE_SECONDS
from collect.zoo import Zoo
from generators.commandline import EXIT_DONE, EXIT_WRONG_INPUT, run

TINY = ["--architectures", "mlp-1-w4", "--runs", "3", "--together", "2", "--epochs", "1", "--batch-size", "256",
        "--workers", "0"]  # fmt: skip
DAY = 24 * 3600


class Commands:
    """`python -m collect` in this process, and the content of a folder around it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self.folder, self._monkeypatch, self._capsys = folder, monkeypatch, capsys

    def content(self) -> dict[Path, bytes | None]:
        return {path: path.read_bytes() if path.is_file() else None for path in sorted(self.folder.rglob("*"))}

    def run(self, *arguments: str | Path) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        self._monkeypatch.setattr(sys, "argv", ["collect", *map(str, arguments)])
        self._capsys.readouterr()
        code = run(cli.main)
        return code, *self._capsys.readouterr()

    def done(self, *arguments: str | Path) -> str:
        """What a command shows that must succeed."""
        code, shown, error = self.run(*arguments)
        assert code == EXIT_DONE, error
        return shown

    def refused(self, *arguments: str | Path) -> str:
        """The error of a command that must leave everything as it is."""
        before = self.content()
        code, _, error = self.run(*arguments)
        assert code == EXIT_WRONG_INPUT, error
        assert self.content() == before
        return error.strip().splitlines()[-1]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Commands:
    return Commands(tmp_path, monkeypatch, capsys)


def _spec(folder: Path, **value: Any) -> Path:
    path = folder / "spec.json"
    path.write_text(json.dumps({"recipe": {"architecture": "mlp-1-w4", "epochs": 1, "batch_size": 64}} | value))
    return path


def _images(folder: Path, side: int, **changes: np.ndarray) -> Path:
    """An .npz of 120 grey images in 3 classes."""
    images = np.random.default_rng(0).integers(0, 256, (120, side, side), dtype=np.uint8)
    labels = np.arange(120) % 3
    np.savez(folder / "own.npz", **dict(x_train=images, y_train=labels, x_test=images, y_test=labels) | changes)
    return folder / "own.npz"


# --- specs and plans ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"run": 3}, ["unknown key 'run'", "'runs'"]),
        ({"grid": {"learning_rat": [0.1]}}, ["recipe field 'learning_rat'", "in grid"]),
        ({"grid": {"lr": []}}, ["grid.lr", "at least one value"]),
        ({"grid": {"lr": ["0.1"]}}, ["grid.lr[0] must be a number"]),
        ({"grid": {"data": ["digit"]}}, ["data set 'digit'", "'digits'"]),
        ({"grid": {"init": ["he", "hee"]}}, ["'hee'", "'he'"]),
        ({"recipe": {"family": "mlp", "depth": 0, "width": 4}}, ["depth must be at least 1"]),
        ({"recipe": {"family": "mlp", "depth": 1, "width": 0}}, ["width must be at least 1"]),
        ({"format": 9}, ["format 9", "newer version"]),
    ],
)
def test_a_wrong_spec_is_refused_by_both_commands(value: dict, words: list[str], commands: Commands) -> None:
    path = _spec(commands.folder, **value)
    for arguments in (["plan", path, "--out", path.with_name("plan.json")], ["run", "--plan", path]):
        error = commands.refused(*arguments, *(["--out", path.with_name("zoo")] if arguments[0] == "run" else []))
        assert "spec.json" in error and all(word in error for word in words), error


def test_a_cluster_that_is_not_there_is_found_before_anything_is_written(commands: Commands) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'powerhouse-init[ray]'")
    given = ["run", *TINY[:-2], "--executor", "ray", "--address", "127.0.0.1:1", "--out", commands.folder / "zoo"]
    assert "cannot connect to a Ray cluster at '127.0.0.1:1'" in commands.refused(*given)
    for workers in ([], ["--workers", "0"]):
        given = ["run", *TINY[:-2], *workers, "--gpus", "1", "--out", commands.folder / "zoo"]
        assert "no setting 'gpus'" in commands.refused(*given)


def test_plan_and_flags_exclude_each_other_even_where_they_agree(commands: Commands) -> None:
    out = ["--out", commands.folder / "zoo"]
    error = commands.refused("run", "--plan", _spec(commands.folder), "--epochs=20", "--batch_size", "64", *out)
    assert "--batch-size, --epochs cannot be given beside it" in error
    assert "name --architectures" in commands.refused("run", *out)
    assert "no setting 'address'" in commands.refused("run", *TINY[:-2], "--address", "auto", *out)


def test_a_plan_that_is_missing_damaged_or_from_the_future(commands: Commands) -> None:
    plan, zoo = commands.folder / "plan.json", commands.folder / "zoo"
    error = commands.refused("run", "--plan", plan, "--out", zoo)
    assert "plan.json" in error and "No such file" in error and "collect plan --help" in error
    commands.done("plan", _spec(commands.folder), "--out", plan)
    text = plan.read_text()
    plan.write_text(text[:-40])
    assert "plan.json" in commands.refused("run", "--plan", plan, "--out", zoo)
    plan.write_text(text.replace('"format": 2', '"format": 99'))
    assert "newer version" in commands.refused("run", "--plan", plan, "--out", zoo)


def test_a_plan_whose_data_have_changed(commands: Commands) -> None:
    plan, data = commands.folder / "plan.json", _images(commands.folder, 4)
    recipe = {"architecture": "mlp-1-w4", "epochs": 1, "data": str(data)}
    commands.done("plan", _spec(commands.folder, recipe=recipe), "--out", plan)
    _images(commands.folder, 4, y_test=np.zeros(120, dtype=np.int64))
    error = commands.refused("run", "--plan", plan, "--out", commands.folder / "zoo")
    assert "own.npz" in error and "the data have changed" in error
    data.unlink()
    assert "does not exist" in commands.refused("run", "--plan", plan, "--out", commands.folder / "zoo")


def test_a_plan_overwrites_nothing_but_plans(commands: Commands) -> None:
    spec = _spec(commands.folder)
    assert "spec.json is no plan" in commands.refused("plan", spec, "--out", spec)
    plan = commands.folder / "plan.json"
    commands.done("plan", spec, "--out", plan)
    before = commands.content()
    assert "1 recipe, 8 networks in 1 population," in commands.done("plan", spec, "--out", plan)
    assert commands.content() == before
    commands.done("plan", plan)  # shows it
    assert commands.content() == before


# --- architectures and data --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "side", "words"),
    [
        ("vgg-6-w4", 3, ["at least 4x4", "got 3x3"]),
        ("resnet-8-w4", 2, ["at least 4x4", "got 2x2"]),
        ("mobilenet-3-w4", 3, ["at least 4x4"]),
        ("vgg-2-w4", 8, ["depth must be at least 3"]),
        ("resnet-9-w4", 8, ["try 8 or 14"]),
        ("vit-2-w16", 7, ["7x7", "common divisor"]),
        ("vit-2-w24", 8, ["try 16 or 32"]),
        ("mlp-1-w0", 8, ["width must be at least 1"]),
        ("mlp-0-w4", 8, ["depth must be at least 1"]),
        ("mlp-1-w99999", 8, ["at most 10000"]),
    ],
)
def test_impossible_architectures(architecture: str, side: int, words: list[str], commands: Commands) -> None:
    data = _images(commands.folder, side)
    out = commands.folder / "zoo"
    error = commands.refused("run", "--architectures", "mlp-1-w4", architecture, "--data", data, "--out", out)
    assert all(word in error for word in words), error


def test_batches_too_small_for_batch_norm(commands: Commands) -> None:
    """The last stage of a resnet sees one pixel of a 4x4 image."""
    data = _images(commands.folder, 4)
    given = ["run", "--data", data, "--architectures", "resnet-8-w4", "--out", commands.folder / "zoo"]
    error = commands.refused(*given, "--batch-size", "1")
    assert "resnet-8-w4" in error and "raise batch_size" in error


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(y_test=np.arange(120) % 4), ["y_test has labels from 0 to 3", "0 to 2"]),
        (
            dict(y_train=np.arange(120) % 4, classes=np.array(["a", "b", "c"])),
            ["y_train has labels", "`classes` names"],
        ),
        (dict(y_train=np.ones(120, dtype=int), y_test=np.ones(120, dtype=int)), ["single class 1", "at least two"]),
        (dict(y_train=np.arange(120) % 3 + 1), ["no image of class 0"]),
        (dict(y_train=np.arange(120) % 2, classes=np.array(["a", "b", "c"])), ["y_test has images of class 2"]),
        (dict(y_train=np.append(np.arange(119) % 3, 3), y_test=np.arange(120) % 2), ["class 3 has a single image"]),
    ],
)
def test_classes_that_do_not_fit(changes: dict[str, np.ndarray], words: list[str], commands: Commands) -> None:
    data = _images(commands.folder, 4, **changes)
    error = commands.refused("run", *TINY, "--data", data, "--out", commands.folder / "zoo")
    assert all(word in error for word in words), error


# --- what else lies in the folder --------------------------------------------------------------------------------


def test_a_population_file_from_the_future(commands: Commands) -> None:
    """It stops the plan that it belongs to, before anything is written, and no other plan."""
    zoo = commands.folder / "zoo"
    commands.done("run", *TINY, "--out", zoo)
    path = min(zoo.glob("*.h5"))
    with h5py.File(path, "r+") as file:
        file.attrs["schema"] = 99
    content = path.read_bytes()
    min(zoo.glob("config-*.json")).unlink()
    error = commands.refused("run", *TINY, "--out", zoo)
    assert path.name in error and "schema 99" in error and "upgrade" in error
    assert "not usable" in commands.done("status", zoo)
    commands.done("run", *TINY, "--lr", "0.2", "--out", zoo)
    assert path.read_bytes() == content


def test_a_plan_file_from_the_future_hides_nothing(commands: Commands) -> None:
    zoo = commands.folder / "zoo"
    commands.done("run", *TINY, "--out", zoo)
    future = zoo / "plan-ffffffffffff.json"
    future.write_text('{"format": 99, "shards": []}')
    for arguments in (["run", *TINY, "--out", zoo], ["status", zoo]):
        shown = commands.done(*arguments)
        assert "3 networks: 3 done" in shown and "plan-ffffffffffff.json has format 99" in shown and "newer" in shown
    assert future.read_text() == '{"format": 99, "shards": []}'


def test_populations_of_another_plan_are_counted_apart_and_left_alone(commands: Commands) -> None:
    zoo = commands.folder / "zoo"
    commands.done("run", *TINY, "--lr", "0.3", "--out", zoo)
    strangers = {path: path.read_bytes() for path in zoo.glob("*.h5")}
    min(zoo.glob("plan-*.json")).unlink()  # as if the files had been copied here
    shown = commands.done("run", *TINY, "--out", zoo)
    assert "3 networks in 2 files belong to no plan here" in shown and "3 networks: 3 done" in shown
    assert all(path.read_bytes() == content for path, content in strangers.items())
    assert len(Zoo(zoo, verify=True)) == 6


def test_the_second_plan_keeps_the_config_of_the_first(commands: Commands) -> None:
    zoo = commands.folder / "zoo"
    commands.done("run", *TINY, "--out", zoo)
    (first,) = zoo.glob("config-*.json")
    written = first.stat().st_mtime_ns
    commands.done("run", *TINY, "--lr", "0.3", "--out", zoo)
    commands.done("run", *TINY, "--out", zoo)
    assert len(list(zoo.glob("config-*.json"))) == 2 and first.stat().st_mtime_ns == written


@pytest.mark.parametrize("age", [-400 * DAY, -2 * STALE_SECONDS, 2 * STALE_SECONDS, 400 * DAY])
def test_clock_and_host_may_change_between_write_and_resume(age: float, commands: Commands) -> None:
    """What a collector of another name left: its claim, and a temporary file, with times far from now."""
    zoo = commands.folder / "zoo"
    commands.done("run", *TINY, "--out", zoo)
    whole = {
        path.name: Zoo(zoo).populations[place].header.digest for place, path in enumerate(sorted(zoo.glob("*.h5")))
    }
    lost, kept = sorted(zoo.glob("*.h5"))
    lost.rename(zoo / f".{lost.name}@old-name@{os.getpid()}.tmp")
    (zoo / f".{kept.name}@old-name@1.tmp").touch()
    for path in zoo.glob(".*.tmp"):
        os.utime(path, times=(time.time() - age,) * 2)
    os.utime(kept, times=(time.time() - age,) * 2)
    assert "3 networks: 3 done" in commands.done("run", *TINY, "--out", zoo)
    assert {each.header.path.name: each.header.digest for each in Zoo(zoo, verify=True).populations} == whole
    assert not list(zoo.glob(".*.tmp"))
