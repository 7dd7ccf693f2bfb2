"""Local generators: one slice model per weight group, as an initialiser for any model.

After arXiv 2310.16695 (one model of 3x3 slices per layer of one ResNet-20), with what that leaves out: groups by slice
shape and depth instead of layer index, a learned decoder variance (`generators.local.slice_model`), the decoder's noise
in the samples, layers rescaled to a spread that fits their fan-in, and the same fallback for the same layers whatever
the kind.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from generators.generator import Generator
from generators.initialiser import Kind, Proposal, Request
from generators.inventory import ParameterInfo, Role
from generators.local.config import LocalConfig, LocalKind
from generators.local.filter_vae import FilterVAE
from generators.local.groups import GroupKey, explained, group_key, nearest
from generators.local.pixelcnn import PixelCNNVAE
from generators.local.resize import resized
from generators.local.slice_model import Layer, SliceModel
from generators.local.topographic import TopographicVAE
from generators.local.vae import ConvVAE, LinearVAE
from generators.local.vector_quantised import VectorQuantisedVAE
from generators.pointwise import HE
from generators.refining.stored import outputs_first
from generators.seeds import derive, stream

SLICE_MODELS: dict[LocalKind, type[SliceModel]] = {
    "conv-vae": ConvVAE,
    "linear-vae": LinearVAE,
    "topographic-vae": TopographicVAE,
    "vq-vae": VectorQuantisedVAE,
    "vq-vae-pixelcnn": PixelCNNVAE,
    "filter-vae": FilterVAE,
}
"""Kind of a local generator, also in `generators.generator.GENERATOR_KINDS` -> the model of its slices."""


class LocalGenerator(Generator):
    """Draws convolution kernels and row patches of matrices; leaves the rest, and a linear output layer, to He.

    Args:
        config: what it is made of.
        name, card: see `Generator`. `train_generators.vae.fit` puts what it measured per group into
            `card["metrics"]`.
    """

    Config = LocalConfig
    kind = Kind.LOCAL
    config: LocalConfig

    def __init__(self, config: LocalConfig, *, name: str = "", card: dict | None = None) -> None:
        super().__init__(config, name=name, card=card)
        self.keys = tuple(GroupKey.parse(text) for text in config.groups)
        self.groups = nn.ModuleDict()
        for key in self.keys:
            with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
                torch.default_generator.manual_seed(derive(config.seed, config.kind, str(key)))
                self.groups[str(key)] = SLICE_MODELS[config.kind](key.shape, config)

    @property
    def kind_name(self) -> str:
        return self.config.kind

    def model(self, key: GroupKey) -> SliceModel:
        """The slice model of a weight group."""
        return cast(SliceModel, self.groups[str(key)])

    def group_of(self, info: ParameterInfo, depth: float) -> tuple[GroupKey, GroupKey] | str:
        """The weight group of a parameter and the one that serves it, or why none does."""
        if not info.numel:
            return "it has no entries"
        sizes = dict(patch=self.config.patch, depth_buckets=self.config.depth_buckets)
        key = group_key(info.role, info.shape, depth, **sizes)
        if key is None:
            return f"{self.name} models kernels and matrices only"
        if info.output and info.role is not Role.CONV_WEIGHT:  # only a trace tells that a convolution is one
            return f"{self.name} leaves the output layer to He"
        found = nearest(key, self.keys, most_stretch=self.config.most_stretch)
        if found is None:
            known = ", ".join(sorted({known.slices for known in self.keys})) or "nothing"
            return f"{self.name} was fitted on no {key.slices}, only on {known}"
        return key, found

    def scaled(self, slices: Tensor, model: SliceModel, info: ParameterInfo) -> Tensor:
        """Slices of unit second moment brought to the spread that `config.scale` names."""
        factor = {
            "he": info.he_std / model.unit_std,
            "zoo": info.he_std * model.zoo_gain,
            "none": model.zoo_std,
        }[self.config.scale]
        return slices * factor

    @torch.no_grad()
    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """Values for every parameter; the draws of a tensor depend on seed, member and its name only.

        Depth is counted in registration order, as in the zoo, whether or not a later step had the model traced.
        """
        proposal = Proposal()
        last = max((info.order for info in request.inventory), default=0)
        for info in request.inventory:
            depth = info.order / max(last, 1)
            rows_first = tuple(outputs_first(torch.empty(info.shape, device="meta"), info).shape)
            served = self.group_of(replace(info, shape=rows_first), depth)
            if isinstance(served, str):
                HE.fill(proposal, info, request, because=served)
                continue
            key, found = served
            slices, draws = self.model(found), stream(request.seed, self.kind_name, request.member, info.name)
            values = slices.draw(Layer.of(key, rows_first, depth), draws)
            if found.shape != key.shape:
                values = resized(values, key.shape, draws)
            value = key.join(self.scaled(values, slices, info), rows_first).cpu()
            proposal.values[info.name] = outputs_first(value, info).contiguous()
            proposal.sources[info.name] = f"{self.name}: {explained(key, found)}"
        return proposal
