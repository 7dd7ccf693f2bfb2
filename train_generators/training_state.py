"""Where a training stands, in one file that is either whole or not there.

The file is a safetensors file whose header carries the rest as JSON: `meta` (step, metrics, ...), `structure` (the nest
of dicts and lists that the tensors came from, such as an optimiser's state dict) and `digest`, the sha256 of all of it.
It is written by the rename protocol, so that a kill at any moment leaves the former state or the new one. Nothing is
pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from collect.durable import durable
from generators.errors import CheckpointError

FORMAT = "1"
_TENSOR, _ITEMS, _TUPLE = "__tensor__", "__items__", "__tuple__"


def _flatten(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """JSON for `value` with each tensor put into `tensors` and a reference to it in its place."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, dict):  # as pairs, because JSON has no keys but strings and an optimiser's state has integers
        return {_ITEMS: [[key, _flatten(entry, tensors, f"{name}/{key}")] for key, entry in value.items()]}
    if isinstance(value, list | tuple):
        entries = [_flatten(entry, tensors, f"{name}/{index}") for index, entry in enumerate(value)]
        return {_TUPLE: entries} if isinstance(value, tuple) else entries
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: a training state holds tensors and JSON values, not {type(value).__name__}")


def _restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `_flatten`."""
    if isinstance(value, list):
        return [_restore(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_restore(entry, tensors) for entry in value[_TUPLE])
    return {key: _restore(entry, tensors) for key, entry in value[_ITEMS]}


def _digest(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    """sha256 over the header without its digest and over name, type, shape and bytes of every tensor."""
    digest = hashlib.sha256(json.dumps({key: header[key] for key in sorted(header) if key != "digest"}).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_state(path: str | os.PathLike, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
    """Write a training state; the former one at `path` is replaced in one step.

    Args:
        path: the file, by habit `state.safetensors`.
        tensors: tensors by name, or nests of them as `state_dict()` returns: `{"model": model.state_dict(),
            "optimiser": optimiser.state_dict(), "order": generator.get_state()}`.
        meta: JSON values: step, metrics, the configuration that the state belongs to.
    """
    flat: dict[str, Tensor] = {}
    structure = _flatten(tensors, flat, "")
    header = {"format": FORMAT, "meta": json.dumps(meta), "structure": json.dumps(structure)}
    header["digest"] = _digest(flat, header)
    with durable(Path(path)) as temporary:
        temporary.write_bytes(save(flat, metadata=header))


def load_state(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `(tensors, meta)` that `save_state` was given, bit for bit, on the CPU.

    Raises:
        CheckpointError: there is no such file, it is not a training state, or its sha256 does not match.
    """
    path = Path(path)
    way_out = "delete it to start the training again"
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no training state there to resume from") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable training state ({error}); {way_out}") from error
    if header.get("format") != FORMAT or "digest" not in header:
        raise CheckpointError(f"{path}: not a training state of format {FORMAT}; {way_out}")
    if _digest(flat, header) != header["digest"]:
        raise CheckpointError(f"{path}: the sha256 does not match, the file has been damaged; {way_out}")
    return _restore(json.loads(header["structure"]), flat), json.loads(header["meta"])
