"""What holds a whole model in itself: `torch.compile`, `DataParallel`, `DistributedDataParallel`.

The weights that a seed names are those of the model inside, whose tensors the wrapper only calls otherwise.
"""

from __future__ import annotations

from torch import nn

_WRAPPERS = (("torch._dynamo", "_orig_mod"), ("torch.nn.parallel", "module"))  # where classes lie, what they hold


def wrapped_leaf(module: nn.Module) -> str:
    """The name under which `module` holds the model that it wraps, "" if it is no wrapper."""
    leaf = next((leaf for place, leaf in _WRAPPERS if type(module).__module__.startswith(place)), "")
    return leaf if leaf and leaf in module._modules else ""


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The model inside all wrappers, and what the names of its tensors begin with outside, such as "_orig_mod."."""
    prefix = ""
    while leaf := wrapped_leaf(model):
        model, prefix = model.get_submodule(leaf), f"{prefix}{leaf}."
    return model, prefix
