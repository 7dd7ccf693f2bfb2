"""Fitting the slice model of one weight group: its batches, its steps, and what it is worth."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from generators.errors import CollapseError
from generators.local.fidelity import match
from generators.local.groups import GroupKey
from generators.local.slice_model import Layer, SliceModel
from generators.seeds import stream
from train_generators.slices import GroupData
from train_generators.vae_config import VAEConfig

log = logging.getLogger(__name__)

JUDGED = 1 << 15  # slices drawn to judge and to calibrate a group
SETTLED = 8192  # training slices that decide the decoder variance
RATIO_BOUNDS = (0.5, 2.0)  # second moment of samples over the data's, before calibration; a fit outside has failed


class SliceBatches:
    """Standardised slices of one side of the split, `[N, d]`, as batches of single slices."""

    def __init__(self, model: SliceModel, slices: list[Tensor]) -> None:
        self.standardised = model.standardised(torch.cat(slices))

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        """A batch `[count, d]` for a step, drawn with replacement."""
        return self.standardised[torch.randint(len(self.standardised), (count,), generator=generator)]

    def some(self, count: int, generator: torch.Generator) -> Tensor:
        """At most `count` different slices."""
        return self.standardised[torch.randperm(len(self.standardised), generator=generator)[:count]]

    def layers(self) -> list[Layer]:
        """What to draw to compare with them: at least `JUDGED` slices."""
        return [Layer(JUDGED)]


def steps(
    key: GroupKey, model: SliceModel, data: SliceBatches, optimiser: torch.optim.Optimizer, config: VAEConfig, *,
    first: int,
) -> Iterator[tuple[int, dict[str, Tensor]]]:  # fmt: skip
    """Train one group from step `first` of `config.steps`; yields (steps done, parts of the loss)."""
    for step in range(first, config.steps):
        draws = stream(config.seed, "step", str(key), step)
        batch = data.batch(config.batch_size, draws)
        rate = config.lr * min(1.0, (step + 1) / 50) * (1.0 - step / config.steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        beta = min(1.0, (step + 1) / max(config.warm_up * config.steps, 1.0))
        loss, parts = model.loss(batch, draws, beta=beta)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        yield step + 1, {"loss": loss.detach(), **parts}


def drawn(model: SliceModel, layers: list[Layer], generator: torch.Generator) -> Tensor:
    """New slices `[N, h, w]` for all of `layers`."""
    return torch.cat([model.draw(layer, generator) for layer in layers])


@torch.no_grad()
def bounds(model: SliceModel, batch: Tensor, slices: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Bounds on -log p in nats per weight: of the model, before its calibration, and of white noise (He).

    Args:
        model: settled and calibrated or not.
        batch: standardised slices to take the bound over.
        slices: the slices `[N, h, w]` that they come from; white noise has their second moment.
        generator: of the posterior samples.
    """
    parts = model.loss(batch, generator, beta=1.0)[1]
    volume = torch.linalg.slogdet(model.whiten.double())[1].item()  # standardising changes the density
    power = slices.double().square().mean().item()
    return {
        "bound": (parts["misfit"] + parts["rate"]).item() / model.size - volume / model.size,
        "bound_white": 0.5 * (math.log(power) + 1.0),
    }


def judge(model: SliceModel, data: GroupData, *, seed: int, label: str) -> dict[str, Any]:
    """How samples of a group's model match slices of held-out networks (of the training ones if none is held out).

    Returns:
        The figures of `generators.local.fidelity.match`, of the same for the training slices as far as the data allow
        (`covariance_error_train`), the `bound` on -log p of a reference slice in nats per weight with that of white
        noise, `usage` of the latents, and counts. `held_out_runs` 0 says that the training slices were the measure.
    """
    train = torch.cat(data.train)
    reference = torch.cat(data.held_out) if data.held_out else train
    examples = SliceBatches(model, data.held_out or data.train)
    some = examples.some(SETTLED, stream(seed, "some", label))
    return {
        **match(drawn(model, examples.layers(), stream(seed, "judge", label)), reference),
        "covariance_error_train": match(train, reference)["covariance_error"],
        **bounds(model, some, reference, stream(seed, "bound", label)),
        **model.usage(some),
        "noise_share": model.noise.mean().item(),
        "zoo_gain": data.gain,
        "train_slices": len(train),
        "train_runs": len(data.train_runs),
        "held_out_slices": sum(map(len, data.held_out)),
        "held_out_runs": len(data.held_out_runs),
    }


def finish(key: GroupKey, model: SliceModel, data: GroupData, config: VAEConfig) -> dict[str, Any]:
    """Settle, check and calibrate a fitted group; its figures.

    Raises:
        CollapseError: the latents carry nothing, or the spread of samples is far from the data's.
    """
    model.eval()
    train = torch.cat(data.train)
    examples = SliceBatches(model, data.train)
    some = examples.some(SETTLED, stream(config.seed, "settle", str(key)))
    model.settle(some, stream(config.seed, "settle draws", str(key)))
    ratio = match(drawn(model, examples.layers(), stream(config.seed, "raw", str(key))), train)["second_moment_ratio"]
    used = model.usage(some)
    if used["active_units"] < model.least_active or not RATIO_BOUNDS[0] <= ratio <= RATIO_BOUNDS[1]:
        raise CollapseError(
            f"weight group {key} ({data.count} {key.slices}) has collapsed: {used['active_units']} of "
            f"{used['latent_units']} latent units are active, and the second moment of its samples is {ratio:.3g} of "
            "the data's; nothing was saved. Use more --steps or another --lr"
        )
    if not data.held_out:
        log.warning("weight group %s: no network is held out, so it is judged on those it was fitted on", key)
    model.calibrate(train, examples.layers(), stream(config.seed, "calibrate", str(key)))
    model.zoo_gain.fill_(data.gain)
    model.zoo_std.fill_(data.std)
    return {**judge(model, data, seed=config.seed, label=str(key)), "second_moment_ratio_raw": ratio}
