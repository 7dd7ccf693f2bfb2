"""One file holds what many held, digest for digest, and is there whole or not at all."""

from __future__ import annotations

import resource
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from collect import cli, packed
from collect.plan import plan, sweep
from collect.recipe import Recipe
from collect.runner import collect
from collect.zoo import Zoo, scan
from generators.commandline import EXIT_WRONG_INPUT, run
from generators.errors import ZooError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three populations: MLPs have no buffers, the ResNets have."""
    path = tmp_path_factory.mktemp("zoo")
    base = Recipe(epochs=1, batch_size=256)
    collect(plan(sweep(base, architecture=["mlp-1-w4", "resnet-8-w2"]), runs=3, together=2), path, workers=0)
    next(path.glob("*.h5")).rename(path / "foreign.h5")  # a good file under a wrong name is a bad file
    return path


@pytest.fixture(scope="module")
def out(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed.write(scan(folder, verify=True)[0], tmp_path_factory.mktemp("out") / "zoo.h5")


def test_the_packed_zoo_is_the_zoo(folder: Path, out: Path) -> None:
    before, after = Zoo(folder), Zoo(out, verify=True)
    assert len(before.populations) == 3 and before.bad and not after.bad
    assert after.runs == before.runs
    for old, new in zip(before.populations, after.populations, strict=True):
        assert new.header.digest == old.header.digest and new.header.attributes == old.header.attributes
        np.testing.assert_array_equal(new.weights, old.weights)
        np.testing.assert_array_equal(new.buffers, old.buffers)
        assert new.header.weights.offset % 64 == 0
        with h5py.File(out) as file:
            np.testing.assert_array_equal(file[f"populations/{new.id}/weights"][()], new.weights)
    for index in range(len(before)):
        states = before.state_dict(index), after.state_dict(index)
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0] | states[1])
    name = before.runs[0]["architecture"]
    rows = [zoo.where(architecture=name).flat() for zoo in (before, after)]
    np.testing.assert_array_equal(rows[0].matrix(), rows[1].matrix())
    for indices, batch in rows[1].blocks(2, torch.Generator().manual_seed(0)):
        np.testing.assert_array_equal(rows[0].batch(indices), batch)


def test_what_is_damaged_is_left_out_only_when_asked_and_the_file_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "packed.h5"

    def call(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["collect", *map(str, arguments)])
        return run(cli.main)

    assert call("pack", folder, path) == EXIT_WRONG_INPUT
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 4 files" in error and "foreign.h5" in error and "--partial" in error and "--verify" in error
    assert not path.exists()
    assert call("pack", folder, path, "--partial") == 0
    for shown in (capsys.readouterr().out, "" if call("status", path) else capsys.readouterr().out):
        assert "was made without 1 damaged files: foreign.h5" in shown
    assert packed.left_out(path).keys() == {"foreign.h5"} and "its content says" in packed.left_out(path)["foreign.h5"]
    assert len(Zoo(path, verify=True).populations) == 3


def test_a_packed_zoo_of_an_older_version_was_made_without_nothing(out: Path, tmp_path: Path) -> None:
    older = Path(shutil.copy(out, tmp_path))
    with h5py.File(older, "a") as file:
        del file.attrs["left_out"]
    assert packed.left_out(out) == packed.left_out(older) == {} and len(Zoo(older).populations) == 3


def test_packing_again_changes_nothing_and_other_content_is_not_overwritten(folder: Path, out: Path) -> None:
    headers, _ = scan(folder)
    stamp, content = out.stat().st_mtime_ns, out.read_bytes()
    assert packed.write(headers, out) == out and out.stat().st_mtime_ns == stamp
    with pytest.raises(ZooError, match="other content"):
        packed.write(headers[:1], out)
    assert out.read_bytes() == content
    with pytest.raises(ZooError, match="outside the zoo's folder"):
        packed.write(headers, folder / "all.h5")
    with pytest.raises(ZooError, match="no whole population"):
        packed.write([], out.with_name("none.h5"))


def test_a_packed_zoo_can_be_packed_again(out: Path, tmp_path: Path) -> None:
    again = packed.write(packed.read(out)[0], tmp_path / "again.h5")
    assert packed.zoo_digest(packed.read(again, verify=True)[0]) == packed.zoo_digest(packed.read(out)[0])


def test_damage_is_named_and_the_rest_is_usable(out: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(out, tmp_path))
    hurt = packed.read(path)[0][1]
    content = bytearray(path.read_bytes())
    content[hurt.weights.offset] ^= 1
    path.write_bytes(content)
    assert not Zoo(path).bad  # the cheap check cannot see it
    zoo = Zoo(path, verify=True)
    assert list(zoo.bad) == [path / hurt.id] and len(zoo.populations) == 2
    assert hurt.id in str(zoo.bad[path / hurt.id]) and hurt.runs[0]["id"] in str(zoo.bad[path / hurt.id])


def test_files_that_are_no_packed_zoo(folder: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("mine")
    (tmp_path / "short.h5").write_bytes(out.read_bytes()[:-100])
    for path in (tmp_path / "text.h5", tmp_path / "short.h5", scan(folder)[0][0].path):
        with pytest.raises(ZooError, match=path.name):
            Zoo(path)
    beside = Path(shutil.copy(out, tmp_path / "beside.h5"))
    assert "packed zoo" in str(scan(tmp_path)[1][beside])
    with pytest.raises(ZooError, match=r"is a folder; name the file to make, such as .*\.h5"):
        packed.write(scan(folder)[0], tmp_path)
    lost = Path(shutil.copy(out, tmp_path / "lost.h5"))
    with h5py.File(lost, "a") as file:
        del file["populations"][min(file["populations"])]
    with pytest.raises(ZooError, match="lacks populations"):
        Zoo(lost)
    newer = Path(shutil.copy(out, tmp_path / "newer.h5"))
    with h5py.File(newer, "a") as file:
        file.attrs["schema"] = packed.SCHEMA + 1
    with pytest.raises(ZooError, match="newer version"):
        Zoo(newer)


def test_reading_writes_nothing(folder: Path, out: Path, tmp_path: Path) -> None:
    """As from a disk that cannot be written: every write would fail, and nothing new lies beside the file."""
    path = Path(shutil.copy(out, tmp_path))
    path.chmod(0o444)
    before, stamp = resource.getrlimit(resource.RLIMIT_FSIZE), path.stat().st_mtime_ns
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        zoo = Zoo(path, verify=True)
        assert zoo.runs == Zoo(folder).runs and [view.header.id for view in zoo.populations]
        assert zoo.module(0) is not None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [path] and path.stat().st_mtime_ns == stamp


def test_a_full_disk_leaves_nothing(folder: Path, out: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    headers, _ = scan(folder)
    for size in (100, out.stat().st_size // 2, out.stat().st_size - 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            with pytest.raises(ZooError, match="make room"):
                packed.write(headers, tmp_path / "zoo.h5")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert list(tmp_path.iterdir()) == []
    assert packed.write(headers, tmp_path / "zoo.h5").is_file()
