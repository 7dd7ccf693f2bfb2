"""K members of one architecture: their weights as one flat tensor, their buffers, and which of them still train."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from collect.grouped import Tensors
from generators.inventory import inventory

log = logging.getLogger(__name__)

BUFFER_ROLES = {"running_mean": "running_mean", "running_var": "running_var", "num_batches_tracked": "counter"}


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor lies in a row of weights or buffers.

    Attributes:
        name: in the state dict.
        role: of `generators.inventory.Role` for parameters; running_mean, running_var or counter for buffers.
        shape: as torch stores it.
        offset, length: in numbers, from the start of the row.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    offset: int
    length: int


Layout = tuple[TensorSpec, ...]


def _layout(named: Sequence[tuple[str, str, tuple[int, ...]]]) -> Layout:
    """Specs for (name, role, shape), one after the other."""
    specs, offset = [], 0
    for name, role, shape in named:
        length = int(np.prod(shape, dtype=np.int64))
        specs.append(TensorSpec(name, role, shape, offset, length))
        offset += length
    return tuple(specs)


def layouts(module: nn.Module) -> tuple[Layout, Layout]:
    """The layout of a module's weights and of its persistent buffers, in the order of registration."""
    weights = [(info.name, info.role.value, info.shape) for info in inventory(module)]
    parameters = {name for name, _, _ in weights}
    buffers = [
        (name, BUFFER_ROLES.get(name.rpartition(".")[2], "buffer"), tuple(value.shape))
        for name, value in module.state_dict().items()
        if name not in parameters
    ]
    return _layout(weights), _layout(buffers)


class Members:
    """The state of K members: flat weights with a view per parameter, buffers, and which members still train.

    A member whose loss stops being finite is frozen: a copy of its row is set aside. In the stack it computes on, which
    costs nothing extra and reaches no other member.

    Args:
        tensors: every tensor of the state dict, name -> `[K, ...]`; copied.
        layout, buffer_layout: of a row, from `layouts`.
        device: where to train.
    """

    def __init__(self, tensors: Tensors, layout: Layout, buffer_layout: Layout, *, device: torch.device) -> None:
        count = len(tensors[layout[0].name])
        self.flat = torch.cat([tensors[spec.name].flatten() for spec in layout]).to(device)
        segments = self.flat.split([count * spec.length for spec in layout])
        self.parameters: Tensors = {
            spec.name: segment.view(count, *spec.shape).detach().requires_grad_()
            for spec, segment in zip(layout, segments, strict=True)
        }
        self.buffers: Tensors = {spec.name: tensors[spec.name].to(device, copy=True) for spec in buffer_layout}
        self.training = np.ones(count, dtype=bool)
        self._finite = torch.ones(count, dtype=torch.bool, device=device)
        self._frozen: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights `[K, P]` and buffers `[K, B]` as they are now, or were when a member was frozen."""
        found = []
        for tensors in (self.parameters, self.buffers):
            flat = [value.detach().reshape(len(value), -1).float() for value in tensors.values()]
            found.append(
                torch.cat(flat, dim=1).cpu().numpy() if flat else np.zeros((len(self.training), 0), np.float32)
            )
        weights, buffers = found
        for member, row in self._frozen.items():
            weights[member], buffers[member] = row
        return weights, buffers

    def freeze_unless(self, finite: Tensor, *, step: int, at_once: bool = True) -> None:
        """Set members aside that trained until now and for which `finite` `[K]` was False, now or before.

        Args:
            finite: on the device.
            step: for the log.
            at_once: False only takes note, for a later call: looking at what a GPU has found makes it wait.
        """
        self._finite &= finite
        if not at_once:
            return
        lost = np.flatnonzero(self.training & ~self._finite.cpu().numpy())
        if len(lost):
            weights, buffers = self.rows()
            for member in lost.tolist():
                self._frozen[member] = (weights[member].copy(), buffers[member].copy())
                self.training[member] = False
                log.info("member %d diverged at step %d", member, step)

    def state(self) -> dict[str, Any]:
        """Everything, as a nest of tensors that the next steps do not change once it is written."""
        return {
            "tensors": {name: value.detach() for name, value in (self.parameters | self.buffers).items()},
            "finite": self._finite,
            "frozen": {
                str(member): {"weights": torch.from_numpy(weights), "buffers": torch.from_numpy(buffers)}
                for member, (weights, buffers) in self._frozen.items()
            },
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, whose `tensors` this was made with."""
        self._finite.copy_(state["finite"])
        for member, row in state.get("frozen", {}).items():
            self._frozen[int(member)] = (row["weights"].numpy(), row["buffers"].numpy())
            self.training[int(member)] = False
