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
from generators.local.two_sample import told_apart
from generators.seeds import stream
from train_generators.layers import MOST, LayerBatches, dependence
from train_generators.slice_source import Slices
from train_generators.slices import SliceGroup
from train_generators.vae_config import VAEConfig

log = logging.getLogger(__name__)

JUDGED = 1 << 15  # slices drawn to judge and to calibrate a group
SETTLED = 8192  # training slices that decide the decoder variance
COMPARED = 16  # networks whose layers are compared with drawn ones
RATIO_BOUNDS = (0.5, 2.0)  # second moment of samples over the data's, before calibration; a fit outside has failed


class SliceBatches:
    """Standardised slices `[N, d]` of some networks, each on its own; `LayerBatches` has the same methods."""

    def __init__(self, model: SliceModel, slices: Slices) -> None:
        self.model, self.slices = model, slices

    def batches(self, size: int, *, seed: int, first: int = 0) -> Iterator[Tensor]:
        """Batches `[size, d]` for the steps from `first` on; each depends on seed and step only."""
        return map(self.model.standardised, self.slices.batches(size, seed=seed, first=first))

    def some(self, count: int, generator: torch.Generator) -> Tensor:
        """At most `count` different slices."""
        slices = self.slices.in_ram()
        return self.model.standardised(slices[torch.randperm(len(slices), generator=generator)[:count]])

    def layers(self, count: int) -> list[Layer]:
        """What to draw to compare with them: one layer of `count` slices."""
        return [Layer(count)]


def examples(model: SliceModel, slices: Slices) -> SliceBatches | LayerBatches:
    """The slices as the model learns from them."""
    return LayerBatches(model, slices) if model.whole_layers else SliceBatches(model, slices)


