"""Whole layers of a zoo as batches: what the filter VAE learns from, and how much slices of a filter have in common."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from generators.local.filter_vae import Patches
from generators.local.slice_model import Layer, SliceModel
from generators.seeds import stream
from train_generators.slice_source import Slices, TensorStack

PATCH = 16  # rows and columns of a patch at most
MOST = 1 << 20  # slices of layers that are taken whole, all together


def layer_of(stack: TensorStack) -> Layer:
    """The layer that a stack's tensors are, without what fills no slice."""
    layer = Layer.of(stack.key, stack.shape, stack.depth)
    return Layer(layer.rows, stack.count // layer.rows, layer.fan_in, layer.fan_out, layer.depth)


class LayerBatches:
    """Patches of the layers of some networks.

    Args:
        model: standardises the slices.
        slices: of the networks, not pruned.
    """

    def __init__(self, model: SliceModel, slices: Slices) -> None:
        self.model, self.slices = model, slices
        weights = np.array([min(stack.count, slices.per_tensor) * len(stack.rows) for stack in slices.stacks])
        self.ends = torch.from_numpy(np.cumsum(weights))

    def batches(self, size: int, *, seed: int, first: int = 0) -> Iterator[Patches]:
        """Batches of at least `size` slices for the steps from `first` on; each depends on seed and step only."""
        while True:
            yield self.some(size, stream(seed, "patches", str(self.slices.key), first))
            first += 1

    def some(self, count: int, generator: torch.Generator) -> Patches:
        """Patches of layers chosen at random, until there are `count` slices; wide layers are chosen more often."""
        patches: list[tuple[Tensor, Layer]] = []
        found = 0
        while found < count:
            place = torch.randint(int(self.ends[-1]), (), generator=generator)
            stack = self.slices.stacks[int(torch.searchsorted(self.ends, place, right=True))]
            layer, network = layer_of(stack), int(torch.randint(len(stack.rows), (), generator=generator))
            rows = torch.randperm(layer.rows, generator=generator)[:PATCH].tolist()
            columns = torch.randperm(layer.length, generator=generator)[:PATCH]
            values = np.stack([stack.stored(network, row * layer.length, (row + 1) * layer.length) for row in rows])
            chosen = torch.from_numpy(values.astype(np.float32))[:, columns] * stack.scales[network]
            patches.append((self.model.standardised(chosen.flatten(0, 1)).unflatten(0, chosen.shape[:2]), layer))
            found += chosen.shape[0] * chosen.shape[1]
        return Patches.of(patches)

    def layers(self, count: int) -> list[Layer]:
        """Layers as these, each as often as there are networks with it, over and over up to `count` slices.

        Of a large zoo some, chosen at random, that have so many: what is drawn for them is held in RAM.
        """
        kinds = [layer_of(stack) for stack in self.slices.stacks for _ in stack.rows]
        if sum(layer.count for layer in kinds) > max(count, MOST):
            order = torch.randperm(len(kinds), generator=stream(0, "layers", str(self.slices.key)))
            ends = np.cumsum([kinds[place].count for place in order.tolist()])
            return [kinds[place] for place in order[: int(np.searchsorted(ends, count)) + 1].tolist()]
        found: list[Layer] = []
        while sum(layer.count for layer in found) < count:
            found += kinds
        return found

    def tensors(self) -> Iterator[tuple[Tensor, Layer]]:
        """Standardised slices `[rows, length, d]` of every layer of every network, and the layer."""
        for stack in self.slices.stacks:
            layer = layer_of(stack)
            for network, scale in enumerate(stack.scales):
                slices = torch.from_numpy(stack.stored(network, 0, stack.count).astype(np.float32)) * scale
                yield self.model.standardised(slices).reshape(layer.rows, layer.length, -1), layer


def dependence(layers: list[Tensor]) -> dict[str, float]:
    """Intraclass correlations of slices: what two slices of one filter, or of one input channel, have in common.

    Args:
        layers: standardised slices `[rows, length, d]` of each layer.

    Returns:
        `filter_correlation`: the expected product of the same weight of two slices of a filter, over its mean square;
        `input_correlation`: the same of two slices of an input channel;
        `filter_energy_correlation`, `input_energy_correlation`: the same of the mean squares of two slices, less their
        mean. Independent slices have 0 everywhere.
    """

    def correlation(arrays: list[Tensor], axis: int) -> float:
        mean = torch.cat([array.flatten(0, 1) for array in arrays]).mean(0)
        shared = power = 0.0
        for array in arrays:
            count = array.shape[axis]
            if count > 1:
                centred = (array - mean).double()
                own = centred.square().sum().item()
                shared += (centred.sum(axis).square().sum().item() - own) / (count - 1)
                power += own
        return shared / power if power else 0.0

    energies = [layer.square().mean(2, keepdim=True) for layer in layers]
    return {
        "filter_correlation": correlation(layers, 1),
        "input_correlation": correlation(layers, 0),
        "filter_energy_correlation": correlation(energies, 1),
        "input_energy_correlation": correlation(energies, 0),
    }
