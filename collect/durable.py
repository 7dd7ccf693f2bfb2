"""Files that are either complete and on the disk, or not there at all.

Written under a temporary name in the destination folder, closed, fsynced, renamed, and the folder fsynced. A kill at
any moment leaves at most a temporary file, whose name says which process of which machine was writing it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from generators.errors import ZooError

STALE_SECONDS = 24 * 3600  # temporary files of other machines are swept when they are older than this
BEAT_SECONDS = 30  # between signs of life of a claim
SILENT_SECONDS = 10 * BEAT_SECONDS  # claims of other machines without one are over; generous, as clocks differ
CLAIM = ".claim"  # what a claim's name adds to that of its file
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


@dataclass(frozen=True)
class Progress:
    """How far the work on a file is.

    Attributes:
        fraction: that is done.
        gained: what of it this process did.
        seconds: that it took for that.
    """

    fraction: float = 0.0
    gained: float = 0.0
    seconds: float = 0.0


class Claim:
    """What a process tells of its work on a file."""

    def __init__(self) -> None:
        self._fractions: tuple[float, float] | None = None  # when it began, now
        self._began = 0.0

    def tell(self, fraction: float) -> None:
        """`fraction` is done. Cheap; others get to know it with the next sign of life."""
        if self._fractions is None:
            self._fractions, self._began = (fraction, fraction), time.monotonic()
        self._fractions = (self._fractions[0], fraction)

    def progress(self) -> Progress:
        """What was told last."""
        first, last = self._fractions or (0.0, 0.0)
        return Progress(last, last - first, time.monotonic() - self._began if self._fractions else 0.0)


@contextlib.contextmanager
def claim(path: Path) -> Iterator[Claim]:
    """Show others that this process works on what will be `path`, by a temporary file beside it.

    It locks nothing: two processes may claim one path, and either finishes. Other machines cannot see whether this
    process lives, so a thread writes the file again and again, with what was told of the progress. A folder that cannot
    be written is for `durable` to report.
    """
    temporary, mine, over = _temporary(path.with_name(f"{path.name}{CLAIM}")), Claim(), threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(temporary)  # possible on a full disk too
                temporary.write_text(json.dumps(asdict(mine.progress())))

    with contextlib.suppress(OSError):
        temporary.touch()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield mine
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def claimed(folder: Path) -> dict[str, Path]:
    """Names of the files in `folder` that somebody is working on, each with the claim or what is written of the file;
    those of dead processes do not count.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(".*.tmp")) if folder.is_dir() else ():
        match = _TEMPORARY.match(path.name)
        with contextlib.suppress(FileNotFoundError):  # just finished
            if match is not None and not _is_stale(path, match, SILENT_SECONDS):
                found.setdefault(match["name"].removesuffix(CLAIM), path)  # claims are sorted first
    return found


def progress(claim: Path) -> Progress:
    """How far the work is, by a file from `claimed`; as if nothing had been told yet where it does not say."""
    try:
        return Progress(**json.loads(claim.read_bytes()[:1000]))
    except (OSError, ValueError, TypeError):
        return Progress()


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
