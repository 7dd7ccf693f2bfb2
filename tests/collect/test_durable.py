"""Files are whole or not there; what dead writers left is swept, what living ones write is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from collect import durable as module
from collect.durable import durable, sweep
from full_disk import disk_of
from generators.errors import ZooError

WRITER = """
import pathlib, sys, time
from collect.durable import durable
with durable(pathlib.Path(sys.argv[1])) as temporary:
    temporary.write_text("half of it")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_the_name_appears_with_the_content_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with durable(path) as temporary:
        temporary.write_text("all")
        assert not path.exists()
    assert path.read_text() == "all"
    assert list(path.parent.iterdir()) == [path]


def test_a_fault_in_the_body_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), durable(path) as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_and_a_folder_that_is_a_file_are_clear_errors(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with disk_of(1000), pytest.raises(ZooError, match="make room"), durable(path) as temporary:
        temporary.write_bytes(bytes(2000))
    assert list(tmp_path.iterdir()) == []
    path.write_text("a file")
    with pytest.raises(ZooError, match="cannot write"), durable(path / "below") as temporary:
        pytest.fail("the body must not run")


def test_temporary_files_of_killed_writers_are_swept_and_of_living_ones_are_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "file")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(module.__file__).parents[1]) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "writing\n"
        (temporary,) = tmp_path.iterdir()
        assert sweep(tmp_path) == []
        writer.send_signal(signal.SIGKILL)
        while Path(f"/proc/{writer.pid}/stat").exists() and module._is_running(writer.pid):
            pass  # dead but not waited for yet: a zombie counts as dead
        assert sweep(tmp_path) == [temporary]
        assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_other_machines_are_swept_after_a_day(tmp_path: Path) -> None:
    young, old, own = (tmp_path / name for name in (".a@elsewhere@1.tmp", ".b@elsewhere@1.tmp", ".unrelated.tmp"))
    for path in (young, old, own):
        path.touch()
    os.utime(old, (0, 0))
    os.utime(own, (0, 0))
    assert sweep(tmp_path) == [old]
    assert young.exists() and own.exists()
