"""A training that fails is known to everybody who looks, until it succeeds."""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
from pathlib import Path

import pytest

from collect import cli, failures, perform
from collect.plan import plan, save
from collect.recipe import Recipe
from collect.runner import CollectError, collect
from collect.zoo_file import path_of
from generators.commandline import run

TINY = Recipe(architecture="mlp-1-w4", epochs=1, batch_size=256)


def test_recorded_when_it_fails_and_gone_when_it_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tasks, train = plan([TINY], runs=5, together=1), perform.train

    def broken(recipe: Recipe, seeds: tuple[int, ...], *more: object, **how: object) -> object:
        if seeds[0] > 0:
            raise ZeroDivisionError(f"in the engine\nof {seeds[0]}")
        return train(recipe, seeds, *more, **how)

    monkeypatch.setattr(perform, "train", broken)
    with pytest.raises(CollectError, match="4 of 5 populations"):
        collect(tasks, tmp_path, workers=0)
    found = failures.read(tmp_path)
    assert found.keys() == {task.id for task in tasks[1:]}
    one = found[tasks[1].id]
    assert (one.error, one.host) == ("ZeroDivisionError: in the engine of 1", socket.gethostname())
    assert "in broken" in json.loads(failures.path_of(tmp_path, tasks[1].id).read_text())["detail"]
    monkeypatch.setattr(sys, "argv", ["collect", "status", str(tmp_path)])
    assert run(cli.main) == 0
    shown = capsys.readouterr().out
    assert "5 networks: 1 done, 0 running, 4 failed, 0 open" in shown
    assert shown.count("ZeroDivisionError: in the engine of") == 3 and f"and 1 more in {tmp_path / 'failed'}" in shown
    assert one.time in shown and one.host in shown
    monkeypatch.setattr(perform, "train", train)
    collect(tasks[:3], tmp_path, workers=0)
    assert failures.read(tmp_path).keys() == {task.id for task in tasks[3:]}
    collect(tasks, tmp_path, workers=0)
    assert {path.suffix for path in tmp_path.iterdir()} == {".h5", ".json", ".npz"}
    assert run(cli.main) == 0
    assert "5 done, 0 running, 0 failed, 0 open" in capsys.readouterr().out


def test_a_record_that_outlived_its_failure_is_not_shown_and_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (task,) = plan([TINY], runs=1)
    collect([task], tmp_path, workers=0)
    failures.record(tmp_path, task, "of another collector")
    monkeypatch.setattr(sys, "argv", ["collect", "status", str(tmp_path)])
    assert run(cli.main) == 0
    shown = capsys.readouterr().out
    assert "1 done, 0 running, 0 failed" in shown and "of another collector" not in shown
    collect([task], tmp_path, workers=0)
    assert not (tmp_path / "failed").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"task": 3, "error": "", "host": "", "created": ""}'])
def test_a_damaged_record_is_a_failure_too(tmp_path: Path, content: str) -> None:
    (task,) = plan([TINY], runs=1)
    save([task], tmp_path)
    failures.record(tmp_path, task, "no")
    path = failures.path_of(tmp_path, task.id)
    path.write_text(content)
    (tmp_path / "failed" / f".{task.id}.json@elsewhere@1.tmp").write_text("half of it")
    (found,) = failures.read(tmp_path).values()
    assert str(path) in found.error and "cannot be read" in str(found)
    assert failures.read(tmp_path / "nowhere") == {}


def test_a_disk_that_refuses_the_record_changes_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = plan([TINY], runs=1)[0]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        failures.record(tmp_path, task, "no")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "is not recorded" in caplog.text and not list(tmp_path.rglob("*.json"))
    assert not os.path.exists(path_of(tmp_path, task.id))
