"""Publish a checkpoint: a copy under its published name in `checkpoints/`, and its row in the index.

What is published is part of the wheel, so only small checkpoints belong here; large ones are uploaded, and their row
gets an `url` instead of a `path` (see `generators.published`).
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from collect.durable import durable
from generators.checkpoint import load, save
from generators.errors import ConfigError
from generators.initialiser import list_initialisers
from generators.published import index_entry, index_path

log = logging.getLogger(__name__)

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


def publish(checkpoint: str | Path, name: str, *, into: Path | None = None) -> Path:
    """Copy `checkpoint` to `into/NAME` and write its row of `into/index.json`; an older one of that name is replaced.

    Args:
        checkpoint: folder of a generator.
        name: what users call it, such as "noise-ghn-digits".
        into: folder of the index, by default the one that this installation reads.

    Returns:
        The folder of the published checkpoint.

    Raises:
        CheckpointError: `checkpoint` is none, or is damaged.
        ConfigError: the name would read as a chain, a path or a flag, or is that of another initialiser.
    """
    index = index_path() if into is None else into / "index.json"
    if not _NAME.fullmatch(name) or name == index.name:
        raise ConfigError(
            "a published name has lower-case letters, digits and ._- after a first letter or digit, such as "
            f"noise-ghn-digits, got {name!r}"
        )
    if name in {info.name for info in list_initialisers() if "checkpoint" not in info.needs}:
        raise ConfigError(f"{name!r} is a registered initialiser, which that name would still mean; choose another")
    generator = load(checkpoint)
    generator.name = name
    folder = save(generator, index.parent / name)
    rows = json.loads(index.read_text())["generators"] if index.exists() else {}
    rows[name] = index_entry(folder) | {"path": name}
    with durable(index) as temporary:
        temporary.write_text(json.dumps({"format": 1, "generators": rows}, indent=1, sort_keys=True) + "\n")
    return folder


def main(checkpoint: Path, name: str) -> None:
    """Publish a generator: copy its checkpoint into checkpoints/ and list it in the index.

    Example: python -m train_generators publish --checkpoint runs/demo/checkpoints/ghn --name ghn-digits

    Args:
        checkpoint: Folder of the checkpoint.
        name: What users call it.
    """
    log.info("published as %s", publish(checkpoint, name))
