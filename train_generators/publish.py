"""Publish a checkpoint: a copy under its published name in `checkpoints/`, and its row in the index.

What is published is part of the wheel, so only small checkpoints belong here; large ones are uploaded, and their row
gets an `url` instead of a `path` (see `generators.published`).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from collect.durable import durable
from generators.checkpoint import load, save
from generators.errors import ConfigError
from generators.published import index_entry, index_path

log = logging.getLogger(__name__)


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
        ConfigError: the name would read as a chain or a path.
    """
    if not name or set("+/@: ") & set(name):
        raise ConfigError(f"a published name must not be empty or hold any of '+/@: ', got {name!r}")
    index = index_path() if into is None else into / "index.json"
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
