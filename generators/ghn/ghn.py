"""The graph hypernetwork: any traced model to all of its matrices, deterministic (`ghn`) or sampled (`noise-ghn`).

A node embedding `h` and the noise code `z` of a member (Knyazev et al. 2021, arXiv 2110.13100 for the GHN; the code is
per node and concatenated, as in arXiv 2310.16695) are decoded to a matrix of unit spread, `decoded`. What is written is

    W = he_std * (anchor * eps + sqrt(1 - anchor^2) * gain * decoded),      eps ~ N(0, 1) of the member

so its scale is known, its rank is full and its members differ by construction for any `anchor > 0`; in a matrix so
wide that the decoded part would dwarf it, noise takes more (`generators.ghn.mixing`). With `anchor = 0` and no code it
is the deterministic GHN: its members are equal in all that it decodes. What it leaves to the He fallback (embeddings,
recurrent weights, a classifier of another class count) is drawn per member all the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from generators.arguments import whole_number
from generators.batches import in_full_precision
from generators.generator import Generator
from generators.ghn.codes import Noise, check_codes, noise_stream, with_codes
from generators.ghn.config import GHNConfig
from generators.ghn.decoder import Part, make_decoder
from generators.ghn.encoder import make_encoder
from generators.ghn.mixing import shares
from generators.ghn.plan import DecodePlan, Group, together
from generators.ghn.plans import Plans
from generators.ghn.probes import probes
from generators.ghn.unnormalised import longest_run, needs_rescaling, rescale
from generators.ghn.writing import storage, write
from generators.graph import Graph, trace
from generators.initialiser import Kind, Proposal, Request
from generators.pointwise import HE
from generators.seeds import plain_tensors, stream

MEMBERS_AT_ONCE = 8  # members are decoded together in blocks of at most so many ...
NUMBERS_AT_ONCE = 2**22  # ... and so many weights, above which a block costs as much as its members one by one
FAR_WIDER = 2.0  # a layer of this many times more inputs or outputs than any in training is worth a note


class GHN(Generator):
    """See the module docstring. `kind_name` is `noise-ghn` if members differ, else `ghn`."""

    Config = GHNConfig
    kind = Kind.GLOBAL
    config: GHNConfig

    @plain_tensors()
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
        self._plans = Plans()

    @property
    def kind_name(self) -> str:
        return "noise-ghn" if self.config.anchor > 0 or self.config.code > 0 else "ghn"

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @plain_tensors()
    def plan(self, model: nn.Module, example_inputs: object = None, *, graph: Graph | None = None) -> DecodePlan:
        """The decode plan of `model` on the device of the GHN, kept for the next model of this architecture.

        Args:
            model: the architecture.
            example_inputs: inputs for the tracer.
            graph: of the model, if it has been traced already.

        Raises:
            TraceError: the graph of the model cannot be traced.
        """
        return self._plans.of(model, graph or trace(model, example_inputs), self.config, self.device)

    def code_nodes(self, plan: DecodePlan) -> int:
        """How many codes a network has: one per node, or one in all."""
        return len(plan.table.features) if self.config.code_per == "node" else 1

    def codes(
        self, model: nn.Module, n: int, *, seed: int = 0, first: int = 0, example_inputs: object = None
    ) -> Tensor:
        """The noise codes of members `first` to `first + n - 1`: `[n, nodes, code]`, N(0, I), for `sample(codes=)`.

        With `code_per="network"`, the axis of the nodes has size 1.

        Raises:
            ConfigError: `n`, `first` or `seed` is no such number.
            TraceError: the graph of the model cannot be traced.
        """
        n, first = whole_number("n", n, least=1), whole_number("first", first, least=0)
        seed = whole_number("seed", seed)
        nodes = self.code_nodes(self.plan(model, example_inputs))
        return torch.stack([self.code(seed, member, nodes) for member in range(first, first + n)])

    @plain_tensors()
    def code(self, seed: int, member: int, nodes: int) -> Tensor:
        """The noise code `[nodes, code]` of one member: N(0, I), reproducible from (seed, member)."""
        return torch.randn(nodes, self.config.code, generator=stream(seed, "ghn-code", member))

    def predict(
        self, plan: DecodePlan, codes: Tensor, noise: Noise, *, anchor: float | None = None
    ) -> dict[str, Tensor]:
        """All decoded parameters of M members, differentiable.

        Args:
            plan: of the architecture with N nodes.
            codes: `[M, N, code]`, the noise codes, or `[M, 1, code]` for codes per network.
            noise: gives `eps`; not called if `anchor` is 0.
            anchor: instead of the configured one and its limit; training raises it slowly.

        Returns:
            Parameter name to `[M, *shape]`.
        """
        return self.predict_together([plan], [codes], [noise], anchor=anchor)[0]

    def predict_together(
        self, plans: Sequence[DecodePlan], codes: Sequence[Tensor], noise: Sequence[Noise],
        *, anchor: float | None = None,
    ) -> list[dict[str, Tensor]]:  # fmt: skip
        """`predict` for several architectures at once: for small ones in far fewer operations than one by one.

        Args:
            plans: of A architectures.
            codes: a tensor for each, all with M members.
            noise: for each; called in the order of `together(plans)`.
            anchor: as there.

        Returns:
            For each of the architectures, parameter name to `[M, *shape]`.
        """
        tables = [plan.table for plan in plans]
        hidden = self.encoder(*tables).split([len(table.features) for table in tables])
        vectors = [with_codes(own, code) for own, code in zip(hidden, codes, strict=True)]

        def of_its_own(target: str, shape: tuple[int, ...]) -> Tensor:
            place, _, name = target.partition("/")
            return noise[int(place)](name, shape)

        decoded = self.decode(together(plans), torch.cat(vectors, dim=1), of_its_own, anchor=anchor)
        found: list[dict[str, Tensor]] = [{} for _ in plans]
        for target, value in decoded.items():
            place, _, name = target.partition("/")
            found[int(place)][name] = value
        return found

    def decode(
        self, groups: Sequence[Group], vectors: Tensor, noise: Noise, *, anchor: float | None = None
    ) -> dict[str, Tensor]:
        """The part of `predict` after the encoder; `vectors` is `[M, N, hidden + code]`."""
        pieces: dict[tuple[str, int], dict[int, Tensor]] = defaultdict(dict)
        for group, part, noise_share, share in self._parts(groups, vectors, anchor):
            decoded = part.matrices(group.target_std * share * part.norm).unflatten(-1, (group.inputs, *group.kernel))
            if (self.config.anchor if anchor is None else anchor) > 0:
                one = (len(vectors), *decoded.shape[2:])
                targets = zip(group.names, group.blocks, strict=True)
                eps = torch.stack([noise(f"{name}[{block}]", one) for name, block in targets], dim=1)
                scale = group.target_std * noise_share
                decoded = decoded + eps.to(decoded) * scale.view(*scale.shape, *[1] * (decoded.dim() - 2))
            for name, block, value in zip(group.names, group.blocks, decoded.unbind(1), strict=True):
                pieces[name, 1 + group.axis][block] = value
        return {
            name: torch.cat([blocks[b] for b in sorted(blocks)], dim=axis) if len(blocks) > 1 else blocks[0]
            for (name, axis), blocks in pieces.items()
        }

    def _parts(
        self, groups: Sequence[Group], vectors: Tensor, anchor: float | None = None
    ) -> Iterator[tuple[Group, Part, Tensor, Tensor]]:
        """Every group with what it decodes to, and the shares `[M, G]` of noise and decoded part."""
        limit = self.config.decoded_limit if anchor is None else 0.0
        anchor = self.config.anchor if anchor is None else anchor
        parts = self.decoder.parts(groups, vectors, largest=bool(limit and anchor)) if groups else ()
        for group, part in zip(groups, parts, strict=True):
            yield group, part, *shares(group, part, anchor=anchor, limit=limit)

    def propose(self, model: nn.Module, request: Request) -> Proposal:
        proposal = self.propose_stack(model, request, range(request.member, request.member + 1))
        proposal.values = {name: value[0] for name, value in proposal.values.items()}
        return proposal

    def probes(self) -> dict[str, tuple[nn.Module, Tensor]]:
        return probes(self.config.classes)

    @plain_tensors()
    @torch.no_grad()
    def propose_stack(self, model: nn.Module, request: Request, members: range) -> Proposal:
        """One pass over the graph and one decode of all members, in blocks that fit into the cache.

        With blocks of B, member m is always row m % B of block m // B, whoever else is asked for: equal bits.

        Raises:
            ConfigError: the codes of the request do not fit.
        """
        with in_full_precision(self.device.type):
            return self._propose_stack(model, request, members)

    def _propose_stack(self, model: nn.Module, request: Request, members: range) -> Proposal:
        graph = request.graph or trace(model, request.example_inputs)
        plan = self.plan(model, graph=graph)
        hidden = self.encoder(plan.table)
        check_codes(request, name=self.name, wanted=(len(members), self.code_nodes(plan), self.config.code))
        shapes = {name: plan.found[name].shape for group in plan.groups for name in group.names}
        weights = storage(shapes, len(members), like=hidden)
        alike = self.kind_name == "ghn"  # the decode of member 0 does for all
        size = 1 if alike else max(1, min(MEMBERS_AT_ONCE, NUMBERS_AT_ONCE // max(plan.numel, 1)))
        decoded = range(1) if alike else members
        for start in range(decoded.start - decoded.start % size, decoded.stop, size):
            block = range(start, start + size)
            codes = torch.stack([self._code_of(member, members, request, plan).to(hidden) for member in block])
            rows = {block.index(member): decoded.index(member) for member in block if member in decoded}
            noise = [(request.seed, members.start if request.shared_noise else member) for member in block]
            self._write(plan, with_codes(hidden, codes), rows, noise, weights)
        if alike:
            for value in weights.values():
                value[1:] = value[0]
        proposal = self._proposal(plan, request, members, weights)
        run = longest_run(graph, plan.nodes)
        if needs_rescaling(model, run):
            rescale(model, proposal, request, graph, run=run)
        return proposal

    def _code_of(self, member: int, members: range, request: Request, plan: DecodePlan) -> Tensor:
        if request.codes is not None and member in members:
            return request.codes[members.index(member)]
        return self.code(request.seed, member, self.code_nodes(plan))

    def _write(
        self, plan: DecodePlan, vectors: Tensor, rows: dict[int, int], noise: list[tuple[int, int]],
        weights: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """What `decode` gives, but for rounding, written where it belongs: target after target, without temporaries.

        Args:
            plan: of the architecture.
            vectors: `[B, N, hidden + code]` of a block of members.
            rows: member of the block -> member of `weights` that it is.
            noise: seed and index of each member of the block.
            weights: name to `[M, *shape]`.
        """
        for group, part, noise_share, share in self._parts(plan.groups, vectors):
            scale = (group.target_std * share * part.norm).tolist()
            noise_scale = (group.target_std * noise_share).tolist()
            for index, (name, block) in enumerate(zip(group.names, group.blocks, strict=True)):
                matrices = weights[name].chunk(group.stacked, 1 + group.axis)[block].flatten(2)
                for row, member in rows.items():
                    write(
                        matrices[member], part.left, part.right[row, index], scale=scale[row][index],
                        noise_scale=noise_scale[row][index],
                        draws=noise_stream(*noise[row], f"{name}[{block}]") if self.config.anchor else None,
                    )  # fmt: skip

    def _proposal(self, plan: DecodePlan, request: Request, members: range, weights: dict[str, Tensor]) -> Proposal:
        proposal = Proposal()
        for info in plan.found:
            if info.name in weights:
                proposal.values[info.name] = weights[info.name]
                proposal.sources[info.name] = self.name
            elif info.tied_to:
                proposal.kept[info.name] = f"tied to {info.tied_to}"
            else:
                HE.fill_stack(proposal, info, request, members, because=plan.left_out.get(info.name, "not in the plan"))
        proposal.notes += self._notes(plan)
        return proposal

    def _notes(self, plan: DecodePlan) -> Iterator[str]:
        if self.config.widest and plan.widest > FAR_WIDER * self.config.widest:
            yield (
                f"{self.name} was trained on layers of up to {self.config.widest} channels; "
                f"this model has {plan.widest}"
            )
        if not plan.groups:
            yield f"{self.name} makes nothing of this model: all of it is by the fallback"
