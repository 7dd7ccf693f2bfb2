"""Layer fusion: a shallower network starts from neighbouring layers of a deeper trained one, fused.

Ghods, Lan, Goldstein and Studer, "MSE-Optimal Neural Network Initialization via Layer Fusion" (FuseInit), CISS 2020,
arXiv 2001.10509; `generators.inherited.closed_form` has the formulas. The layers of the relative are cut into groups,
one per layer of the model (`generators.inherited.sequential` says how), and each group becomes one layer. Of all ways
to cut, the most even one is taken, and of equals the one that fuses the earliest layers; one layer alone is copied.

What the formulas need of the hidden layers, a mean and a standard deviation per unit or channel, is measured on the
first batch if data are given; else it follows from inputs of mean 0 and variance 1, layer by layer as if units were
uncorrelated and pooling did nothing.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from generators.batches import call, first_batch, inputs_of
from generators.checking import check_model
from generators.errors import ModelError
from generators.inherited.closed_form import (
    Affine,
    Moments,
    fuse_conv_conv,
    fuse_conv_dense,
    fuse_dense_dense,
    response,
)
from generators.inherited.sequential import Unit, grid_of, groups_of, product_of, units_of
from generators.initialiser import Kind, Proposal, Request, register
from generators.seeds import isolated

# ---- moments of the hidden layers --------------------------------------------------------------------------------


def assumed_moments(units: list[Unit]) -> dict[str, tuple[Tensor, Moments]]:
    """Per layer the mean of its inputs and the moments of its outputs, per channel; see the top of this file."""
    found = {}
    mean = torch.zeros(units[0].sizes[0], dtype=torch.float64)
    variance = torch.ones_like(mean)
    for unit in units:
        weight, bias = unit.affine.weight, unit.affine.offset
        times = unit.sizes[0] // len(mean)  # positions per channel behind a Flatten
        mean, variance = mean.repeat_interleave(times), variance.repeat_interleave(times)
        taps = weight.reshape(*weight.shape[:2], -1)
        hidden = Moments(taps.sum(2) @ mean + bias, (taps.square().sum(2) @ variance).sqrt())
        found[unit.path] = (mean, hidden)
        out = response(unit.activation, hidden)
        mean, variance = out.mean, out.variance
    return found


def measured_moments(relative: nn.Module, units: list[Unit], inputs: Any) -> dict[str, tuple[Tensor, Moments]]:
    """The same, from the relative's answer to one batch."""
    work, found = copy.deepcopy(relative).eval(), {}

    def channels(value: Tensor) -> Tensor:
        return value.detach().double().movedim(1, 0).flatten(1).cpu()

    def hook(path: str) -> Any:
        def keep(module: nn.Module, arguments: tuple, output: Tensor) -> None:
            rows = channels(output)
            found[path] = (channels(arguments[0]).mean(1), Moments(rows.mean(1), rows.std(1, correction=0)))

        return keep

    for unit in units:
        work.get_submodule(unit.path).register_forward_hook(hook(unit.path))
    with torch.no_grad():
        call(work, inputs)
    return found


# ---- one group, one layer ----------------------------------------------------------------------------------------


def fused(group: list[Unit], target: Unit, moments: dict[str, tuple[Tensor, Moments]]) -> Affine:
    """The layers of `group` as one with the shape of `target`."""
    made, stride, padding = group[0].affine, *_places(group[0])
    grid = grid_of(group, target) if target.dense and not group[0].dense else ()
    for before, unit in itertools.pairwise(group):
        options: dict[str, Any] = dict(activation=before.activation, hidden=moments[before.path][1])
        if made.weight.ndim == 2:
            made = fuse_dense_dense(made, unit.affine, **options)
        elif unit.dense:
            made = fuse_conv_dense(made, unit.affine, grid=grid, stride=stride, padding=padding, **options)
        else:
            made = fuse_conv_conv(made, unit.affine, stride=stride, **options)
            steps, more = _places(unit)
            padding = tuple(p + s * q for p, s, q in zip(padding, stride, more, strict=True))
            stride = product_of([stride, steps])
    return made if target.dense else _fitted(made, padding, target.module, moments[group[0].path][0])


