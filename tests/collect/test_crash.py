"""Collectors are killed, stopped and refused in every way, and the zoo ends up as if nothing had happened."""

from __future__ import annotations

import errno
import importlib
import multiprocessing.forkserver
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from collect import runner, unfinished
from collect.durable import SILENT_SECONDS, STALE_SECONDS
from collect.plan import plan
from collect.recipe import Recipe
from collect.runner import collect
from collect.zoo_file import path_of, verify
from generators.commandline import EXIT_DONE, EXIT_INTERRUPTED
from generators.errors import ZooError

SCRIPT = Path(__file__).with_name("slow_process.py")
KILLS = 20
TINY = Recipe(architecture="mlp-1-w4", epochs=1, batch_size=256)


@pytest.fixture(scope="module")
def slow() -> Iterator[ModuleType]:
    """`slow_process.py` under its own name, by which the processes that collect import it as well."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        yield importlib.import_module(SCRIPT.stem)
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def context(slow: ModuleType) -> Iterator[Any]:
    """Processes that are forked from one that has only imported what they need: they start in milliseconds."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([SCRIPT.stem])
    with pytest.MonkeyPatch.context() as patch:  # the server looks for what it imports in its own path
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SCRIPT.parent), str(Path(runner.__file__).parents[1])]))
        multiprocessing.forkserver.ensure_running()
        yield found


@pytest.fixture(scope="module")
def undisturbed(slow: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], float]:
    """Digests of a collection in this process that nobody disturbs, and the seconds it took."""
    folder, start = tmp_path_factory.mktemp("undisturbed"), time.perf_counter()
    collect(slow.tasks(), folder, workers=0)
    seconds = time.perf_counter() - start
    assert_clean(folder)
    return digests(folder), seconds


def digests(folder: Path) -> dict[str, str]:
    """Population id -> digest, for every file; every file is whole."""
    return {path.stem: verify(path).digest for path in folder.glob("*.h5")}


def assert_clean(folder: Path) -> None:
    """Nothing is there but populations, plans and the index."""
    assert {path.suffix for path in folder.iterdir()} <= {".h5", ".json", ".npz"}, sorted(folder.iterdir())
    assert not list(folder.glob(".*"))


