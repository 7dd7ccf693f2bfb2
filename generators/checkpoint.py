"""Checkpoints: a generator as a folder of safetensors + JSON + card, checked by sha256 whenever it is loaded.

    config.json           {format, kind, name, config, card, files: {file: sha256}, digest}
    weights.safetensors   the state dict of the generator
    README.md             the card for people

`digest` is the sha256 of the canonical JSON of all other fields, and the file must be byte for byte what `save` writes,
so one flipped byte in any of the three files is found. Nothing is unpickled. Where checkpoints come from, by name or
over the network, is `generators.published`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import types
import typing
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from generators.errors import CheckpointError, ConfigError
from generators.initialiser import Request
from generators.inventory import MATRIX_ROLES, inventory
from generators.statistics import noise_stable_rank, stable_rank

if TYPE_CHECKING:
    from generators.generator import Generator

FORMAT = 1
CONFIG, WEIGHTS, CARD = "config.json", "weights.safetensors", "README.md"
LEAST_STABLE_RANK = 3.0  # of a generated matrix: below, one direction has taken over
EXAMINED_MEMBERS = 3  # whose matrices are examined before a generator is saved
NOISE_REACHES = 2 * LEAST_STABLE_RANK  # matrices so small that white noise has less are not judged


def _canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _digest(description: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical({key: description[key] for key in description if key != "digest"})).hexdigest()


def _render(description: dict[str, Any]) -> bytes:
    return (json.dumps(description, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse(content: bytes, where: object) -> dict[str, Any]:
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
    description = parse((folder / CONFIG).read_bytes(), folder)
    for name, expected in description["files"].items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing; the checkpoint is incomplete, get it anew")
        if _sha256(folder / name) != expected:
            raise CheckpointError(
                f"{folder}: the sha256 of {name} does not match; it was changed or damaged, get it anew"
            )
    return description


def _bullets(facts: dict[str, Any], indent: str = "") -> list[str]:
    """Facts as nested Markdown bullets."""
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}- **{key}**:", *_bullets(value, indent + "  ")]
        elif isinstance(value, list):
            lines.append(f"{indent}- **{key}**: {', '.join(map(str, value)) or 'none'}")
        else:
            lines.append(f"{indent}- **{key}**: {value if isinstance(value, str) else json.dumps(value)}")
    return lines


def _card_for_people(generator: Generator) -> str:
    """The README.md of a checkpoint, made from its card and config."""
    title = generator.name
    lines = [f"# {title}", "", f"A weight generator of kind `{generator.kind_name}` for `powerhouse-init`.", ""]
    lines += ["```python", "import generators", "", "# the name if it is published, else the path of this folder"]
    lines += [f'report = generators.init(model, "{title}", seed=0)', "```", ""]
    for heading, facts in (("Facts", generator.card), ("Configuration", dataclasses.asdict(generator.config))):
        lines += [f"## {heading}", "", *_bullets(facts), ""]
    return "\n".join(lines)


def check_spectrum(generator: Generator, models: Mapping[str, tuple[nn.Module, Tensor]] | None = None) -> None:
    """Raise `CheckpointError` if a generator makes a matrix whose stable rank is under `LEAST_STABLE_RANK`.

    Examined are the first `EXAMINED_MEMBERS` members of its probe models and of `models`, name -> model and input. A
    collapsed spectrum does not show in the spread: each neuron of a layer then says nearly the same.
    """
    for name, (model, example) in {**generator.probes(), **(models or {})}.items():
        found = inventory(model)
        stack = generator.propose_stack(model, Request(found, example_inputs=example), range(EXAMINED_MEMBERS))
        for info in (each for each in found if each.role in MATRIX_ROLES and each.name in stack.sources):
            for member, value in enumerate(stack.values[info.name]):
                for matrix in value.flatten(1).chunk(info.blocks, info.block_axis):
                    figure = stable_rank(matrix)
                    if noise_stable_rank(*matrix.shape) >= NOISE_REACHES and not figure >= LEAST_STABLE_RANK:
                        raise CheckpointError(
                            f"{generator.name}: {info.name} {info.shape} of member {member} that it makes for the "
                            f"model {name!r} has stable rank {figure:.2f}, under {LEAST_STABLE_RANK:g}; collapsed "
                            "generators are not saved: train it with a higher anchor, rank or spectrum_steps"
                        )


def save(
    generator: Generator,
    folder: str | os.PathLike[str],
    *,
    examined: Mapping[str, tuple[nn.Module, Tensor]] | None = None,
) -> Path:
    """Write a checkpoint. A new folder appears complete or not at all; in an existing one config.json comes last.

    Args:
        generator: what to save; its `card` and `config` must hold JSON values only.
        folder: is made if it does not exist. An older checkpoint in it is replaced, other files are left alone.
        examined: name -> model and input, what it was trained for: its spectra are checked besides the probe models'.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder holds files of these names that are no checkpoint's, the weights are not finite, or
            a matrix that the generator makes has a collapsed spectrum (`check_spectrum`).
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
    check_spectrum(generator, examined)
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
        install(stage, folder)
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


def install(stage: Path, folder: Path) -> None:
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
    from generators.published import locate

    folder = locate(where)
    description = verify(folder)
    kind = generator_class(description["kind"])
    with torch.random.fork_rng(devices=[]):  # constructors draw start values, which the weights below replace
        generator = kind(
            _as_config(kind.Config, description["config"]), name=description["name"], card=description["card"]
        )
    generator.digest = description["digest"]
    try:
        safetensors.torch.load_model(generator, folder / WEIGHTS, strict=True)
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder}: the weights do not fit a {kind.__name__} of this version: {error}") from error
    return generator.eval()
