"""K networks of one architecture, run as one.

Three forms of the same computation, from images `[K, N, C, H, W]` to logits `[K, N, classes]`:

- `Grouped` (`collect.grouped`): one network with K groups. Fastest for small networks on a CPU.
- `Vmap`: `torch.func.vmap` over `functional_call`, for modules that `Grouped` has no rule for.
- `Loop`: one member after the other, for networks that are large enough to keep a core busy on their own. Slow and
  obvious in single precision; the others are measured against it. It can also compile the network, and compute in
  bfloat16.

`choose` accepts a stacked form only if its outputs, gradients and running statistics agree with the loop.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm

from collect.architectures import Architecture, build
from collect.dropout import mask_classifier
from collect.grouped import EVALUATION_BATCH, Grouped, Tensors, UnsupportedError
from generators.errors import ConfigError
from generators.seeds import stream

log = logging.getLogger(__name__)

LARGEST_STACKED = 8192  # numbers in a feature map; measured on a CPU: above it two members gain nothing over one
CALIBRATION_IMAGES = 512  # training images on which batch-norm statistics are re-estimated for an evaluation


class Form(Protocol):
    """One way to run K members. `module` is the template; its own weights are never used."""

    name: str
    module: nn.Module

    def __init__(self, module: nn.Module) -> None: ...

    def __hash__(self) -> int: ...

    def __call__(self, parameters: Tensors, buffers: Tensors, images: Tensor, *, training: bool) -> Tensor:
        """Logits `[K, N, classes]` for images `[K, N, C, H, W]`.

        Args:
            parameters: name -> `[K, ...]`.
            buffers: name -> `[K, ...]`, contiguous; running statistics are updated in place when training.
            images: K members, N images each.
            training: batch norm uses the statistics of the batch.
        """


class Loop:
    """One member after the other, in channels-last order.

    Args:
        module: the template.
        precision: `"float32"`, or `"bfloat16"` for convolutions and matrix products under `torch.autocast`; weights,
            gradients and logits stay in float32.
        compiled: put training steps through `torch.compile`, once for all members; evaluations are not worth it. Where
            that fails, for want of a C++ compiler for example, a warning says so and the steps run as they are.
    """

    name = "loop"

    def __init__(self, module: nn.Module, *, precision: str = "float32", compiled: bool = False) -> None:
        self.module = module
        self.precision = precision
        self._compiled = torch.compile(self._one, dynamic=False) if compiled else None
        if compiled:
            self.name = "compiled"

    def _one(self, tensors: Tensors, images: Tensor) -> Tensor:
        """Logits of one member, of tensors `[1, ...]`."""
        return functional_call(self.module, {name: value[0] for name, value in tensors.items()}, (images,))

    def _run(self, tensors: Tensors, images: Tensor) -> Tensor:
        if self._compiled is not None and self.module.training and torch.is_grad_enabled():
            try:
                return self._compiled(tensors, images)
            except RuntimeError as error:  # what torch.compile raises; an error of the network itself comes again below
                log.warning("not compiled, which costs up to a third more time: %s", str(error).strip().split("\n")[0])
                self._compiled, self.name = None, "loop"
        return self._one(tensors, images)

    def __call__(self, parameters: Tensors, buffers: Tensors, images: Tensor, *, training: bool) -> Tensor:
        """See `Form`."""
        self.module.train(training)
        tensors = parameters | buffers
        members = [tensors]  # a compiled function warns about inputs that are views of parameters
        if len(images) > 1:
            rows = zip(*(value.split(1) for value in tensors.values()), strict=True)
            members = [dict(zip(tensors, row, strict=True)) for row in rows]
        low = self.precision == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=low, cache_enabled=False):
            logits = [
                self._run(member, own.contiguous(memory_format=torch.channels_last))
                for member, own in zip(members, images, strict=True)
            ]
        return torch.stack(logits).to(images.dtype)


class Vmap:
    """All members through `torch.func.vmap`."""

    name = "vmap"

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, parameters: Tensors, buffers: Tensors, images: Tensor, *, training: bool) -> Tensor:
        """See `Form`."""
        self.module.train(training)
        return vmap(lambda *state: functional_call(self.module, state[:2], state[2:]))(parameters, buffers, images)


# ---- choosing a form -------------------------------------------------------------------------------------------------

FORMS: tuple[type[Form], ...] = (Grouped, Vmap)


def template(
    architecture: Architecture | str, *, shape: tuple[int, int, int], classes: int, dropout: bool = False
) -> nn.Module:
    """The module that says what to compute, on the meta device: it has no weights of its own. See `collect.dropout`."""
    with torch.device("meta"):
        module = build(architecture, shape=shape, classes=classes)
    if dropout:
        mask_classifier(module)
    return module


def _probe(module: nn.Module, shape: tuple[int, int, int]) -> tuple[Tensors, Tensors, Tensor]:
    """Two members with random weights, and four images for each, in double precision."""
    generator = stream(0, "probe of the forms")
    parameters: Tensors = {}
    buffers: Tensors = {}
    for name, value in module.named_parameters():
        spread = 1 / math.sqrt(max(1, value.numel() // value.shape[0])) if value.dim() > 1 else 0.1
        drawn = spread * torch.randn(2, *value.shape, generator=generator, dtype=torch.float64)
        parameters[name] = drawn.add_(value.dim() == 1).requires_grad_()  # vectors near 1, matrices near 0
    for name, buffer in module.named_buffers():
        kept = torch.float64 if buffer.is_floating_point() else buffer.dtype
        buffers[name] = torch.ones(2, *buffer.shape, dtype=kept)
    return parameters, buffers, torch.randn(2, 4, *shape, generator=generator, dtype=torch.float64)


def agree(form: Form, reference: Form, shape: tuple[int, int, int], *, tolerance: float = 1e-8) -> bool:
    """Whether two forms of one module give the same networks: logits, gradients and running statistics, in double."""
    results = []
    for candidate in (form, reference):
        parameters, buffers, images = _probe(candidate.module, shape)
        trained = candidate(parameters, buffers, images, training=True)
        gradients = torch.autograd.grad(trained.square().sum(), list(parameters.values()))
        with torch.no_grad():
            evaluated = candidate(parameters, buffers, images, training=False)
        results.append([trained, evaluated, *gradients, *(value.double() for value in buffers.values())])
    return all(
        torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * max(1.0, float(theirs.detach().abs().max())))
        for ours, theirs in zip(*results, strict=True)
    )


def _largest_feature_map(module: nn.Module, shape: tuple[int, int, int]) -> int:
    """How many numbers the largest output of a convolution has, per image; 0 without convolutions."""
    sizes = [0]
    hooks = [
        part.register_forward_hook(lambda _, inputs, output: sizes.append(output[0].numel()))
        for part in module.modules()
        if isinstance(part, nn.Conv2d)
    ]
    module.eval()(torch.empty(1, *shape, device="meta"))
    for hook in hooks:
        hook.remove()
    return max(sizes)


@lru_cache(maxsize=256)
def choose(
    architecture: str,
    *,
    shape: tuple[int, int, int],
    classes: int,
    precision: str = "float32",
    compiled: bool = False,
    dropout: bool = False,
) -> Form:
    """The form for an architecture, the same in every process.

    It is the first of `FORMS` that can run the architecture and agrees with the loop; and the loop itself if a
    convolution makes more than `LARGEST_STACKED` numbers per image, which is 8 channels of 32x32 pixels, or if
    `precision` is not float32: small networks gain nothing from another.

    Args:
        architecture: its name.
        shape: `(C, H, W)` of one image.
        classes: number of logits.
        precision, compiled: of the loop.
        dropout: whether there are masks, see `collect.dropout`.
    """
    module = template(architecture, shape=shape, classes=classes, dropout=dropout)
    loop = Loop(module)
    stackable = precision == "float32" and _largest_feature_map(module, shape) <= LARGEST_STACKED
    for kind in FORMS if stackable else ():
        try:
            form = kind(module)
            if agree(form, loop, shape):
                return form
            log.warning("%s: the %s form differs from the loop and is not used", architecture, form.name)
        except (UnsupportedError, RuntimeError) as error:
            log.debug("%s: no %s form (%s)", architecture, kind.name, error)
    return Loop(module, precision=precision, compiled=compiled)


# ---- evaluation ------------------------------------------------------------------------------------------------------


@contextmanager
def _batch_statistics(module: nn.Module) -> Iterator[None]:
    """Make one training pass set the running statistics to those of its batch."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@torch.no_grad()
