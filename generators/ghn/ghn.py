"""The graph hypernetwork: any traced model to all of its matrices, deterministic (`ghn`) or sampled (`noise-ghn`).

A node embedding `h` and the noise code `z` of a member (Knyazev et al. 2021, arXiv 2110.13100 for the GHN; the code is
per node and concatenated, as in arXiv 2310.16695) are decoded to a matrix of unit spread, `decoded`. What is written is

    W = he_std * gain * (anchor * eps + sqrt(1 - anchor^2) * decoded),      eps ~ N(0, 1) of the member

so its scale is known, its rank is full and its members differ by construction for any `anchor > 0`. With `anchor = 0`
and no code it is the deterministic GHN: its members are equal in all that it decodes. What it leaves to the He fallback
(embeddings, recurrent weights, a classifier of another class count) is drawn per member all the same.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from generators.errors import ConfigError, unknown_name
from generators.generator import Generator
from generators.ghn.decoder import DECODERS, DecoderSettings, make_decoder
from generators.ghn.encoder import ENCODERS, make_encoder
from generators.ghn.plan import DecodePlan, decode_plan
from generators.graph import trace
from generators.initialiser import Kind, Proposal, Request
from generators.inventory import inventory
from generators.pointwise import HE
from generators.seeds import stream

MEMBERS_AT_ONCE = 8  # members are decoded together in blocks of at most so many ...
NUMBERS_AT_ONCE = 2**22  # ... and so many weights, above which a block costs as much as its members one by one
FAR_WIDER = 2.0  # a layer this many times wider than any in training is worth a note
PLANS_KEPT = 64

Noise = Callable[[str, tuple[int, ...]], Tensor]
"""Name of a parameter and a shape `[M, *shape]` to white noise: each member's own stream, or training noise."""


@dataclass(frozen=True)
class GHNConfig:
    """Everything that fixes the shape and the meaning of a GHN's weights.

    Attributes:
        classes: number of classes of the classifiers it was trained to make.
        hidden: width of the node embeddings.
        layers, heads: depth and attention heads of the encoder.
        distance_limit: nodes further apart exchange no messages directly.
        width, rank, cells: hidden width, core size and table resolution of the decoder.
        spectrum_steps: how strongly the core decoder equalises the spectrum of a matrix (0: not at all).
        gain_bound: spread of a layer is He's times at most this factor, at least its inverse.
        anchor: share of white noise in every weight, as a standard deviation in [0, 1).
        code: length of the noise code per node, 0 for a deterministic GHN.
        widest: largest channel count seen in training, 0 if not known.
        seed: seed of the start values.
        encoder: what passes messages over the graph, a name in `generators.ghn.encoder.ENCODERS`.
        decoder: what makes matrices of node embeddings, a name in `generators.ghn.decoder.DECODERS`.
        block, block_kernel: side of the blocks of block decoders, and of their kernels.
    """

    classes: int = 10
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    distance_limit: int = 8
    width: int = 128
    rank: int = 16
    cells: int = 16
    spectrum_steps: int = 3
    gain_bound: float = 1.0
    anchor: float = 0.0
    code: int = 0
    widest: int = 0
    seed: int = 0
    encoder: str = "sparse"
    decoder: str = "core"
    block: int = 64
    block_kernel: int = 11

    def __post_init__(self) -> None:
        if not 0 <= self.anchor < 1:
            raise ConfigError(f"anchor is the share of white noise and must be in [0, 1), got {self.anchor}")
        sizes = (self.classes, self.hidden, self.heads, self.distance_limit, self.width, self.rank, self.cells,
                 self.block, self.block_kernel)  # fmt: skip
        for what, name, known in (("encoder", self.encoder, ENCODERS), ("decoder", self.decoder, DECODERS)):
            if name not in known:
                raise unknown_name(what, name, known)
        if min(sizes) < 1 or self.hidden % self.heads:
            raise ConfigError(f"sizes must be at least 1, and hidden divisible by heads, got {self}")
        if self.cells < self.rank:
            raise ConfigError(f"tables of {self.cells} cells cannot carry rank {self.rank}; raise cells or lower rank")
        if min(self.layers, self.spectrum_steps, self.code, self.widest) < 0:
            raise ConfigError(f"layers, spectrum_steps, code and widest must not be negative, got {self}")
        if self.gain_bound < 1:
            raise ConfigError(f"gain_bound is a factor of at least 1, got {self.gain_bound}")

    @property
    def decoder_settings(self) -> DecoderSettings:
        shared = {field.name for field in fields(DecoderSettings)} & {field.name for field in fields(self)}
        return DecoderSettings(
            node_width=self.hidden + self.code, **{name: getattr(self, name) for name in sorted(shared)}
        )


