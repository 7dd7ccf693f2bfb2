"""The index changes how long opening takes and nothing else: every answer is that of the files."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from collect import data, index, zoo_file
from collect.architectures import parse
from collect.population import Population, train
from collect.recipe import ADDED, Recipe
from collect.zoo import Zoo, scan, split_of
from generators.errors import ZooError


@pytest.fixture(scope="module")
def populations() -> list[Population]:
    """Three of two layouts, the last with a trajectory in half precision; the second diverges."""
    images = data.load("digits")
    base = Recipe(architecture="mlp-1-w4", epochs=1, batch_size=256, saved="all")
    recipes = (base, replace(base, lr=1e30), replace(base, architecture="mlp-1-w8", trajectory="float16"))
    return [train(recipe, (0, 1), images) for recipe in recipes]


@pytest.fixture
def folder(populations: list[Population], tmp_path: Path) -> Path:
    for population in populations:
        zoo_file.write(population, tmp_path / "zoo")
    return tmp_path / "zoo"


def with_seeds(population: Population, *seeds: int) -> Population:
    return replace(population, seeds=seeds)


def expected_runs(folder: Path) -> list[dict[str, Any]]:
    """Dict by dict from every file."""
    found, seen = [], set()
    for header in scan(folder)[0]:
        for row, run in enumerate(header.runs):
            if run["id"] not in seen:
                last = zip(header.metric_names, header.metrics[row, -1].tolist(), strict=True)
                place = {"id": run["id"], "population": header.id, "row": row, "split": split_of(run["id"])}
                found.append(place | run | vars(parse(run["architecture"])) | dict(last))
            seen.add(run["id"])
    return found


def assert_agrees(folder: Path) -> Zoo:
    """Open twice, so that the index is read at least once, and compare all that can be asked with the files."""
    Zoo(folder)
    zoo = Zoo(folder)
    headers, bad = scan(folder)
    found, expected = list(zoo.runs), expected_runs(folder)
    assert json.dumps(found) == json.dumps(expected)  # as text: NaN is NaN, and the order of columns counts
    assert {path: str(error) for path, error in zoo.bad.items()} == {path: str(error) for path, error in bad.items()}
    assert zoo.repeated == sum(len(header.runs) for header in headers) - len(expected)
    by_id = {header.id: header for header in headers}
    for view in zoo.populations:
        header = by_id[view.id]
        assert view.place == replace(view.place, **{name: getattr(header, name) for name in vars(view.place)})
        assert view.header.attributes == header.attributes
        np.testing.assert_array_equal(view.weights, header.states()[list(view.rows)])
    assert [run["id"] for run in expected] == [
        by_id[view.id].runs[row]["id"] for view in zoo.populations for row in view.rows
    ]
    for name in expected[0]:
        assert zoo.column(name).tolist() == pytest.approx([run[name] for run in expected], nan_ok=True)
    return zoo


def add(folder: Path, populations: list[Population]) -> None:
    zoo_file.write(with_seeds(populations[0], 7, 8), folder)


def overlap(folder: Path, populations: list[Population]) -> None:
    """A run that is there already, in an earlier or a later file; each order happens for one of these."""
    for seeds in ((0, 9), (1, 10), (11, 0)):
        zoo_file.write(with_seeds(populations[0], *seeds), folder)


def replace_one(folder: Path, populations: list[Population]) -> None:
    """The same id with other content, as after deleting and collecting anew with another torch version."""
    path = sorted(folder.glob("*.h5"))[0]
    first = next(p for p in populations if zoo_file.read_header(path).attributes["seconds"] == p.seconds)
    path.unlink()
    zoo_file.write(replace(first, weights=first.weights + 1, metrics=first.metrics / 2), folder)


def truncate(folder: Path, populations: list[Population]) -> None:
    path = sorted(folder.glob("*.h5"))[1]
    path.write_bytes(path.read_bytes()[:-64])


def overwrite(folder: Path, populations: list[Population]) -> None:
    """Damage that leaves the size as it was."""
    path = sorted(folder.glob("*.h5"))[1]
    path.write_bytes(bytes(path.stat().st_size))


def delete(folder: Path, populations: list[Population]) -> None:
    sorted(folder.glob("*.h5"))[0].unlink()


def foreign(folder: Path, populations: list[Population]) -> None:
    (folder / "a.h5").write_text("mine")
    (folder / "b.h5").symlink_to(folder / "nowhere")
    (folder / "c.h5").mkdir()


def rename(folder: Path, populations: list[Population]) -> None:
    sorted(folder.glob("*.h5"))[0].rename(folder / "other.h5")


def repair(folder: Path, populations: list[Population]) -> None:
    """What was bad is good again."""
    truncate(folder, populations)
    Zoo(folder)
    sorted(folder.glob("*.h5"))[1].unlink()
    for population in populations:
        zoo_file.write(population, folder)


def touch(folder: Path, populations: list[Population]) -> None:
    for path in folder.glob("*.h5"):
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


CHANGES = [add, overlap, replace_one, truncate, overwrite, delete, foreign, rename, repair, touch]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_answers_are_those_of_the_files_after_every_change(
    folder: Path, populations: list[Population], change: Callable[[Path, list[Population]], None]
) -> None:
    assert_agrees(folder)
    change(folder, populations)
    zoo = assert_agrees(folder)
    (folder / index.NAME).unlink()
    assert json.dumps(list(Zoo(folder).runs)) == json.dumps(list(zoo.runs))


def test_changes_one_after_the_other(folder: Path, populations: list[Population]) -> None:
    for change in (add, overlap, delete, foreign, truncate):
        change(folder, populations)
        assert_agrees(folder)


def test_no_file_is_opened_that_the_index_knows(
    folder: Path, populations: list[Population], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = Zoo(folder).where(architecture="mlp-1-w8").matrix()
    opened = []
    real = h5py.File

    def watched(path: Any, *args: Any, **kwargs: Any) -> h5py.File:
        opened.append(Path(path).name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(h5py, "File", watched)
    zoo = Zoo(folder).where(architecture="mlp-1-w8")
    np.testing.assert_array_equal(zoo.matrix(), matrix)
    zoo.state_dict(0), list(zoo.tensors()), repr(zoo)
    assert opened == []
    new = zoo_file.write(with_seeds(populations[0], 7, 8), folder)
    opened.clear()
    assert len(Zoo(folder)) == 8 and opened == [new.name]


def test_whatever_happens_to_the_index_the_answers_stay(folder: Path) -> None:
    """Bits flipped all over it, any length, foreign content: it is made anew or does no harm."""
    expected = json.dumps(list(Zoo(folder).runs))
    path = folder / index.NAME
    content = path.read_bytes()
    random = np.random.default_rng(0)
    damaged = [content[:length] for length in (0, 1, 100, len(content) // 2, len(content) - 1)]
    damaged += [b"text", b"\x93NUMPY" + content, content + b"more"]
    for place in random.integers(len(content), size=150).tolist():
        damaged.append(content[:place] + bytes([content[place] ^ 1 << random.integers(8)]) + content[place + 1 :])
    for each in damaged:
        path.write_bytes(each)
        assert json.dumps(list(Zoo(folder).runs)) == expected
    assert index.load(path) is not None


def test_an_index_of_another_version_is_made_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Zoo(folder)
    monkeypatch.setattr(index, "MADE_FOR", "another")
    assert index.load(folder / index.NAME) is None
    assert_agrees(folder)
    assert index.load(folder / index.NAME) is not None


def test_an_index_that_lacks_a_part_is_made_anew(folder: Path) -> None:
    Zoo(folder)
    path = folder / index.NAME
    with np.load(path) as file:
        parts = dict(file)
    for lost in parts:
        np.savez(path, **{name: array for name, array in parts.items() if name != lost})
        assert index.load(path) is None
    assert_agrees(folder)


def test_the_deep_check_does_not_trust_it(folder: Path) -> None:
    """A flipped bit under an unchanged size and time: only `verify` reads it, and it does."""
    header = Zoo(folder).populations[0].header
    before = header.path.stat()
    content = bytearray(header.path.read_bytes())
    content[header.weights.offset] ^= 1
    header.path.write_bytes(content)
    os.utime(header.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not Zoo(folder).bad
    assert list(Zoo(folder, verify=True).bad) == [header.path]
    shutil.copy(folder / index.NAME, folder / "kept")
    assert json.dumps(list(Zoo(folder).runs)) == json.dumps(expected_runs(folder))


def test_a_folder_that_cannot_be_written_is_read_without(folder: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))  # the disk is full
    try:
        assert len(Zoo(folder)) == 6
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (folder / index.NAME).exists() and not list(folder.glob(".*"))
    (folder / index.NAME).mkdir()  # nothing can have its name
    assert len(Zoo(folder)) == 6 and not list(folder.glob(".*"))
    (folder / index.NAME).rmdir()
    folder.chmod(0o555)  # for all but root
    try:
        assert len(Zoo(folder)) == 6
    finally:
        folder.chmod(0o755)
    assert_agrees(folder)


def test_processes_at_once_do_no_harm(folder: Path) -> None:
    code = f"from collect.zoo import Zoo; assert len(Zoo({str(folder)!r})) == 6"
    readers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [reader.wait() for reader in readers] == [0, 0]
    assert not list(folder.glob(".*")) and index.load(folder / index.NAME) is not None
    assert_agrees(folder)


def test_a_file_that_changes_under_an_open_zoo_is_noticed(folder: Path, populations: list[Population]) -> None:
    zoo = Zoo(folder)
    replace_one(folder, populations)
    with pytest.raises(ZooError, match="open it again"):
        [view.header for view in zoo.populations]
    delete(folder, populations)
    with pytest.raises(ZooError, match="open it again"):
        [view.header for view in zoo.populations]


def test_runs_of_an_older_version_have_the_defaults_of_what_came_later(folder: Path) -> None:
    path = sorted(folder.glob("*.h5"))[0]
    with h5py.File(path, "a") as file:
        table = file["runs"][()]
        del file["runs"]
        file["runs"] = table[[name for name in table.dtype.names if name not in ADDED]].copy()
    zoo = Zoo(folder, verify=True)
    assert not zoo.bad or list(zoo.bad) == [path]  # if it is the one with a trajectory, its columns are missed
    zoo = Zoo(folder)
    assert set(zoo.column("dropout")) == {0.0} and len(zoo.where(dropout=0.0)) == 6


def test_splits_and_ids_of_a_loaded_index(folder: Path) -> None:
    Zoo(folder)
    zoo = Zoo(folder)
    assert [split_of(run) for run in zoo.column("id")] == zoo.column("split").tolist()
    assert zoo.column("id").dtype.kind == "U" and zoo.column("seed").dtype == np.int64