@contextmanager
def collecting(
    slow: ModuleType, context: Any, folder: Path, *, twins: int = 1, **how: Any
) -> Iterator[tuple[Any, Any]]:
    """Collectors on one folder; the first of them, and what they tell. On leaving, all are killed that still run."""
    ear, tell = context.Pipe(duplex=False)
    processes = [context.Process(target=slow.collector, args=(folder, tell), kwargs=how) for _ in range(twins)]
    try:
        for process in processes:
            process.start()
        yield processes[0], ear
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def test_killed_twenty_times_then_finished_is_the_same_as_never_disturbed(
    tmp_path: Path, slow: ModuleType, context: Any, undisturbed: tuple[dict[str, str], float]
) -> None:
    """SIGKILL to one collector or two at once, anywhere: half of a population or of a training state
    written, all of it, or just renamed; and at times drawn at random, many of them amid training and its saves.

    Checked after every kill: what had its name is still there, whole and untouched. Checked at the end, against the
    collection that was left in peace: all digests; and that no temporary file and no training state is left.
    """
    expected, seconds = undisturbed
    generator = random.Random(0)
    forced = [(place, suffix) for place in slow.PLACES for suffix in (".h5", ".safetensors")]
    kills: list[tuple[str, str] | None] = [*forced, *[None] * (KILLS - len(forced))]
    generator.shuffle(kills)
    acknowledged: dict[Path, tuple[str, int]] = {}
    amid_work = states = 0
    for number, place in enumerate(kills):
        how = {} if place is None else {"place": place[0], "suffix": place[1], "save_every": 0.0}
        with collecting(slow, context, tmp_path, twins=1 + number % 2, **how) as (process, ear):
            if place is None:
                time.sleep(generator.uniform(0, 4 * seconds / KILLS))
            else:
                assert ear.poll(60) and ear.recv() == place[0]
            amid_work += process.is_alive()
            seen = set(tmp_path.glob("*.h5"))
        found = {path: (verify(path).digest, path.stat().st_mtime_ns) for path in tmp_path.glob("*.h5")}
        assert seen <= found.keys() and acknowledged.items() <= found.items()
        acknowledged = found
        states += any(tmp_path.glob("unfinished/*.safetensors"))
    assert amid_work >= KILLS - 3 and states >= 5 and acknowledged, "the kills came too late to tell anything"
    with collecting(slow, context, tmp_path) as (process, _):
        process.join()
    assert process.exitcode == EXIT_DONE
    assert digests(tmp_path) == expected
    assert all(path.stat().st_mtime_ns == when for path, (_, when) in acknowledged.items())
    assert_clean(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_the_state_of_the_training_and_goes_on_from_there(
    tmp_path: Path, slow: ModuleType, context: Any, undisturbed: tuple[dict[str, str], float], number: int
) -> None:
    with collecting(slow, context, tmp_path, save_every=600.0) as (process, _):
        while process.is_alive() and not list(tmp_path.glob(".*.h5*@*")):
            time.sleep(0.01)
        os.kill(process.pid, number)
        process.join()
    assert process.exitcode == EXIT_INTERRUPTED
    (state,) = tmp_path.glob("unfinished/*")
    assert state.stem in undisturbed[0].keys() - digests(tmp_path).keys()
    assert not list(tmp_path.glob(".*"))
    with collecting(slow, context, tmp_path) as (process, _):
        process.join()
    assert process.exitcode == EXIT_DONE and digests(tmp_path) == undisturbed[0]
    assert_clean(tmp_path)


def test_a_state_that_outlived_its_population_is_swept(tmp_path: Path) -> None:
    (task,) = plan([TINY], runs=1)
    collect([task], tmp_path, workers=0)
    state = unfinished.path_of(tmp_path, task.id)
    state.parent.mkdir()
    state.touch()
    assert collect([task], tmp_path, workers=0).found == (task.id,)
    assert_clean(tmp_path)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_a_population_is_a_clear_error_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    """Full, read-only from now on, or not ours to write: after the first population of three."""
    tasks = plan([TINY], runs=3, together=1)
    write = Path.write_bytes

    def refused(path: Path, content: bytes) -> int:
        if list(tmp_path.glob("*.h5")):
            raise OSError(fault, os.strerror(fault), str(path))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", refused)
        with pytest.raises(ZooError, match=f"{os.strerror(fault)}.*; make room or name a folder.*is finished is kept"):
            collect(tasks, tmp_path, workers=0)
    kept = digests(tmp_path)
    assert len(kept) == 1
    assert_clean(tmp_path)
    assert set(collect(tasks, tmp_path, workers=0).found) == set(kept)
    assert len(digests(tmp_path)) == 3


def test_a_bad_file_among_good_ones_costs_that_file_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A population and a training state: the one is moved aside and trained again, the other passed over."""
    first, second, third = plan([TINY], runs=3, together=1)
    collect([first, second], tmp_path, workers=0)
    expected = digests(tmp_path)
    path_of(tmp_path, first.id).write_bytes(b"no population")
    state = unfinished.path_of(tmp_path, third.id)
    state.parent.mkdir()
    state.write_bytes(b"no training state")
    result = collect([first, second, third], tmp_path, workers=0)
    assert result.found == (second.id,) and set(result.trained) == {first.id, third.id}
    assert "moved aside" in caplog.text and f"{state} is not used" in caplog.text
    assert expected.items() <= digests(tmp_path).items()
    assert not state.parent.exists() and path_of(tmp_path, first.id).with_suffix(".h5.bad").exists()


@pytest.mark.parametrize("age", [SILENT_SECONDS + 60, -STALE_SECONDS - 60])
def test_files_of_another_host_or_from_another_time_do_not_stand_in_the_way(tmp_path: Path, age: int) -> None:
    """What a collector left that was killed under another host name, or before the clock was put right."""
    (task,) = plan([TINY], runs=1)
    here, there = (tmp_path / f".{task.id}.h5@{host}@1.tmp" for host in (os.uname().nodename, "elsewhere"))
    for path in (here, there):  # process 1 is always running
        path.write_bytes(b"half of it")
        os.utime(path, (time.time() - age,) * 2)
    assert collect([task], tmp_path, workers=0).trained == (task.id,)
    assert set(digests(tmp_path)) == {task.id}
    assert [path for path in (here, there) if path.exists()] == ([] if age < 0 else [here, there])
