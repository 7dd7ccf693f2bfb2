"""Pictures of a local generator beside the trained networks of a zoo: kernels, spectra, and what its latents do.

Trained slices are those of networks that had no part in the fit (`collect.zoo.Zoo.split_of`), each tensor divided by
its root mean square; samples and He's white noise have unit spread as well. Every weight group has its own pictures.
"""

from __future__ import annotations

import logging
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from collect.durable import durable
from generators.checkpoint import load
from generators.errors import ConfigError
from generators.local.fidelity import covariance
from generators.local.generator import LocalGenerator
from generators.local.groups import GroupKey
from generators.local.slice_model import Layer, SliceModel
from generators.seeds import stream
from train_generators.compare.plots import COLOURS, KERNELS_SHOWN, NEUTRAL, STYLE, mosaic, png
from train_generators.slice_source import Slices, TensorSlices
from train_generators.vae_config import VAEConfig
from train_generators.vae_data import open_data
from train_generators.vae_group import drawn, examples

log = logging.getLogger(__name__)

LATENTS_SHOWN = 6
STEPS = torch.linspace(-3, 3, 9)  # standard deviations of a latent
LOOK = {"trained": (NEUTRAL, "-"), "sampled": (COLOURS[0], "-"), "He": (COLOURS[1], "--")}


# ---- what is shown


def sampled(model: SliceModel, trained: Slices, count: int, draws: torch.Generator) -> Tensor:
    """Slices `[count, *shape]` at unit spread; a model of whole layers draws them for layers as the trained ones."""
    found = drawn(model, examples(model, trained).layers(count), draws) / model.unit_std
    return found[torch.randperm(len(found), generator=draws)[:count]]


def traversal(model: SliceModel, latents: int = LATENTS_SHOWN) -> tuple[list[int], Tensor]:
    """The latents that change a slice most, and the slices on the way of each: `[n, steps, *shape]`, no noise added.

    All other latents are 0. The effect of a latent is the mean square change of the slice from one end to the other.
    """
    ends = torch.zeros(2 * model.normal, model.latent)
    places = torch.arange(model.normal)
    ends[2 * places, places], ends[2 * places + 1, places] = STEPS[0], STEPS[-1]
    decoded = model.decode(ends) @ model.colour.T
    effect = (decoded[1::2] - decoded[::2]).square().mean(1)
    chosen = effect.argsort(descending=True)[:latents].tolist()
    way = torch.zeros(len(chosen), len(STEPS), model.latent)
    for row, latent in enumerate(chosen):
        way[row, :, latent] = STEPS
    slices = model.shift + model.decode(way.flatten(0, 1)) @ model.colour.T
    return chosen, slices.unflatten(0, way.shape[:2]).unflatten(-1, model.shape)


def principal_variances(slices: Tensor, directions: Tensor) -> np.ndarray:
    """Variance of slices `[N, *shape]` along `directions` `[d, d]` (columns)."""
    return (directions * (covariance(slices).to(directions) @ directions)).sum(0).numpy()


def singular_values(matrix: Tensor) -> np.ndarray:
    """Of a matrix `[outputs, rest]` brought to unit spread, largest first."""
    matrix = matrix.double()
    return torch.linalg.svdvals(matrix / matrix.square().mean().sqrt()).numpy()


def largest_layer(slices: Slices) -> TensorSlices:
    """The tensor of the first network with the most slices."""
    return max(slices.of(slices.networks[:1]).tensors(), key=lambda tensor: len(tensor.slices))


# ---- pictures


def _grid(axes: Axes, slices: Tensor, title: str) -> None:
    flat = slices.reshape(len(slices), slices.shape[1] if slices.dim() > 2 else 1, -1)
    axes.set_axis_off()
    axes.imshow(mosaic(flat.numpy()), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=8)


