"""Trainings that were put down half-way: `<zoo>/unfinished/<population id>.safetensors`.

A state is written by the rename protocol of `collect.durable`, so a kill at any moment leaves the former one or the new
one. It is worth the time that it saves and no more: one that is damaged, or that another version made, is passed over
with a warning and the training starts again; one that cannot be written costs a warning too. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor

from collect import durable
from collect.provenance import provenance
from collect.recipe import ENGINE_VERSION
from generators.errors import ZooError

log = logging.getLogger(__name__)

FORMAT = "powerhouse-unfinished-1"  # raised when the engine's state gets other parts
FOLDER, SUFFIX = "unfinished", ".safetensors"
EVERY = 600.0  # seconds between two saves

State = dict[str, Any]  # a nest of dicts with tensors; empty dicts are lost


def path_of(folder: str | Path, population: str) -> Path:
    """Where the state of the population with this id lies in the zoo `folder`."""
    return Path(folder) / FOLDER / f"{population}{SUFFIX}"


def begun(folder: str | Path) -> set[str]:
    """The ids of the populations that have a state in the zoo `folder`."""
    return {path.stem for path in (Path(folder) / FOLDER).glob(f"[!.]*{SUFFIX}")}


def _flat(state: State, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a nest by their path in it, such as `"running/optimiser/velocity"`."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            tensors |= _flat(value, f"{prefix}{name}/")
        else:
            tensors[f"{prefix}{name}"] = value.detach().cpu().contiguous()
    return tensors


def _nest(tensors: dict[str, Tensor]) -> State:
    """The inverse of `_flat`."""
    state: State = {}
    for path, value in tensors.items():
        *outer, name = path.split("/")
        place = state
        for part in outer:
            place = place.setdefault(part, {})
        place[name] = value
    return state


def _digest(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    """Of the header and of name, type, shape and bytes of every tensor."""
    digest = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name}|{tensors[name].dtype}|{tuple(tensors[name].shape)}|".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


class Keeper:
    """Keeps the state of one training.

    Args:
        path: the file, None to keep nothing.
        belongs_to: text values that a state must share with this training to be its own: population, stack, form, ...
        every: seconds between two saves.
    """

    def __init__(self, path: Path | None, belongs_to: dict[str, str], *, every: float = EVERY) -> None:
        versions = {name: str(provenance()[name]) for name in ("package_version", "torch_version")}
        self._header = {"format": FORMAT, "engine": str(ENGINE_VERSION), **versions, **belongs_to}
        self._path, self._every = path, every
        self._due = time.monotonic() + every

    def load(self) -> State:
        """The state that was saved last, bit for bit, on the CPU; empty if there is none or it cannot be used."""
        if self._path is None or not self._path.exists():
            return {}
        try:
            with safe_open(self._path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            return self._passed_over(f"it is damaged or no training state ({error})")
        digest = header.pop("digest", None)
        for name, own in self._header.items():
            if header.get(name) != own:
                return self._passed_over(f"its {name} is {header.get(name)!r} and not {own!r}")
        if digest != _digest(tensors, header):
            return self._passed_over("it does not match its digest")
        log.info("going on from the training state in %s", self._path)
        return _nest(tensors)

    def _passed_over(self, reason: str) -> State:
        log.warning("%s is not used: %s; the training starts again from its beginning", self._path, reason)
        return {}

    def save(self, state: State) -> None:
        """Replace what was saved before; where that fails, only a warning tells."""
        if self._path is None:
            return
        tensors = _flat(state)
        header = self._header | {"digest": _digest(tensors, self._header)}
        try:
            with durable.durable(self._path) as temporary:
                temporary.write_bytes(safetensors.save(tensors, metadata=header))
        except ZooError as error:
            log.warning("the training state is not saved, the training goes on: %s", error)
        self._due = time.monotonic() + self._every

    def save_if_due(self, state: Callable[[], State]) -> None:
        """Save if the time for it has come."""
        if self._path is not None and time.monotonic() >= self._due:
            self.save(state())
