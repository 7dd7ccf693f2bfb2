"""What holds a model or a part of one in itself: `torch.compile`, (Distributed)`DataParallel`, activation checkpoints.

The weights that a seed names are those of the model without wrappers, whose tensors have other names with them.
"""

from __future__ import annotations

import itertools

from torch import nn

_WRAPPERS = (
    ("torch._dynamo", "_orig_mod"),
    ("torch.nn.parallel", "module"),
    ("torch.distributed.algorithms._checkpoint", "_checkpoint_wrapped_module"),
)  # where classes lie, what they hold
_UNSAID = "_checkpoint_wrapped_module."  # what state dicts leave out of a name


def wrapped_leaf(module: nn.Module) -> str:
    """The name under which `module` holds the model that it wraps, "" if it is no wrapper."""
    leaf = next((leaf for place, leaf in _WRAPPERS if type(module).__module__.startswith(place)), "")
    return leaf if leaf and leaf in module._modules else ""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers around it and around its parts; itself if there are none.

    Parameters and buffers are the same objects; of modules that have a wrapper in them there are shallow copies.
    """
    return _unwrapped(model, {})


def _unwrapped(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    while leaf := wrapped_leaf(module):
        module = module.get_submodule(leaf)
    if module not in done:
        parts = dict(module._modules)
        plain = {name: part if part is None else _unwrapped(part, done) for name, part in parts.items()}
        done[module] = module
        if any(plain[name] is not part for name, part in parts.items()):
            done[module] = object.__new__(type(module))
            tables = {"_parameters": dict(module._parameters), "_buffers": dict(module._buffers), "_modules": plain}
            done[module].__dict__.update(module.__dict__ | tables)
    return done[module]


def outside_names(model: nn.Module, *, in_state: bool = True) -> dict[str, str]:
    """Name of every parameter and buffer of `unwrapped(model)` -> its name in `model`.

    That is its name in the state dict or, without `in_state`, the way to it through the modules.
    """
    every = dict(model.named_modules(remove_duplicate=False))
    held = {f"{path}.{leaf}".lstrip(".") for path, module in every.items() if (leaf := wrapped_leaf(module))}
    names = {}
    for path, module in every.items():
        for leaf, value in (*module._parameters.items(), *module._buffers.items()):
            if value is None:
                continue
            name = f"{path}.{leaf}".lstrip(".")
            steps = itertools.accumulate(name.split("."), "{}.{}".format)
            plain = ".".join(step.rpartition(".")[2] for step in steps if step not in held)
            names[plain] = name.replace(_UNSAID, "") if in_state else name
    return names