def _places(unit: Unit) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Stride and padding, () for a linear layer."""
    return ((), ()) if unit.dense else (unit.module.stride, unit.module.padding)


def _fitted(layer: Affine, padding: tuple[int, ...], target: Any, mean: Tensor) -> Affine:
    """A convolution in another kernel: entries for the same places of the input, the mean of those that are cut off.

    With uncorrelated inputs the best smaller kernel is the larger one, cut.
    """
    weight, out = layer.weight, layer.weight.new_zeros(*layer.weight.shape[:2], *target.kernel_size)
    ours, theirs = [slice(None)] * 2, [slice(None)] * 2
    for size, wanted, before, after in zip(weight.shape[2:], target.kernel_size, padding, target.padding, strict=True):
        shift = before - after
        start, end = max(shift, 0), min(size, shift + wanted)
        theirs.append(slice(start, max(end, start)))
        ours.append(slice(start - shift, max(end, start) - shift))
    out[tuple(ours)] = weight[tuple(theirs)]
    lost = (weight.flatten(2).sum(2) - out.flatten(2).sum(2)) @ mean
    return Affine(out, layer.offset + lost)


@dataclass(frozen=True)
class LayerFusion:
    """Makes each layer of a sequential model of neighbouring layers of a deeper sequential relative.

    Both are nested `nn.Sequential` of convolutions (one group, no dilation, zero padding), linear layers, elementwise
    activations, pooling, `Flatten` and dropout. Layers are not fused across pooling. A model's layer without a bias
    loses that of the fused one, which a note tells.
    """

    name: str = "layer-fusion"
    kind: Kind = Kind.INHERITED
    needs: tuple[str, ...] = ("relative",)

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """A weight and bias for every layer.

        Raises:
            ConfigError: the model or the relative is not of the form above, or there is no way to fuse.
            ModelError: the relative is no module, has no values, or cannot be run on the data.
            DataError: data are given, but empty.
        """
        try:
            check_model(request.relative)  # type: ignore[arg-type]
        except ModelError as error:
            raise ModelError(f"the relative cannot be inherited from: {error}") from error
        relative: nn.Module = request.relative  # type: ignore[assignment]
        ours, theirs = units_of(model, "the model"), units_of(relative, "the relative")
        groups = groups_of(theirs, ours)
        proposal = Proposal()
        if request.data is None:
            moments = assumed_moments(theirs)
            proposal.notes.append(f"{self.name}: without data, inputs of mean 0 and variance 1 are assumed")
        else:
            with isolated(request.seed, self.name):
                inputs = inputs_of(first_batch(request.data, self.name))
            moments = measured_moments(relative, theirs, inputs)
        for unit, group in zip(ours, groups, strict=True):
            made = fused(group, unit, moments)
            paths = ", ".join(part.path or "the relative" for part in group)
            for leaf, value in (("weight", made.weight), ("bias", made.offset)):
                full = f"{unit.path}.{leaf}" if unit.path else leaf
                if full in request.inventory:
                    proposal.values[full] = value.clone()
                    proposal.sources[full] = f"{self.name}: {'fused' if len(group) > 1 else 'copied'} from {paths}"
                elif leaf == "bias" and value.any():
                    proposal.notes.append(f"{self.name}: {unit.path} has no bias for the one that {paths} would give")
        return proposal


register(
    "layer-fusion", kind=Kind.INHERITED, needs=("relative",), paper="Ghods et al., CISS 2020, arXiv 2001.10509",
    summary="layers of a deeper sequential relative, fused with the least mean square error",
)(LayerFusion)  # fmt: skip
