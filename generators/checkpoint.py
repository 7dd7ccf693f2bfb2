"""Checkpoints: a generator as a folder of safetensors + JSON + card, checked by sha256 whenever it is loaded.

    config.json           {format, kind, name, config, card, files: {file: sha256}, digest}
    weights.safetensors   the state dict of the generator
    README.md             the card for people

`digest` is the sha256 of the canonical JSON of all other fields, and the file must be byte for byte what `save` writes,
so one flipped byte in any of the three files is found. Nothing is unpickled. `checkpoints/index.json` lists what the
project publishes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import types
import typing
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from generators.errors import CheckpointError, ConfigError, unknown_name

if TYPE_CHECKING:
    from generators.generator import Generator

log = logging.getLogger(__name__)

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "weights.safetensors", "README.md"
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
    licence: str = ""
    size_bytes: int = 0
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    path: str | None = None
    url: str | None = None


def looks_like_location(text: str) -> bool:
    """True for what says where a checkpoint lies (folder, https url, hub id) rather than what it is called."""
    return "/" in text or text.startswith("https://") or Path(text).expanduser().is_dir()


# ---- the files of one checkpoint


def _canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest(description: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical({key: description[key] for key in description if key != "digest"})).hexdigest()


def _render(description: dict[str, Any]) -> bytes:
    return (json.dumps(description, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parse(content: bytes, where: object) -> dict[str, Any]:
    """The description in the bytes of a config.json, its own digest and format checked."""
    try:
        description = json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{where}: {CONFIG} is not JSON ({error}); it is damaged or no checkpoint") from error
    if not isinstance(description, dict) or "format" not in description:
        raise CheckpointError(f"{where}: {CONFIG} is not that of a generator; was it written by `generators.save`?")
    if description["format"] != FORMAT:
        raise CheckpointError(
            f"{where}: the checkpoint has format {description['format']!r}, this version reads format {FORMAT}; "
            "use the version of powerhouse-init that its card names, or update this one"
        )
    if description.get("digest") != _digest(description) or content != _render(description):
        raise CheckpointError(
            f"{where}: {CONFIG} does not match its own digest; it was changed or damaged, get it anew"
        )
    named = description.get("files", {})
    if WEIGHTS not in named or any(Path(name).name != name for name in named):
        raise CheckpointError(f"{where}: {CONFIG} must list {WEIGHTS} and plain file names only")
    return description


def verify(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The description in config.json, after checking the sha256 of every file.

    Raises:
        CheckpointError: a file is missing, changed or damaged, or the format is another one.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is no checkpoint: it has no {CONFIG}")
    description = _parse((folder / CONFIG).read_bytes(), folder)
    for name, expected in description["files"].items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing; the checkpoint is incomplete, get it anew")
        if _sha256(folder / name) != expected:
            raise CheckpointError(
                f"{folder}: the sha256 of {name} does not match; it was changed or damaged, get it anew"
            )
    return description


def _card_for_people(generator: Generator) -> str:
    """The README.md of a checkpoint, made from its card and config."""
    title = generator.name
    lines = [f"# {title}", "", f"A weight generator of kind `{generator.kind_name}` for `powerhouse-init`.", ""]
    lines += ["```python", "import generators", f"report = generators.init(model, {title!r}, seed=0)", "```", ""]
    for heading, facts in (("Facts", generator.card), ("Configuration", dataclasses.asdict(generator.config))):
        lines += [f"## {heading}", ""]
        lines += [
            f"- **{key}**: {value if isinstance(value, str) else json.dumps(value)}" for key, value in facts.items()
        ]
        lines += [""]
    return "\n".join(lines)


def save(generator: Generator, folder: str | os.PathLike[str]) -> Path:
    """Write a checkpoint. A new folder appears complete or not at all; in an existing one config.json comes last.

    Args:
        generator: what to save; its `card` and `config` must hold JSON values only.
        folder: is made if it does not exist. An older checkpoint in it is replaced, other files are left alone.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder holds files of these names that are no checkpoint's, or the weights are not finite.
        ConfigError: card or config hold something that JSON cannot.
    """
    folder = Path(folder).expanduser()
    present = [name for name in (CONFIG, WEIGHTS, CARD) if (folder / name).exists()]
    if present and not _is_ours(folder):
        raise CheckpointError(f"{folder} holds {present[0]} that is not part of a checkpoint; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; choose a folder")
    for name, value in generator.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"{generator.name}: {name} holds NaN or infinity; a broken generator is not saved")
    description = dict(
        format=FORMAT, kind=generator.kind_name, name=generator.name, config=dataclasses.asdict(generator.config),
        card=generator.card,
    )  # fmt: skip
    try:
        _canonical(description)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{generator.name}: card and config must hold finite JSON values only: {error}") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.tmp"
    stage.mkdir()
    try:
        safetensors.torch.save_model(generator, str(stage / WEIGHTS))
        (stage / CARD).write_text(_card_for_people(generator), encoding="utf-8")
        (stage / WEIGHTS).chmod((stage / CARD).stat().st_mode)  # safetensors lets nobody else read; the umask decides
        description["files"] = {name: _sha256(stage / name) for name in (WEIGHTS, CARD)}
        description = json.loads(_canonical(description))  # as a reader will see it: lists for tuples, text for keys
        (stage / CONFIG).write_bytes(_render({**description, "digest": _digest(description)}))
        _install(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return folder


def _is_ours(folder: Path) -> bool:
    """Whether the config.json in `folder` is, or was before it was damaged, that of a checkpoint."""
    try:
        description = json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(description, dict) and {"format", "kind", "files", "digest"} <= description.keys()


def _install(stage: Path, folder: Path) -> None:
    """Move the durable files of `stage` to `folder`, all at once if there is nothing in the way."""
    for path in (*stage.iterdir(), stage):
        _sync(path)
    if not folder.exists() or not any(folder.iterdir()):
        os.rename(stage, folder)
    else:
        for name in (WEIGHTS, CARD, CONFIG):
            os.replace(stage / name, folder / name)
        _sync(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- loading


def _revive(hint: Any, value: Any) -> Any:
    """`value` from JSON as the annotated type of a config field: tuples for lists, dataclasses for objects."""
    arguments = typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _as_config(typing.cast(type, hint), value)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        plain = [argument for argument in arguments if argument is not type(None)]
        return value if value is None or len(plain) != 1 else _revive(plain[0], value)
    if isinstance(value, list) and (hint is tuple or typing.get_origin(hint) is tuple):
        if not arguments:
            return tuple(value)
        each = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_revive(part, item) for part, item in zip(each, value, strict=True))
    if isinstance(value, dict) and typing.get_origin(hint) is dict:
        return {key: _revive(arguments[1], item) for key, item in value.items()}
    return value


def _as_config(config: type, values: dict[str, Any]) -> Any:
    """An instance of the dataclass `config` from JSON values."""
    hints = typing.get_type_hints(config)
    unknown = values.keys() - {field.name for field in dataclasses.fields(config)}
    if unknown:
        raise CheckpointError(
            f"{config.__name__} has no {', '.join(sorted(unknown))}: the checkpoint is of another version; "
            "use the version of powerhouse-init that its card names"
        )
    return config(**{key: _revive(hints[key], value) for key, value in values.items()})


def load(where: str | os.PathLike[str]) -> Generator:
    """A generator, ready to sample: in evaluation mode, on the CPU.

    Args:
        where: a published name (see `list_generators`), a folder, the https url of a folder, or a Hugging Face hub id
            `owner/name` or `owner/name@revision`.

    Raises:
        UnknownNameError: no such published name; the message carries near names.
        CheckpointError: it cannot be had, is no checkpoint, or does not match its sha256.
    """
    from generators.generator import generator_class

    folder = locate(where)
    description = verify(folder)
    kind = generator_class(description["kind"])
    with torch.random.fork_rng(devices=[]):  # constructors draw start values, which the weights below replace
        generator = kind(
            _as_config(kind.Config, description["config"]), name=description["name"], card=description["card"]
        )
    try:
        safetensors.torch.load_model(generator, folder / WEIGHTS, strict=True)
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder}: the weights do not fit a {kind.__name__} of this version: {error}") from error
    return generator.eval()


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


# ---- published generators and downloads


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
    row = {key: card.get(key, "") for key in ("data", "summary", "licence")} | {"metrics": card.get("metrics", {})}
    return {"kind": description["kind"], "digest": description["digest"], "size_bytes": size, **row}


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
        description = _parse(content, url)
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
        _install(stage, folder)
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
