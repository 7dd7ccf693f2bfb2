"""How many networks to train together: measured, because it depends on the processor's caches and the architecture.

A few steps are timed at K members, then 2 K, 4 K and so on; the K with the least time per member wins. On a CPU that is
where the activations of all members just fit the cache, on a GPU where the device is full. The choice does not show in
the weights, see `unit`.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from collect.forms import Form, Loop
from collect.grouped import Tensors
from collect.metrics import losses
from collect.optimisation import OPTIMISERS
from collect.recipe import Recipe
from generators.seeds import stream

log = logging.getLogger(__name__)

LARGEST = 64  # members; on a CPU more have never been faster
ENOUGH = 8  # so many members train together without a calibration: it would take longer than it saves
STEPS = 3  # timed at every K, after one that is not
WORSE = 1.1  # the search ends at a K this much slower than the best: larger ones have fallen out of the cache
VECTOR = 32  # numbers that a kernel works on at a time: two of the longest vectors of today's processors
MEMORY = 2**30  # bytes of activations that one process on a CPU may hold


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        seconds: K -> seconds per member and step; CPU time on a CPU.
        member_bytes: what one member keeps for the backward pass.
    """

    seconds: dict[int, float]
    member_bytes: int

    @property
    def stack(self) -> int:
        """The K with the least time per member."""
        return min(self.seconds, key=lambda members: self.seconds[members])


class _Trial:
    """K members with random weights on random images, to be stepped."""

    def __init__(self, form: Form, recipe: Recipe, members: int, shape: tuple[int, int, int], device: torch.device):
        self.form, generator = form, stream(0, "calibration")
        named = dict(form.module.named_parameters())
        flat = torch.randn(members * sum(value.numel() for value in named.values()), generator=generator)
        self._optimiser = OPTIMISERS[recipe.optimiser](flat.mul_(0.05).to(device), recipe)
        segments = self._optimiser.weights.split([members * value.numel() for value in named.values()])
        self.parameters: Tensors = {
            name: segment.view(members, *value.shape).detach().requires_grad_()
            for (name, value), segment in zip(named.items(), segments, strict=True)
        }
        self.buffers: Tensors = {
            name: torch.ones(members, *value.shape, dtype=value.dtype, device=device)
            for name, value in form.module.named_buffers()
        }
        channels, height, width = shape
        images = torch.randn(recipe.batch_size, height, width, members, channels, generator=generator)
        self.images = images.to(device).permute(3, 0, 4, 1, 2)  # laid out as `collect.augmentation.Batches` does
        self.labels = torch.zeros(members, recipe.batch_size, dtype=torch.int64, device=device)

    def step(self) -> None:
        loss = losses(self.form(self.parameters, self.buffers, self.images, training=True), self.labels)
        gradients = torch.autograd.grad(loss.sum(), list(self.parameters.values()))
        self._optimiser.step(torch.cat([gradient.flatten() for gradient in gradients]), lr=1e-3)

    def kept_bytes(self) -> int:
        """What a forward pass keeps for the backward pass, weights included."""
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            outputs = self.form(self.parameters, self.buffers, self.images, training=True)
        del outputs
        return sum(kept.values())


def _seconds(trial: _Trial, device: torch.device) -> float:
    """For `STEPS` steps."""
    if device.type == "cpu":
        clock = time.process_time  # other processes on this core do not count
    else:
        clock = time.perf_counter

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    trial.step()
    start = now()
    for _ in range(STEPS):
        trial.step()
    return now() - start


def _memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else MEMORY


def calibrate(
    form: Form,
    recipe: Recipe,
    *,
    shape: tuple[int, int, int],
    most: int = LARGEST,
    device: str | torch.device = "cpu",
    memory: int | None = None,
) -> Calibration:
    """Time a few training steps at K = `unit` members, then at twice as many, and so on.

    Args:
        form: how members are run; of the loop, one member is timed, since more would not be faster.
        recipe: gives the batch size and the optimiser.
        shape: `(C, H, W)` of one image.
        most: largest K.
        device: where.
        memory: bytes that the activations of all members may take; None for half of what a GPU has free, `MEMORY` on a
            CPU. The smallest K is timed in any case.
    """
    device, loop = torch.device(device), isinstance(form, Loop)
    members = 1 if loop else unit(form.module)
    member_bytes = _Trial(form, recipe, members, shape, device).kept_bytes() // members
    room = (_memory(device) if memory is None else memory) // max(member_bytes, 1)
    seconds: dict[int, float] = {}
    while True:
        seconds[members] = _seconds(_Trial(form, recipe, members, shape, device), device) / STEPS / members
        enough = loop or seconds[members] > WORSE * min(seconds.values())
        members *= 2
        if enough or members > min(most, room):
            return Calibration(seconds, member_bytes)


@functools.lru_cache(maxsize=256)  # a sweep has many recipes with the same steps
def _once(form: Form, recipe: Recipe, shape: tuple[int, int, int], most: int, device: torch.device) -> Calibration:
    found = calibrate(form, recipe, shape=shape, most=most, device=device)
    each = ", ".join(f"{members}: {1e3 * seconds:.3g}" for members, seconds in found.seconds.items())
    log.info("%s: stacks of %d (milliseconds per member and step by stack: %s)", recipe.architecture, found.stack, each)
    return found


@dataclass(frozen=True)
class Cut:
    """How a population is cut into stacks.

    Attributes:
        sizes: members of each stack.
        seconds: what a calibration measured, see `Calibration`; empty if there was none.
    """

    sizes: tuple[int, ...]
    seconds: dict[int, float] = field(default_factory=dict)


def unit(module: nn.Module) -> int:
    """The fewest members of a network whose channels fill the processor's vectors in every convolution.

    Kernels treat channels that are left over differently, which shows in the last bits. In stacks of multiples of this
    number every member is rounded in the same way, whatever the multiple.
    """
    channels = [part.out_channels for part in module.modules() if isinstance(part, nn.Conv2d)]
    return max(2, VECTOR // math.gcd(VECTOR, *channels)) if channels else 2


def divide(members: int, stack: int, *, unit: int = 1) -> tuple[int, ...]:
    """`members` divided into stacks of `stack`; what is left over of whole units has a last stack of its own."""
    rest = members % unit
    count, last = divmod(members - rest, stack)
    return tuple(size for size in (*[stack] * count, last, rest) if size)


def cut(
    form: Form, recipe: Recipe, members: int, *, stack: int | None, shape: tuple[int, int, int], device: torch.device
) -> Cut:
    """The stacks for `members` members.

    Args:
        form: how members are run; a loop has no use for company, which would only take memory.
        recipe: gives the batch size and the optimiser.
        members: how many there are.
        stack: most of them in one stack; None or 0 for as many as a calibration finds fastest.
        shape: `(C, H, W)` of one image.
        device: where.
    """
    if isinstance(form, Loop):
        return Cut((1,) * members)
    if stack or members <= ENOUGH:
        return Cut(divide(members, stack or members))
    same_steps = Recipe(architecture=recipe.architecture, batch_size=recipe.batch_size, optimiser=recipe.optimiser)
    most = min(LARGEST, 2 ** (members.bit_length() - 1))
    found = _once(form, same_steps, shape, most, device)
    return Cut(divide(members, found.stack, unit=unit(form.module)), found.seconds)