def steps(
    model: SliceModel, data: SliceGroup, optimiser: torch.optim.Optimizer, config: VAEConfig, *, first: int
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Train one group from step `first` of `config.steps`; yields (steps done, parts of the loss)."""
    model.train()
    batches = examples(model, data.train).batches(config.batch_size, seed=config.seed, first=first)
    for step, batch in zip(range(first, config.steps), batches, strict=False):
        rate = config.lr * min(1.0, (step + 1) / 50) * (1.0 - step / config.steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        beta = min(1.0, (step + 1) / max(config.warm_up * config.steps, 1.0))
        loss, parts = model.loss(batch, stream(config.seed, "step", str(data.train.key), step), beta=beta)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        yield step + 1, {"loss": loss.detach(), **parts}


def drawn(model: SliceModel, layers: list[Layer], generator: torch.Generator) -> Tensor:
    """New slices `[N, *shape]` for all of `layers`."""
    return torch.cat([model.draw(layer, generator) for layer in layers])


@torch.no_grad()
def bounds(model: SliceModel, batch: Any, slices: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Bounds on -log p in nats per weight: of the model, before its calibration, and of white noise (He).

    Both variances, the decoder's and that of white noise, are those that suit the batch best.

    Args:
        model: settled.
        batch: what to take the bound over, as the model learns from it.
        slices: the slices `[N, *shape]` that it comes from; white noise has their second moment.
        generator: of the posterior samples.
    """
    parts = model.loss(batch, generator, beta=1.0)[1]
    volume = torch.linalg.slogdet(model.whiten.double())[1].item()  # standardising changes the density
    power = slices.double().square().mean().item()
    return {
        "bound": ((parts["misfit"] + parts["rate"]).item() - volume) / model.size,
        "bound_white": 0.5 * (math.log(power) + 1.0),
    }


def shared(model: SliceModel, data: LayerBatches, generator: torch.Generator) -> dict[str, float]:
    """`dependence` of slices of trained layers and, under the same names with `_drawn`, of layers drawn as these."""
    each = math.ceil(len(data.slices) / len(data.slices.networks))
    some = LayerBatches(model, data.slices.of(data.slices.networks[: min(COMPARED, max(1, MOST // each))]))
    trained, layers = zip(*some.tensors(), strict=True)
    ours = [model.standardised(model.draw(layer, generator)).reshape(layer.rows, layer.length, -1) for layer in layers]
    generated = {f"{name}_drawn": figure for name, figure in dependence(ours).items()}
    return {**dependence(list(trained)), **generated}


def judge(model: SliceModel, data: SliceGroup, *, seed: int) -> dict[str, Any]:
    """How samples of a group's model match slices of held-out networks (of the training ones if none is held out).

    Returns:
        The figures of `generators.local.fidelity.match`, of the same for the training slices as far as the data allow
        (`covariance_error_train`), of `generators.local.two_sample.told_apart`, the `bounds`, for models of whole
        layers the `dependence`, `usage` of the latents, and counts. `held_out_runs` 0 says that the training slices
        were the measure.
    """
    label = str(data.train.key)
    side = data.held_out if len(data.held_out) else data.train
    reference, source = side.in_ram(), examples(model, side)
    some = source.some(SETTLED, stream(seed, "some", label))
    generated = drawn(model, source.layers(JUDGED), stream(seed, "judge", label))
    first, second = (half.in_ram() for half in data.sides())
    return {
        **match(generated, reference),
        "covariance_error_train": match(data.train.in_ram(), reference)["covariance_error"],
        **(told_apart(generated, first, second, seed=seed) if len(first) and len(second) else {}),
        **bounds(model, some, reference, stream(seed, "bound", label)),
        **(shared(model, source, stream(seed, "shared", label)) if isinstance(source, LayerBatches) else {}),
        **model.usage(some),
        "noise_share": model.noise.mean().item(),
        "zoo_gain": None if math.isnan(data.gain) else data.gain,
        "train_slices": len(data.train),
        "train_runs": len(data.train.networks),
        "held_out_slices": len(data.held_out),
        "held_out_runs": len(data.held_out.networks),
    }


def finish(key: GroupKey, model: SliceModel, data: SliceGroup, config: VAEConfig) -> dict[str, Any]:
    """Settle, check and calibrate a fitted group; its figures.

    Raises:
        CollapseError: the latents carry nothing, or the spread of samples is far from the data's.
    """
    model.eval()
    train, source = data.train.in_ram(), examples(model, data.train)
    some = source.some(SETTLED, stream(config.seed, "settle", str(key)))
    model.settle(some, stream(config.seed, "settle draws", str(key)))
    raw = drawn(model, source.layers(SETTLED), stream(config.seed, "raw", str(key)))
    ratio = match(raw, train)["second_moment_ratio"]
    used = model.usage(some)
    if used["active_units"] < model.least_active or not RATIO_BOUNDS[0] <= ratio <= RATIO_BOUNDS[1]:
        raise CollapseError(
            f"weight group {key} ({len(data.train)} {key.slices}) has collapsed: {used['active_units']} of "
            f"{used['latent_units']} latent units are active, and the second moment of its samples is {ratio:.3g} of "
            "the data's; nothing was saved. Use more --steps or another --lr"
        )
    if not len(data.held_out):
        log.warning("weight group %s: no network is held out, so it is judged on those it was fitted on", key)
    model.calibrate(train, source.layers(JUDGED), stream(config.seed, "calibrate", str(key)))
    model.zoo_gain.fill_(1.0 if math.isnan(data.gain) else data.gain)
    model.zoo_std.fill_(data.std)
    figures = {**judge(model, data, seed=config.seed), "second_moment_ratio_raw": ratio}
    if figures["covariance_error"] > figures["covariance_error_white"]:
        log.warning(
            "weight group %s: samples are further from held-out networks (covariance error %.2f) than white noise "
            "is (%.2f); %d slices are too few, collect more networks",
            key, figures["covariance_error"], figures["covariance_error_white"], len(data.train),
        )  # fmt: skip
    return figures
