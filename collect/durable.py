"""Files that are either complete and on the disk, or not there at all.

Written under a temporary name in the destination folder, closed, fsynced, renamed, and the folder fsynced. A kill at
any moment leaves at most a temporary file, whose name says which process of which machine was writing it.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from generators.errors import ZooError

STALE_SECONDS = 24 * 3600  # temporary files of other machines are swept when they are older than this
BEAT_SECONDS = 30  # between signs of life of a claim
SILENT_SECONDS = 10 * BEAT_SECONDS  # claims of other machines without one are over; generous, as clocks differ
_TEMPORARY = re.compile(r"^\.(?P<name>.+)@(?P<host>[^@]+)@(?P<pid>\d+)\.tmp$")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}@{socket.gethostname()}@{os.getpid()}.tmp")


@contextlib.contextmanager
def durable(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there gets the name `path` when it is safe on the disk.

    The folder is made if it is not there. If the body raises, nothing of the file is left.

    Raises:
        ZooError: the disk is full, the folder cannot be written, ...
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ZooError(
            f"cannot write {path}: {error}; make room or name a folder that can be written, and run the same command "
            "again: what is finished is kept"
        ) from error


@contextlib.contextmanager
def claim(path: Path) -> Iterator[None]:
    """Show others that this process works on what will be `path`, by an empty temporary file that `durable` will fill.

    It locks nothing: two processes may claim one path, and either finishes. Other machines cannot see whether this
    process lives, so a thread renews the file's time. A folder that cannot be written is for `durable` to report.
    """
    temporary, over = _temporary(path), threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(temporary)

    with contextlib.suppress(OSError):
        temporary.touch()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def claimed(folder: Path) -> set[str]:
    """Names of the files in `folder` that somebody is working on; those of dead processes do not count."""
    found = set()
    for path in folder.glob(".*.tmp") if folder.is_dir() else ():
        match = _TEMPORARY.match(path.name)
        with contextlib.suppress(FileNotFoundError):  # just finished
            if match is not None and not _is_stale(path, match, SILENT_SECONDS):
                found.add(match["name"])
    return found


def _is_running(pid: int) -> bool:
    """Whether process `pid` of this machine can still write; one that is dead but not yet reaped cannot."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):  # only where there is a /proc
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def _is_stale(path: Path, match: re.Match[str], seconds: float) -> bool:
    """Whether the writer of a temporary file is gone: known on this machine, else supposed after `seconds`.

    Raises:
        FileNotFoundError: the writer was faster.
    """
    if match["host"] == socket.gethostname() and not _is_running(int(match["pid"])):
        return True
    # Here, too, for another process may have its number by now. A time far ahead is that of a clock since put right.
    return abs(time.time() - path.stat().st_mtime) > seconds


def sweep(folder: Path) -> list[Path]:
    """Delete the temporary files that dead processes left in `folder`, those of other machines once they are a day old.

    Returns:
        What was deleted.
    """
    swept = []
    for path in sorted(folder.glob(".*.tmp")):
        match = _TEMPORARY.match(path.name)
        if match is None:
            continue
        with contextlib.suppress(FileNotFoundError):  # its writer was faster
            if _is_stale(path, match, STALE_SECONDS):
                path.unlink()
                swept.append(path)
    return swept
