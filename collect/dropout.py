"""Dropout before the classifier (Srivastava et al., JMLR 2014) for members that are trained together.

The masks are buffers that are filled before every step, from a stream of each member's own. So all forms run the same
network, and a member's masks do not depend on the others in its stack.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from generators.errors import ConfigError
from generators.seeds import stream


class MaskedLinear(nn.Linear):
    """A linear layer that in training multiplies its inputs with the buffer `mask`, which broadcasts to their shape."""

    mask: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        weight = layer.weight
        super().__init__(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device=weight.device, dtype=weight.dtype
        )
        self.register_buffer("mask", torch.ones(1, layer.in_features, device=weight.device), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features * self.mask if self.training else features)


def mask_classifier(module: nn.Module) -> None:
    """Replace the last linear layer of `module` by a `MaskedLinear`; no name in the state dict changes.

    Raises:
        ConfigError: there is no linear layer.
    """
    layers = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    if not layers:
        raise ConfigError("dropout acts before the last linear layer, and this architecture has none; leave it out")
    name, layer = layers[-1]
    module.set_submodule(name, MaskedLinear(layer))


class Masks:
    """The masks of K members; none for a module without a `MaskedLinear`.

    Args:
        module: the template of the form.
        seeds: one per member.
        dropout: probability of a zero; what stays is scaled up, so that the mean stays.
        batch_size: images per member and step.
        device: where the masks go. The draws are made on the CPU, the same for every device.
    """

    def __init__(
        self, module: nn.Module, seeds: Sequence[int], *, dropout: float, batch_size: int, device: torch.device
    ) -> None:
        self._dropout, self._device = dropout, device
        self._shapes = {
            f"{name}.mask": (batch_size, part.in_features)
            for name, part in module.named_modules() if isinstance(part, MaskedLinear)
        }  # fmt: skip
        self._streams = [stream(seed, "dropout") for seed in seeds]
        self.neutral = {
            name: torch.ones(len(seeds), 1, features, device=device) for name, (_, features) in self._shapes.items()
        }

    def draw(self) -> dict[str, Tensor]:
        """For one step: name of the buffer -> `[K, batch_size, features]`."""
        return {
            name: (
                torch.stack([torch.rand(shape, generator=own) for own in self._streams]).to(self._device)
                >= self._dropout
            ) / (1 - self._dropout)
            for name, shape in self._shapes.items()
        }  # fmt: skip

    def state(self) -> Tensor:
        """The states of the streams, uint8 `[K, bytes]`."""
        return torch.stack([own.get_state() for own in self._streams])

    def load(self, state: Tensor) -> None:
        """Go on from a `state`."""
        for own, saved in zip(self._streams, state, strict=True):
            own.set_state(saved.clone())
