"""Where checkpoints come from: the published index, a folder, an https url, the Hugging Face hub.

`checkpoints/index.json` is {format, generators: {name: {path or url, digest, kind, data, size_bytes, licence, metrics,
paper, summary}}}. What comes over the network is kept in the cache folder under its digest, if every sha256 matches.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import logging
import os
import re
import shutil
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from generators.checkpoint import CARD, CONFIG, WEIGHTS, install, parse, verify
from generators.errors import CheckpointError, unknown_name

log = logging.getLogger(__name__)

CONFIG_LIMIT = 2**20  # bytes; a config.json is a few kB
WEIGHTS_LIMIT = 2**31  # bytes; what a download may be when the index does not say
TIMEOUT = 30.0  # seconds without an answer from a server
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class GeneratorEntry:
    """One published generator, a row of `checkpoints/index.json`.

    Attributes:
        name: what `load` takes.
        kind: key of `generators.generator.GENERATOR_KINDS`.
        data: data set of the zoo that it was fitted on.
        summary: one line for people.
        paper: number of the source.
        licence: SPDX name.
        size_bytes: size of all files together.
        digest: digest of its config.json, and through it of all its files.
        metrics: figures measured when it was fitted.
        path: folder relative to the index, or None.
        url: https address of the folder, or None.
    """

    name: str
    kind: str
    digest: str
    data: str = ""
    summary: str = ""
    paper: str = ""
    licence: str = ""
    size_bytes: int = 0
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    path: str | None = None
    url: str | None = None


def looks_like_location(text: str) -> bool:
    """True for what says where a checkpoint lies (folder, https url, hub id) rather than what it is called."""
    return "/" in text or text.startswith("https://") or Path(text).expanduser().is_dir()


def locate(where: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint, downloaded into the cache if need be; see `load`."""
    text = os.fspath(where)
    published = {entry.name: entry for entry in list_generators()}
    if isinstance(where, str) and where in published:
        return _published(published[where])
    folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if text.startswith("https://"):
        return _download(text)
    if isinstance(where, str) and (match := _HUB_ID.fullmatch(where)):
        return _from_hub(match["id"], match["revision"])
    if not looks_like_location(text):
        raise unknown_name("generator", text, published, way_out="`python -m generators list` shows all.")
    raise CheckpointError(
        f"{text}: no such folder; a checkpoint is a name, a folder, an https url or a hub id owner/name"
    )


def index_path() -> Path:
    """The index of published generators: beside the package in a checkout, inside the package in a wheel."""
    package = Path(__file__).parent
    inside = package / "checkpoints" / "index.json"
    return inside if inside.is_file() else package.parent / "checkpoints" / "index.json"


def list_generators() -> list[GeneratorEntry]:
    """Every published generator, by name.

    Raises:
        CheckpointError: the index is damaged.
    """
    path = index_path()
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_bytes())["generators"]
        return [GeneratorEntry(name=name, **rows[name]) for name in sorted(rows)]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); install powerhouse-init again") from error


def index_entry(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The row of `checkpoints/index.json` for the checkpoint in `folder`, all but where it lies."""
    folder = Path(folder)
    description = verify(folder)
    card = description["card"]
    size = sum((folder / name).stat().st_size for name in (CONFIG, *description["files"]))
    row = {"kind": description["kind"], "digest": description["digest"], "size_bytes": size}
    row |= {key: card.get(key, "") for key in ("data", "summary", "paper", "licence")}
    return row | {"metrics": card.get("metrics", {})}


def cache_folder() -> Path:
    """Where downloads are kept: `POWERHOUSE_HOME` if it is set, else `~/.cache/powerhouse`."""
    return Path(os.environ.get("POWERHOUSE_HOME") or "~/.cache/powerhouse").expanduser()


def _published(entry: GeneratorEntry) -> Path:
    if entry.path:
        folder = index_path().parent / entry.path
    elif entry.url:
        folder = _download(entry.url, expected=entry.digest, limit=entry.size_bytes or WEIGHTS_LIMIT)
    else:
        raise CheckpointError(f"{entry.name}: the index says neither path nor url; install powerhouse-init again")
    if verify(folder)["digest"] != entry.digest:
        raise CheckpointError(f"{folder} is a sound checkpoint, but not the published {entry.name}; get it anew")
    return folder


def _fetch(url: str, limit: int) -> bytes:
    """At most `limit` bytes from an https address."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            if not answer.url.startswith("https://"):
                raise CheckpointError(f"{url} leads to {answer.url}, which is not https")
            content: bytes = answer.read(limit + 1)
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(
            f"{url} cannot be downloaded ({error}); check the address and the network, or get the folder another way "
            "and pass its path"
        ) from error
    if len(content) > limit:
        raise CheckpointError(f"{url} is larger than the {limit} bytes expected; nothing was kept")
    return content


def _download(url: str, *, expected: str | None = None, limit: int = WEIGHTS_LIMIT) -> Path:
    """The cached copy of the checkpoint whose files lie under `url`; it is kept only if every sha256 matches."""
    url = url.removesuffix(CONFIG).rstrip("/")
    folder = cache_folder() / expected if expected else None
    if folder is None or not folder.is_dir():
        content = _fetch(f"{url}/{CONFIG}", CONFIG_LIMIT)
        description = parse(content, url)
        if expected and description["digest"] != expected:
            raise CheckpointError(f"{url} is a sound checkpoint, but not the published one; nothing was kept")
        folder = cache_folder() / description["digest"]
    if folder.is_dir():
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            log.warning("%s; downloading it again", error)
            shutil.rmtree(folder)
            return _download(url, expected=expected, limit=limit)
    log.info("downloading %s", url)
    stage = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    stage.mkdir(parents=True)
    try:
        (stage / CONFIG).write_bytes(content)
        for name in description["files"]:
            (stage / name).write_bytes(_fetch(f"{url}/{name}", limit))
        verify(stage)
        install(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return folder


def _from_hub(name: str, revision: str | None) -> Path:
    """The folder of a hub repository in the cache of huggingface_hub."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=[CONFIG, WEIGHTS, CARD]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name}: there is no such folder here, and the Hugging Face hub does not give it either: {reason}"
        ) from error