def kernels(generator: LocalGenerator, trained: dict[GroupKey, Slices]) -> bytes:
    """Trained, sampled and He's slices side by side, each on its own scale."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.4 + 2.4 * len(trained)), layout=ConstrainedLayoutEngine(wspace=0.12))
        for line, (key, slices) in zip(figure.subplots(len(trained), 3, squeeze=False), trained.items(), strict=True):
            model, draws = generator.model(key), stream(0, "pictures", str(key))
            every = slices.in_ram()
            known = every[torch.randperm(len(every), generator=draws)[:KERNELS_SHOWN]]
            _grid(line[0], known, f"{key}\ntrained")
            _grid(line[1], sampled(model, slices, KERNELS_SHOWN, draws), "sampled")
            _grid(line[2], torch.randn(known.shape, generator=draws), "He")
        return png(figure)


def traversals(generator: LocalGenerator, trained: dict[GroupKey, Slices]) -> bytes:
    """Slices along the latents that change them most, from -3 to 3 standard deviations."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.0 + 3.2 * len(trained), 3.2), layout="constrained")
        for axes, key in zip(figure.subplots(1, len(trained), squeeze=False)[0], trained, strict=True):
            chosen, slices = traversal(generator.model(key))
            slices = slices.reshape(*slices.shape[:2], slices.shape[2] if slices.dim() > 3 else 1, -1)
            height, width = slices.shape[2:]
            canvas = torch.full((len(chosen) * (height + 1) - 1, len(STEPS) * (width + 1) - 1), torch.nan)
            for row, line in enumerate(slices / slices.abs().max()):
                for column, each in enumerate(line):
                    top, left = row * (height + 1), column * (width + 1)
                    canvas[top : top + height, left : left + width] = each
            axes.imshow(canvas.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
            axes.grid(visible=False)
            axes.set_xticks([(width - 1) / 2 + place * (width + 1) for place in (0, len(STEPS) // 2, len(STEPS) - 1)])
            axes.set_xticklabels([f"{STEPS[place]:.0f}" for place in (0, len(STEPS) // 2, len(STEPS) - 1)])
            axes.set_yticks([(height - 1) / 2 + place * (height + 1) for place in range(len(chosen))])
            axes.set_yticklabels([str(latent) for latent in chosen])
            axes.set_title(str(key), fontsize=8)
            axes.set_xlabel("latent, in standard deviations")
        return png(figure)


def spectra(generator: LocalGenerator, trained: dict[GroupKey, Slices]) -> bytes:
    """Variance of slices along the principal directions of the trained ones, and singular values of a whole layer."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.0 + 3.2 * len(trained), 5.4), layout="constrained")
        above, below = figure.subplots(2, len(trained), squeeze=False)
        for upper, lower, (key, slices) in zip(above, below, trained.items(), strict=True):
            model, draws = generator.model(key), stream(0, "spectra", str(key))
            every = slices.in_ram()
            directions = torch.linalg.eigh(covariance(every)).eigenvectors.flip(-1)
            whole = largest_layer(slices)
            layer = Layer.of(key, whole.shape, whole.depth)
            shown = {
                "trained": (every, whole.slices),
                "sampled": (sampled(model, slices, len(every), draws), model.draw(layer, draws)),
                "He": (torch.randn(every.shape, generator=draws), torch.randn(whole.slices.shape, generator=draws)),
            }
            for label, (all_of, of_layer) in shown.items():
                colour, dash = LOOK[label]
                look = dict(color=colour, linestyle=dash, marker=".", markersize=4, label=label)
                upper.plot(principal_variances(all_of, directions), **look)
                matrix = of_layer[: len(whole.slices)].reshape(layer.rows, -1)
                lower.plot(singular_values(matrix), **look)
            upper.set_title(str(key), fontsize=8)
            upper.set_xlabel("principal direction of the trained slices")
            lower.xaxis.set_major_locator(MaxNLocator(integer=True))
            lower.set_xlabel(f"{whole.name} {tuple(whole.shape)}: singular value")
        above[0].set_ylabel("variance")
        below[0].set_ylabel("size, at unit spread")
        above[0].legend()
        return png(figure)


PICTURES = {"kernels.png": kernels, "traversals.png": traversals, "spectra.png": spectra}


def main(*, checkpoint: str, zoo: Path, out: Path) -> None:
    """Draw kernels, latent traversals and spectra of a local generator beside the trained networks of a zoo.

    Args:
        checkpoint: Folder of a local generator, or its published name.
        zoo: Folder of the zoo that it was fitted on.
        out: Folder for the pictures.
    """
    generator = load(checkpoint)
    if not isinstance(generator, LocalGenerator):
        raise ConfigError(f"{checkpoint} is a {generator.kind_name}, which has no kernels of its own to draw")
    config = generator.config
    fitted = {name: generator.card.get("training", {}).get(name) for name in ("init", "prune")}
    cut = {"patch": config.patch, "depth_buckets": config.depth_buckets, **{k: v for k, v in fitted.items() if v}}
    material = open_data(zoo, VAEConfig(**cut, least_slices=1, slices_per_tensor=2**31))
    trained = {
        key: (group.held_out if len(group.held_out) else group.train)
        for key, group in material.groups.items()
        if key in generator.keys
    }
    if not trained:
        raise ConfigError(f"{zoo} has no networks with the weight groups of {checkpoint}: {', '.join(config.groups)}")
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        with torch.no_grad(), durable(out / name) as temporary:
            temporary.write_bytes(draw(generator, trained))
        log.info("wrote %s", out / name)
