"""Folders of a zoo with a file for each population that is not stored yet: `unfinished/` and `failed/`.

A file is named after the population's id. It is of no use once the population is stored, and its folder of none once it
is empty.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from collect import durable


def discard(path: Path) -> None:
    """Delete the file at `path`, if there is one, and its folder, if that is empty now."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        path.parent.rmdir()


def sweep(place: Path, *, stored: Callable[[str], bool]) -> None:
    """Delete from the folder `place` what nobody needs any more: the files of populations that are `stored`, and the
    halves of files that dead processes left. What other collectors are writing stays.
    """
    if not place.is_dir():
        return
    durable.sweep(place)
    for path in place.glob("[!.]*"):
        if stored(path.stem):
            discard(path)
    with contextlib.suppress(OSError):
        place.rmdir()
