"""Who trains a task when several could; how often one tells of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from collect import durable, runner
from collect.durable import claim, claimed
from collect.executors import attempt as module
from collect.executors.attempt import Attempt, Elsewhere, free
from collect.plan import Task, plan
from collect.recipe import Recipe
from collect.runner import collect
from collect.zoo_file import path_of, verify

TINY = Recipe(architecture="mlp-1-w4", epochs=1, batch_size=256)


def silent(*progress: object) -> None:
    pass


@contextmanager
def claimed_by_another(task: Task, folder: Path) -> Iterator[subprocess.Popen]:
    """A process that lives, does nothing, and has a claim on `task`."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    folder.mkdir(exist_ok=True)
    (folder / f".{path_of(folder, task.id).name}@{socket.gethostname()}@{process.pid}.tmp").touch()
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_what_another_has_done_or_is_at_is_left_to_it(tmp_path: Path) -> None:
    done, taken, open_ = plan([TINY], runs=3, together=1)
    collect([done], tmp_path, workers=0)
    with claimed_by_another(taken, tmp_path):
        assert free([done, taken, open_], tmp_path) == [done, open_]
        assert Attempt(done, tmp_path, None)(silent) == Elsewhere(done, done=True)
        assert Attempt(taken, tmp_path, None)(silent) == Elsewhere(taken, done=False)
    for task in (taken, open_):  # the other has died
        Attempt(task, tmp_path, None)(silent)
        assert verify(path_of(tmp_path, task.id))


def test_a_collector_waits_for_another_and_trains_what_it_leaves_when_it_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks are claimed: the other finishes the first, and dies over the second."""
    monkeypatch.setattr(runner, "LOOK_SECONDS", 0.05)
    first, second, free_ = tasks = plan([TINY], runs=3, together=1)
    collect([first], tmp_path / "theirs", workers=0)
    with claimed_by_another(first, tmp_path / "ours"), claimed_by_another(second, tmp_path / "ours") as other:

        def act() -> None:
            while not path_of(tmp_path / "ours", free_.id).exists():
                time.sleep(0.01)
            path_of(tmp_path / "theirs", first.id).rename(path_of(tmp_path / "ours", first.id))
            for path in (tmp_path / "ours").glob(f".{first.id}*"):
                path.unlink()
            time.sleep(0.2)
            other.kill()

        thread = threading.Thread(target=act)
        thread.start()
        steps: list[float] = []
        result = collect(tasks, tmp_path / "ours", workers=0, on_progress=steps.append)
        thread.join()
    assert result.found == (first.id,) and result.trained == (free_.id, second.id)
    assert sum(steps) == pytest.approx(3)


SECOND_COLLECTOR = """
import sys
from pathlib import Path
from collect.plan import plan
from collect.recipe import Recipe
from collect.runner import collect
tasks = plan([Recipe(architecture="mlp-1-w4", epochs=8, batch_size=64)], runs=16, together=2)
print(len(collect(tasks, Path(sys.argv[1]), workers=0).trained))
"""


def test_two_collectors_at_once_share_the_work(tmp_path: Path) -> None:
    """Real processes on one folder: every population is trained by one of them."""
    environment = os.environ | {"PYTHONPATH": str(Path(runner.__file__).parents[1])}
    both = [
        subprocess.Popen([sys.executable, "-c", SECOND_COLLECTOR, tmp_path], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    trained = [int(process.communicate(timeout=120)[0]) for process in both]
    assert sum(trained) == len(list(tmp_path.glob("*.h5"))) == 8
    assert not list(tmp_path.glob(".*"))


def test_a_claim_of_another_machine_ends_when_it_is_no_longer_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = tmp_path / ".far.h5@elsewhere@1.tmp"
    far.touch()
    assert claimed(tmp_path) == {"far.h5": far}
    os.utime(far, (0, time.time() - durable.SILENT_SECONDS - 60))
    assert claimed(tmp_path) == {}
    monkeypatch.setattr(durable, "BEAT_SECONDS", 0.01)
    with claim(tmp_path / "near.h5"):
        (near,) = tmp_path.glob(".near*")
        os.utime(near, (0, 0))
        end = time.monotonic() + 10
        while time.time() - near.stat().st_mtime > 5:
            assert time.monotonic() < end, "the claim was not renewed"
            time.sleep(0.01)
    assert not near.exists()


def test_many_ticks_are_few_messages_and_the_last_is_among_them() -> None:
    looks, sent = [0], []

    def tick(*progress: object) -> None:
        looks[0] += 1
        sent.extend([progress] if progress else [])

    seldom = module._throttled(tick)
    for step in range(1, 1001):
        seldom("task", step / 1000)
    assert looks[0] == 1000
    assert sent[0] == ("task", 0.001) and sent[-1] == ("task", 1.0)
    assert len(sent) < 10
