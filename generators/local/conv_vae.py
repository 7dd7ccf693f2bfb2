"""Convolutional VAEs, one per weight group, as an initialiser for any model.

After "CVAE" of arXiv 2310.16695 (a VAE of 3x3 slices per layer of one ResNet-20), with what that leaves out: groups by
slice shape and depth instead of layer index, a learned decoder variance (`generators.local.slice_vae`), the decoder's
noise in the samples, and layers rescaled to a spread that fits their fan-in. Slices of a tensor are independent draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from generators.errors import ConfigError, unknown_name
from generators.generator import Generator
from generators.initialiser import Kind, Proposal, Request
from generators.inventory import ParameterInfo
from generators.local.groups import GroupKey, group_key, nearest
from generators.local.slice_vae import SliceVAE
from generators.pointwise import HE
from generators.seeds import derive, stream

SCALES = ("he", "zoo", "none")


@dataclass(frozen=True)
class ConvVAEConfig:
    """What a `ConvVAE` is made of.

    Attributes:
        groups: the weight groups it models, such as "conv_weight-3x3-0" (role, slice shape, depth bucket).
        depth_buckets: into how many parts of equal depth networks are divided.
        patch: length of the row patches of matrices.
        latent: latent units of a group at most; never more than a slice has weights.
        channels: channels of the encoder's and decoder's maps.
        hidden: channels between these maps and the latents.
        noise_bounds: least and largest decoder variance, as shares of the data's variance.
        scale: spread of a generated tensor: "he" (the He std of its fan-in), "zoo" (as far from He's as the tensors of
            the group in the zoo are, root mean square), "none" (that of the zoo, whatever the fan-in).
        seed: seed of the networks' first weights.
    """

    groups: tuple[str, ...]
    depth_buckets: int = 3
    patch: int = 8
    latent: int = 64
    channels: int = 16
    hidden: int = 64
    noise_bounds: tuple[float, float] = (1e-3, 0.25)
    scale: Literal["he", "zoo", "none"] = "he"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise unknown_name("scale", self.scale, SCALES)
        for name in ("depth_buckets", "patch", "latent", "channels", "hidden"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        low, high = self.noise_bounds
        if not 0 < low < high <= 1:
            raise ConfigError(f"noise_bounds must be two shares with 0 < low < high <= 1, got {self.noise_bounds}")
        for text in self.groups:
            if len(GroupKey.parse(text).shape) != 2:
                raise ConfigError(f"weight group {text!r}: slices must have two axes")


class ConvVAE(Generator):
    """Draws convolution kernels and row patches of matrices; leaves the rest, and the output layer, to He.

    Args:
        config: what it is made of.
        name, card: see `Generator`. `train_generators.vae.fit` puts what it measured per group into
            `card["metrics"]`.
    """

    Config = ConvVAEConfig
    kind = Kind.LOCAL
    config: ConvVAEConfig

    def __init__(self, config: ConvVAEConfig, *, name: str = "", card: dict | None = None) -> None:
        super().__init__(config, name=name, card=card)
        self.keys = tuple(GroupKey.parse(text) for text in config.groups)
        self.groups = nn.ModuleDict()
        for key in self.keys:
            with torch.random.fork_rng(devices=[]):  # layers draw their first weights from the global generator
                torch.default_generator.manual_seed(derive(config.seed, "conv-vae", str(key)))
                self.groups[str(key)] = SliceVAE(
                    key.shape, latent=config.latent, channels=config.channels, hidden=config.hidden,
                    noise_bounds=config.noise_bounds,
                )  # fmt: skip

    @property
    def kind_name(self) -> str:
        return "conv-vae"

    def vae(self, key: GroupKey) -> SliceVAE:
        """The network of a weight group."""
        return cast(SliceVAE, self.groups[str(key)])

    def group_of(self, info: ParameterInfo) -> tuple[GroupKey | None, str]:
        """The weight group that serves a parameter and how it was chosen; None and the reason if none does."""
        sizes = dict(patch=self.config.patch, depth_buckets=self.config.depth_buckets)
        key = group_key(info.role, info.shape, info.depth, **sizes)
        if key is None:
            return None, f"{self.name} models kernels and matrices only"
        if info.output:
            return None, f"{self.name} leaves the output layer to He"
        found = nearest(key, self.keys)
        if found is None:
            known = ", ".join(sorted({known.slices for known in self.keys})) or "nothing"
            return None, f"{self.name} was fitted on no {key.slices}, only on {known}"
        return found, f"{self.name}: {found}" + ("" if found == key else f", the nearest in depth to {key}")

    def scaled(self, slices: Tensor, vae: SliceVAE, info: ParameterInfo) -> Tensor:
        """Slices of unit second moment brought to the spread that `config.scale` names."""
        factor = {
            "he": info.he_std / vae.unit_std,
            "zoo": info.he_std * vae.zoo_gain,
            "none": vae.zoo_std,
        }[self.config.scale]
        return slices * factor

    @torch.no_grad()
    def propose(self, model: nn.Module, request: Request) -> Proposal:
        """Values for every parameter; the draws of a tensor depend on seed, member and its name only."""
        proposal = Proposal()
        for info in request.inventory:
            key, how = self.group_of(info)
            if key is None:
                HE.fill(proposal, info, request, because=how)
                continue
            vae = self.vae(key)
            draws = stream(request.seed, "conv-vae", request.member, info.name)
            slices = self.scaled(vae.draw(key.count(info.shape), draws), vae, info)
            proposal.values[info.name] = key.join(slices, info.shape).cpu()
            proposal.sources[info.name] = how
        return proposal