class GHN(Generator):
    """See the module docstring. `kind_name` is `noise-ghn` if members differ, else `ghn`."""

    Config = GHNConfig
    kind = Kind.GLOBAL
    config: GHNConfig

    def __init__(self, config: GHNConfig, *, name: str = "", card: dict | None = None) -> None:
        super().__init__(config, name=name, card=card)
        with torch.random.fork_rng(devices=[]):  # torch modules draw their start values from the global stream
            torch.default_generator.manual_seed(config.seed)
            self.encoder = make_encoder(
                config.encoder, config.hidden, layers=config.layers, heads=config.heads,
                distance_limit=config.distance_limit,
            )  # fmt: skip
            self.decoder = make_decoder(
                config.decoder, config.decoder_settings, generator=stream(config.seed, "ghn-start")
            )
        self._plans: dict[str, DecodePlan] = {}

    @property
    def kind_name(self) -> str:
        return "noise-ghn" if self.config.anchor > 0 or self.config.code > 0 else "ghn"

    def plan(self, model: nn.Module, example_inputs: object = None) -> DecodePlan:
        """The decode plan of `model`, cached by the signature of its graph.

        Raises:
            TraceError: the graph of the model cannot be traced.
        """
        graph = trace(model, example_inputs)
        key = graph.signature + str([(info.name, info.shape, info.tied_to) for info in inventory(model)])
        if key not in self._plans:
            while len(self._plans) >= PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = decode_plan(
                graph, inventory(model, graph), classes=self.config.classes, distance_limit=self.config.distance_limit
            )
        return self._plans[key]

    def predict(
        self, plan: DecodePlan, codes: Tensor, noise: Noise, *, anchor: float | None = None
    ) -> dict[str, Tensor]:
        """All decoded parameters of M members, differentiable.

        Args:
            plan: of the architecture with N nodes.
            codes: `[M, N, code]`, the noise codes.
            noise: gives `eps`; not called if `anchor` is 0.
            anchor: instead of the configured one; training raises it slowly.

        Returns:
            Parameter name to `[M, *shape]`.
        """
        hidden = self.encoder(plan.table)
        vectors = torch.cat([hidden.expand(len(codes), -1, -1), codes], dim=-1)
        return self.decode(plan, vectors, noise, anchor=anchor)

    def decode(
        self, plan: DecodePlan, vectors: Tensor, noise: Noise, *, anchor: float | None = None
    ) -> dict[str, Tensor]:
        """The part of `predict` after the encoder; `vectors` is `[M, N, hidden + code]`."""
        anchor = self.config.anchor if anchor is None else anchor
        pieces: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for group in plan.groups:
            decoded = self.decoder(group, vectors)
            for index, (name, block) in enumerate(zip(group.names, group.blocks, strict=True)):
                value = decoded[:, index]
                if anchor:
                    eps = noise(f"{name}[{block}]", value.shape)
                    value = anchor * eps + math.sqrt(1 - anchor**2) * value
                pieces[name][block] = group.target_std * value
        return {
            name: torch.cat([blocks[b] for b in sorted(blocks)], dim=1) if len(blocks) > 1 else blocks[0]
            for name, blocks in pieces.items()
        }

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        return self.propose_members(model, request, range(request.member, request.member + 1))[0]

    @torch.no_grad()
    def propose_members(self, model: nn.Module, request: Request, members: range) -> list[Proposal]:
        """One proposal per member: one pass over the graph, then one decode per block of members.

        With blocks of B, member m is always row m % B of block m // B, whoever else is asked for: equal bits.
        """
        plan = self.plan(model, request.example_inputs)
        hidden = self.encoder(plan.table)
        alike = self.kind_name == "ghn"  # the decode of member 0 does for all
        size = 1 if alike else max(1, min(MEMBERS_AT_ONCE, NUMBERS_AT_ONCE // max(plan.numel, 1)))
        proposals: list[Proposal] = []
        block, decoded = range(0), {}
        for member in members:
            stands_for = 0 if alike else member
            if stands_for not in block:
                start = stands_for - stands_for % size
                block = range(start, start + size)
                codes = torch.stack([self.code(request.seed, other, len(hidden)) for other in block])
                vectors = torch.cat([hidden.expand(len(codes), -1, -1), codes], dim=-1)
                decoded = self.decode(plan, vectors, _member_noise(request.seed, block))
            own = {name: value[block.index(stands_for)] for name, value in decoded.items()}
            proposals.append(self._proposal(plan, request, member, own))
        return proposals

    def code(self, seed: int, member: int, nodes: int) -> Tensor:
        """The noise code `[nodes, code]` of one member: N(0, I), reproducible from (seed, member)."""
        return torch.randn(nodes, self.config.code, generator=stream(seed, "ghn-code", member))

    def _proposal(self, plan: DecodePlan, request: Request, member: int, decoded: dict[str, Tensor]) -> Proposal:
        proposal = Proposal()
        own = Request(request.inventory, seed=request.seed, member=member)
        for info in plan.found:
            if info.name in decoded:
                proposal.values[info.name] = decoded[info.name].contiguous()
                proposal.sources[info.name] = self.name
            elif info.tied_to:
                proposal.kept[info.name] = f"tied to {info.tied_to}"
            else:
                HE.fill(proposal, info, own, because=plan.left_out.get(info.name, "not in the plan"))
        widest = max((group.outputs for group in plan.groups), default=0)
        if self.config.widest and widest > FAR_WIDER * self.config.widest:
            proposal.notes.append(
                f"{self.name} was trained on layers of up to {self.config.widest} channels; this model has {widest}"
            )
        return proposal


def _member_noise(seed: int, members: range) -> Noise:
    def noise(name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.stack(
            [torch.randn(shape[1:], generator=stream(seed, "ghn-noise", member, name)) for member in members]
        )

    return noise
