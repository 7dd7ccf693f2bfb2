"""The packed zoo, schema 1: many population files in one HDF5 file, to publish and to download.

    populations/<id>   one group per population, a copy of its file with all attributes and digests (`collect.zoo_file`)
    attributes         format, schema, populations, runs, digest, left_out (JSON: file -> why, of what was damaged when
                       it was packed), package_version, ..., complete

Arrays stay contiguous, so `collect.zoo.Zoo` maps them where they lie; there is nothing to unpack.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py

from collect.durable import durable, sweep
from collect.header import Header, Place, damage
from collect.provenance import provenance
from collect.tables import plain, text
from collect.zoo_file import FAULTS, NewerSchemaError, read_group
from generators.errors import ZooError

log = logging.getLogger(__name__)

FORMAT = "powerhouse-zoo"
SCHEMA = 1
GROUP = "populations"


def zoo_digest(headers: Sequence[Header]) -> str:
    """32 hex digits over the digests of all populations; their order and their files' names do not matter."""
    digests = sorted(header.digest for header in headers)
    return hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()


def group_of(file: h5py.File, population: str) -> h5py.Group:
    """Where the parts of a population lie: its group in a packed zoo, the root of a population file."""
    return file[f"{GROUP}/{population}"] if GROUP in file else file


def _unusable(path: Path, reason: str) -> ZooError:
    return ZooError(f"{path} {reason}; fetch it again, or make it anew with `python -m collect pack ZOO {path.name}`")


def read(path: str | Path, *, verify: bool = False) -> tuple[list[Header], dict[Path, ZooError]]:
    """The usable populations of a packed zoo, sorted by id, and the others, each with its fault.

    Args:
        path: the packed zoo.
        verify: compare every byte with its digest.

    Raises:
        ZooError: the file is no packed zoo, or not complete.
        NewerSchemaError: a newer version wrote it.
    """
    path = Path(path)
    good: list[Header] = []
    bad: dict[Path, ZooError] = {}
    try:
        with h5py.File(path, "r", locking=False) as file:
            attributes = {name: plain(value) for name, value in file.attrs.items()}
            if attributes.get("format") != FORMAT or not attributes.get("complete"):
                raise _unusable(path, "is an HDF5 file, but not a complete packed zoo")
            if attributes["schema"] > SCHEMA:
                raise NewerSchemaError(f"{path} has schema {attributes['schema']}, a newer version wrote it; upgrade")
            for name in sorted(file[GROUP]):
                try:
                    header = read_group(file[GROUP][name], path)
                    fault = damage(header) if verify else ""
                    if header.id != name:
                        fault = f"it says it is {header.id}"
                except FAULTS as error:
                    fault = str(error)
                except ZooError as error:
                    bad[path / name] = error
                    continue
                if fault:
                    bad[path / name] = _unusable(path, f"has a damaged population {name} ({fault})")
                else:
                    good.append(header)
            if not bad and zoo_digest(good) != attributes["digest"]:
                raise _unusable(path, "lacks populations, or has others than it was made with")
    except FAULTS as error:
        raise _unusable(path, f"is truncated, damaged or not an HDF5 file ({error})") from error
    return good, bad


def left_out(path: str | Path) -> dict[str, str]:
    """What a packed zoo was made without: file -> why."""
    with h5py.File(path, "r", locking=False) as file:
        return json.loads(plain(file.attrs.get("left_out", "{}")))


def header_at(place: Place) -> Header:
    """All that is stored of a population, from its file or its group of a packed zoo.

    Raises:
        ZooError: it cannot be read, or is not what it was when `place` was found.
    """
    try:
        with h5py.File(place.path, "r", locking=False) as file:
            header = read_group(group_of(file, place.id), place.path)
    except FAULTS as error:
        raise ZooError(f"{place.path} has changed since the zoo was opened ({error}); open it again") from error
    if (header.id, header.digest) != (place.id, place.digest):
        raise ZooError(f"{place.path} has changed since the zoo was opened; open it again")
    return header


def write(headers: Sequence[Header], out: str | Path, *, left_out: Mapping[str, str] | None = None) -> Path:
    """Copy populations, which the caller has verified, into one file; it has its name when it is complete and durable.

    Args:
        headers: the populations.
        out: the file.
        left_out: what is not among them though it is meant to be, file -> why; the packed zoo says so (`left_out`).

    Returns:
        The path. A file with the same content is left as it is.

    Raises:
        ZooError: nothing to pack; `out` is a folder, lies in the zoo's own, or is there with other content; a
            population changed while it was read; the disk is full, ...
    """
    out = Path(out)
    if not headers:
        raise ZooError("there is no whole population to pack; `python -m collect verify ZOO` says what is wrong")
    if any(header.path.parent.resolve() == out.parent.resolve() for header in headers):
        raise ZooError(f"{out} would lie among the files that it is made of; name a file outside the zoo's folder")
    digest = zoo_digest(headers)
    if out.is_dir():
        raise ZooError(f"{out} is a folder; name the file to make, such as {out}.h5")
    if out.exists():
        if zoo_digest(read(out, verify=True)[0]) == digest:
            return out
        raise ZooError(f"{out} is there with other content; delete it or name another file")
    if out.parent.is_dir():
        sweep(out.parent)
    versions, aligned = ("v110", "v110"), {"alignment_threshold": 1, "alignment_interval": 64}
    facts = {"populations": len(headers), "runs": sum(len(header.table) for header in headers), "digest": digest}
    facts["left_out"] = json.dumps(dict(left_out or {}), sort_keys=True)
    with durable(out) as temporary:
        try:
            with h5py.File(temporary, "w", libver=versions, **aligned) as file:
                target = file.create_group(GROUP)
                for header in headers:
                    with h5py.File(header.path, "r", locking=False) as source:
                        source.copy(group_of(source, header.id), target, name=header.id)
                for name, value in ({"format": FORMAT, "schema": SCHEMA} | facts | provenance()).items():
                    file.attrs[name] = text(value) if isinstance(value, str) else value
                file.attrs["complete"] = True
        except (RuntimeError, LookupError, ValueError) as error:  # how h5py says that a disk is full, among others
            raise OSError(error) from error
        _, bad = read(temporary, verify=True)  # what was written, from the disk, before it gets its name
        if bad:
            raise ZooError(f"{out} was not written: {next(iter(bad.values()))}")
    return out
