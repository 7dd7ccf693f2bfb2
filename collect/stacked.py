"""K networks of one architecture on the same images: statistics of batch norm, logits and predictions.

How they are run is `collect.forms`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from collect.architectures import Architecture
from collect.forms import Form, choose
from collect.grouped import EVALUATION_BATCH, Tensors
from generators.errors import ConfigError

CALIBRATION_IMAGES = 512  # training images on which batch-norm statistics are re-estimated for an evaluation


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