def calibrate(form: Form, parameters: Tensors, buffers: Tensors, images: Tensor) -> tuple[Tensors, Tensor]:
    """Running statistics of `images` `[N, C, H, W]`, the same images for all members.

    Returns:
        A copy of `buffers` with these statistics, and the logits `[K, N, classes]` of the pass that took them.
    """
    if not buffers:
        return buffers, logits(form, parameters, buffers, images)
    copies = {name: value.clone() for name, value in buffers.items()}
    with _batch_statistics(form.module):
        found = form(parameters, copies, _shared(images, parameters), training=True)
    return copies, found


def _shared(images: Tensor, parameters: Tensors) -> Tensor:
    """Images `[N, C, H, W]` for every member, without a copy."""
    return images.expand(len(next(iter(parameters.values()))), *images.shape)


@torch.no_grad()
def logits(
    form: Form, parameters: Tensors, buffers: Tensors, images: Tensor, *, batch: int = EVALUATION_BATCH
) -> Tensor:
    """Logits `[K, N, classes]` of all members on the same images `[N, C, H, W]`, `batch` at a time, evaluation mode."""
    parts = [form(parameters, buffers, _shared(part, parameters), training=False) for part in images.split(batch)]
    return torch.cat(parts, dim=1)


def predict(
    architecture: Architecture | str,
    states: Tensors,
    images: Tensor,
    *,
    shape: tuple[int, int, int],
    classes: int,
    calibration: Tensor | None,
    batch: int = EVALUATION_BATCH,
) -> Tensor:
    """Logits of K networks of one architecture on the same images.

    Args:
        architecture: or its name.
        states: every tensor of the state dict, stacked: name -> `[K, ...]`.
        images: float32 `[N, C, H, W]`, normalised as for training.
        shape: `(C, H, W)` the networks were built for.
        classes: number of logits.
        calibration: training images `[M, C, H, W]` on which batch-norm statistics are re-estimated (as
            `Recipe.statistics = "train"` does with the first `CALIBRATION_IMAGES`), or None for the running ones.
        batch: images at a time.

    Returns:
        float32 `[K, N, classes]`.

    Raises:
        ConfigError: `states` does not hold exactly the tensors of the architecture.
    """
    form = choose(str(architecture), shape=tuple(shape), classes=classes)
    wanted = dict(form.module.state_dict())
    if states.keys() != wanted.keys():
        lost, extra = sorted(wanted.keys() - states.keys()), sorted(states.keys() - wanted.keys())
        raise ConfigError(f"states are not those of {architecture}: missing {lost[:3]}, unknown {extra[:3]}")
    for name, value in states.items():
        if value.shape[1:] != wanted[name].shape:
            raise ConfigError(
                f"{name} has shape {tuple(value.shape)}, {architecture} needs [K, *{tuple(wanted[name].shape)}]"
            )
    stacked = {name: value.to(images.device, wanted[name].dtype).contiguous() for name, value in states.items()}
    trained = {name for name, _ in form.module.named_parameters()}
    parameters = {name: value for name, value in stacked.items() if name in trained}
    buffers = {name: value for name, value in stacked.items() if name not in trained}
    if calibration is not None:
        buffers, _ = calibrate(form, parameters, buffers, calibration)
    return logits(form, parameters, buffers, images, batch=batch)


def stack(states: Sequence[Tensors]) -> Tensors:
    """State dicts of K members as one: name -> `[K, ...]`."""
    return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
