"""Real collections, with worker processes, that are killed and stopped: nothing is lost and nothing is left behind.

`test_crash.py` kills at more places, in collectors without workers.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from collect import durable, runner
from collect.plan import Task
from collect.runner import collect
from collect.zoo_file import verify
from generators.commandline import EXIT_INTERRUPTED
from scripts import load_script

SCRIPT = Path(__file__).with_name("slow_collector.py")


def digests(folder: Path) -> dict[str, str]:
    """Population id -> digest of its weights, buffers, metrics and tables, for every file; every file is whole."""
    return {path.stem: verify(path).digest for path in folder.glob("*.h5")}


def temporaries(folder: Path) -> list[Path]:
    return list(folder.glob(".*"))


def unnamed(folder: Path) -> list[Path]:
    """Populations on their way to a name (there are temporary plans as well)."""
    return list(folder.glob(".*.h5@*"))


def wait_for(condition: Callable[[], object], what: str, *, of: subprocess.Popen | None = None) -> None:
    """Until `condition` holds, a minute at most; not at all if process `of` has ended."""
    end = time.monotonic() + 60
    while not condition():
        assert of is None or of.poll() is None, f"ended before {what}: {of.communicate()[1]}"
        assert time.monotonic() < end, f"waited too long for {what}"
        time.sleep(0.01)


@contextmanager
def collecting(folder: Path, *, pause: float, workers: int = 1) -> Iterator[subprocess.Popen]:
    """A real collection. On leaving, it and all its workers must have ended."""
    environment = os.environ | {"PYTHONPATH": str(Path(runner.__file__).parents[1])}
    command = [sys.executable, str(SCRIPT), str(folder), str(pause), str(workers)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    seen: set[int] = set()

    def look() -> set[int]:
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                parent = path.read_text().rpartition(")")[2].split()[1]
                seen.update({int(path.parent.name)} if parent == str(process.pid) else set())
        return seen

    process.workers = look  # type: ignore[attr-defined]
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
        wait_for(lambda: not any(map(durable._is_running, seen)), "the workers to end with their collector")


@pytest.fixture(scope="module")
def script_tasks() -> list[Task]:
    before = os.replace
    module = load_script(SCRIPT)
    os.replace = before
    return module.tasks()


def test_killed_again_and_again_then_finished_is_the_same_as_never_disturbed(
    tmp_path: Path, script_tasks: list[Task]
) -> None:
    """SIGKILL between write and rename, after the first population, at random; SIGTERM; then to the end.

    Checked after every kill: each population that had its name is still there, untouched and whole. Checked at the end:
    digests of weights, buffers, metrics and tables against a collection in this process, without any workers.
    """
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "zoo"
    collect(script_tasks, undisturbed, workers=0)
    generator = random.Random(0)
    folder.mkdir()

    def kept_after(act: Callable[[subprocess.Popen], None], *, pause: float, workers: int) -> None:
        with collecting(folder, pause=pause, workers=workers) as process:
            act(process)
            process.workers()  # type: ignore[attr-defined]
            acknowledged = {path: path.stat().st_mtime_ns for path in folder.glob("*.h5")}
            process.kill()
        assert acknowledged.keys() <= set(folder.glob("*.h5"))
        assert all(path.stat().st_mtime_ns == when for path, when in acknowledged.items())
        digests(folder)

    def between_write_and_rename(process: subprocess.Popen) -> None:
        wait_for(lambda: unnamed(folder), "a population on its way", of=process)

    def after_one_more(process: subprocess.Popen) -> None:
        before = len(list(folder.glob("*.h5")))
        wait_for(lambda: len(list(folder.glob("*.h5"))) > before, "one more population", of=process)
        time.sleep(generator.uniform(0, 0.2))

    kept_after(between_write_and_rename, pause=30, workers=2)
    assert not digests(folder)
    assert unnamed(folder), "the kill was to hit between write and rename"
    kept_after(after_one_more, pause=0.1, workers=1)
    with collecting(folder, pause=0.3) as process:
        after_one_more(process)
        process.workers()  # type: ignore[attr-defined]
        process.terminate()
        assert process.wait(timeout=60) == EXIT_INTERRUPTED
        assert process.stderr is not None and "run the same command again" in process.stderr.read()
        assert not temporaries(folder)
    there = digests(folder)
    assert 0 < len(there) < len(script_tasks)
    result = collect(script_tasks, folder, workers=0)
    assert set(result.found) == set(there) and len(result.found) + len(result.trained) == len(script_tasks)
    assert not temporaries(folder)
    assert digests(folder) == digests(undisturbed)
    assert {task.id for task in script_tasks} == set(digests(folder))


def test_a_worker_that_is_killed_ends_the_collection_as_an_interruption(
    tmp_path: Path, script_tasks: list[Task]
) -> None:
    with collecting(tmp_path, pause=30) as process:
        wait_for(lambda: unnamed(tmp_path), "a worker at work", of=process)
        writer = int(unnamed(tmp_path)[0].name.split("@")[2].removesuffix(".tmp"))
        assert writer in process.workers()  # type: ignore[attr-defined]
        os.kill(writer, signal.SIGKILL)
        assert process.wait(timeout=60) == EXIT_INTERRUPTED
        assert not temporaries(tmp_path)
