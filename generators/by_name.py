"""Models and other objects that a command line names: torchvision:NAME, timm:NAME, module.path:name."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from generators.errors import CheckpointError, ConfigError, DataError, ModelError, PowerhouseError, unknown_name
from generators.seeds import isolated


def named(text: str, what: str) -> Any:
    """The object that `module.path:name` names.

    Raises:
        ConfigError: the text has another form, or there is no such module or name in it.
    """
    path, _, name = text.partition(":")
    if not path or not name:
        raise ConfigError(f"{what} {text!r}: write it as module.path:callable")
    try:
        found = importlib.import_module(path)
    except ImportError as error:
        raise ConfigError(f"{what} {text!r}: {error}; is it installed, or in the current folder?") from error
    if not hasattr(found, name):
        raise unknown_name(f"name in {path}", name, [known for known in vars(found) if not known.startswith("_")])
    return getattr(found, name)


def _torchvision(name: str, arguments: dict[str, Any]) -> nn.Module:
    models = named("torchvision:models", "model")
    if name not in models.list_models():
        raise unknown_name("torchvision model", name, models.list_models())
    return models.get_model(name, weights=None, **arguments)


def _timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    create, known = named("timm:create_model", "model"), named("timm:list_models", "model")()
    if name not in known:
        raise unknown_name("timm model", name, known)
    return create(name, pretrained=False, **arguments)


MODEL_SOURCES: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {"torchvision": _torchvision, "timm": _timm}


def build_model(text: str, arguments: dict[str, Any], *, seed: int) -> nn.Module:
    """The model that `text` names; whatever its constructor draws comes from `seed`.

    Args:
        text: `torchvision:NAME`, `timm:NAME` or `module.path:callable`.
        arguments: keyword arguments of its constructor.
        seed: root seed.

    Raises:
        UnknownNameError: no such model.
        ConfigError: the text has another form or names nothing.
        ModelError: the constructor fails, with its own exception as the cause, or does not give a module.
    """
    source, _, name = text.partition(":")
    with isolated(seed, "model"):
        if source not in MODEL_SOURCES:
            build = named(text, "model")
        try:
            model = MODEL_SOURCES[source](name, arguments) if source in MODEL_SOURCES else build(**arguments)
        except PowerhouseError:
            raise
        except Exception as error:  # whatever a foreign constructor raises; it is chained, not swallowed
            raise ModelError(f"model {text!r} cannot be built with {arguments}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model {text!r} gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def keyword_arguments(text: str, option: str) -> dict[str, Any]:
    """The keyword arguments of a constructor that an option holds as JSON.

    Raises:
        ConfigError: it is no JSON, or no object.
    """
    try:
        arguments = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{option} {text!r} is not JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise ConfigError(f"{option} {text!r} must be a JSON object")
    return arguments


def load_weights(model: nn.Module, file: Path) -> None:
    """Read the state dict of `model` from a safetensors file.

    Raises:
        CheckpointError: the file is missing, of another format, or for another model.
    """
    try:
        safetensors.torch.load_model(model, file)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}; write it with save_model") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file} does not fit the model: {reason}; pass its own model and arguments") from error


def batches_of(text: str) -> Any:
    """The data that `module.path:name` names: an iterable, or what a callable gives.

    Raises:
        ConfigError: there is no such module or name in it, or the text has another form.
        DataError: the callable fails, with its own exception as the cause.
    """
    found = named(text, "data")
    if not callable(found):
        return found
    try:
        return found()
    except Exception as error:  # whatever a foreign function raises; it is chained, not swallowed
        raise DataError(f"data {text!r} cannot be made: {error!r}; it is called without arguments") from error
