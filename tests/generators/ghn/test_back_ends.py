"""What every encoder and every decoder must do, alone and in all pairs; and what sets the block decoders apart."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from generators import load, save
from generators.errors import UnknownNameError
from generators.ghn import ghn as module
from generators.ghn.codes import member_noise
from generators.ghn.config import GHNConfig
from generators.ghn.decoder import DECODERS, Decoder, DecoderSettings, make_decoder
from generators.ghn.encoder import ENCODERS
from generators.ghn.ghn import GHN
from generators.ghn.plan import Group
from generators.statistics import measure
from small_ghn import network

SMALL = GHNConfig(
    hidden=16, heads=2, layers=2, width=24, rank=6, cells=8, block=8, block_kernel=3, gain_bound=2.0, distance_limit=4
)
EXAMPLE = torch.zeros(1, 1, 6, 6)
WIDTHS = (3, 7, 48, 300)
PAIRS = [(encoder, decoder) for encoder in ENCODERS for decoder in DECODERS]

both = pytest.mark.parametrize("encoder, decoder", PAIRS)
each_decoder = pytest.mark.parametrize("name", DECODERS)


class Everything(nn.Module):
    """A layer of each sort that is decoded: k x k, depthwise, 1 x 1, transposed, 1-D, attention, linear, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.large = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 7, 5, padding=2)
        self.depthwise, self.point = nn.Conv2d(7, 7, 3, padding=1, groups=7), nn.Conv2d(7, 24, 1)
        self.up, self.line = nn.ConvTranspose2d(24, 16, 2), nn.Conv1d(16, 16, 3)
        self.attention = nn.TransformerEncoderLayer(16, 2, 20, dropout=0.0, batch_first=True)
        self.wide, self.head = nn.Linear(16, 300), nn.Linear(300, 10)

    def forward(self, x):
        x = self.large(self.stem(x).relu()).relu()
        x = self.up(self.point(self.depthwise(x)).relu()).relu()
        x = self.attention(self.line(x.flatten(2)).mT)
        return self.head(self.wide(x.mean(1)).relu())


def ghn(encoder: str, decoder: str, **changes) -> GHN:
    return GHN(replace(SMALL, encoder=encoder, decoder=decoder, **changes))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def group(outputs, inputs, kernel=(), *, blocks=(0,), output=False) -> Group:
    return Group(
        names=tuple(f"w{index}" for index in range(len(blocks))), blocks=blocks, nodes=torch.arange(len(blocks)),
        outputs=outputs, inputs=inputs, kernel=kernel, fan_in=inputs * math.prod(kernel), output=output,
    )  # fmt: skip


def decoder(name: str, **changes) -> Decoder:
    settings = DecoderSettings(node_width=8, classes=10, width=16, rank=6, cells=8, block=8, block_kernel=3)
    return make_decoder(name, replace(settings, **changes), generator=rng(1))


def vectors(members=2, nodes=3, width=8) -> torch.Tensor:
    return torch.randn(members, nodes, width, generator=rng(2))


# ---- every pair of encoder and decoder ---------------------------------------------------------------------------


@both
def test_every_layer_is_generated_finite_and_deterministic(encoder, decoder):
    """All ten layers of each sort, the same bits from a second GHN of the same configuration."""
    model = Everything()
    one, other = (ghn(encoder, decoder, anchor=0.5, code=4) for _ in range(2))
    groups = one.plan(model, EXAMPLE).groups
    assert {info.name for info in one.plan(model, EXAMPLE).found if info.name.endswith("weight")
            and len(info.shape) > 1} == {name for group in groups for name in group.names}  # fmt: skip
    states, again = one.sample(model, 2, example_inputs=EXAMPLE), other.sample(model, 2, example_inputs=EXAMPLE)
    for name, value in states.items():
        assert torch.isfinite(value).all() and torch.equal(value, again[name]), name


@both
def test_gradients_reach_every_parameter(encoder, decoder):
    """With and without an anchor; torch-geometric makes one layer (lin_skip) that it does not use."""
    made = ghn(encoder, decoder, code=4)
    plan = made.plan(Everything(), EXAMPLE)
    codes = torch.randn(2, len(plan.table.features), 4, generator=rng(1))
    for anchor in (0.0, 0.6):
        made.zero_grad()
        decoded = made.predict(plan, codes, lambda _, shape: torch.randn(shape, generator=rng(2)), anchor=anchor)
        torch.stack([(value**3).sum() for value in decoded.values()]).sum().backward()
        for name, parameter in made.named_parameters():
            if "lin_skip" not in name:
                assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
                assert parameter.grad.abs().max() > 0, name


@both
def test_architectures_together_against_one_after_the_other(encoder, decoder):
    """Values and gradients; the second model has layers of the first one's shapes, and each draws noise of its own."""
    made = ghn(encoder, decoder, anchor=0.5, code=4)
    plans = [made.plan(Everything(), EXAMPLE), made.plan(network("resnet-8-w4"), torch.zeros(1, 1, 8, 8))]
    plans.append(plans[0])
    codes = [torch.randn(2, len(plan.table.features), 4, generator=rng(place)) for place, plan in enumerate(plans)]
    noise = [member_noise(place, range(2)) for place in range(3)]

    def gradients(found):
        made.zero_grad()
        torch.stack([(value**3).sum() for each in found for value in each.values()]).sum().backward()
        return {name: value.grad for name, value in made.named_parameters() if value.grad is not None}

    together = made.predict_together(plans, codes, noise)
    alone = [made.predict(*each) for each in zip(plans, codes, noise, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert one.keys() == other.keys() and len(one) > 5
        for name, value in other.items():
            torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.equal(together[0]["stem.weight"], together[2]["stem.weight"])
    found, wanted = gradients(together), gradients(alone)
    scale = max(value.abs().max().item() for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * scale, msg=name)


@both
@pytest.mark.parametrize("changes", [{}, {"anchor": 0.5}, {"code": 4}], ids=["plain", "anchor", "code"])
def test_members_differ_if_and_only_if_there_is_a_code_or_an_anchor(encoder, decoder, changes):
    made, model = ghn(encoder, decoder, **changes), Everything()
    names = {name for group in made.plan(model, EXAMPLE).groups for name in group.names}
    states = made.sample(model, 3, example_inputs=EXAMPLE)
    for name in names:
        distances = torch.pdist(states[name].flatten(1))
        assert bool(distances.min() > 0) == bool(distances.max() > 0) == bool(changes), name


@both
@pytest.mark.parametrize("anchor", [0.0, 0.6])
def test_spread_is_that_of_he_within_the_bound(encoder, decoder, anchor, monkeypatch):
    """Within a factor of `gain_bound` = 2; the decoder whose spread is free starts within it too.

    As decoded: the model has five layers in a row without normalisation, which would be rescaled.
    """
    monkeypatch.setattr(module, "rescale", lambda *_, **__: None)
    made, model = ghn(encoder, decoder, anchor=anchor), Everything()
    states = made.sample(model, 1, example_inputs=EXAMPLE)
    for found in made.plan(model, EXAMPLE).groups:
        for name, block in zip(found.names, found.blocks, strict=True):
            value = states[name][0, block * found.outputs : (block + 1) * found.outputs]
            ratio = value.square().mean().sqrt().item() / found.target_std
            slack = 1 + 3 * anchor / math.sqrt(value.numel()) + (decoder == "fan-in-block")
            assert 1 / (2 * slack) < ratio < 2 * slack, name


@both
def test_saved_and_loaded(encoder, decoder, tmp_path):
    """The checkpoint says which back ends it is made of, and gives the same bits.

    Nearly all noise: decoders this small, and the one whose spread is free, would be refused for their stable rank.
    """
    made, model = ghn(encoder, decoder, anchor=0.97, code=4), Everything()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=rng(3)))
    again = load(save(made, tmp_path / "checkpoint"))
    assert (again.config.encoder, again.config.decoder) == (encoder, decoder)
    states, others = (each.sample(model, 2, example_inputs=EXAMPLE) for each in (made, again))
    assert all(torch.equal(value, others[name]) for name, value in states.items())


@pytest.mark.parametrize("name", ["ghn-digits", "noise-ghn-digits", "noise-ghn-cifar10"])
def test_checkpoints_from_before_there_was_a_choice(name):
    """The published ones name no back ends in their config.json: they are sparse and core."""
    config = load(name).config
    assert (config.encoder, config.decoder) == ("sparse", "core")


def test_unknown_back_ends():
    with pytest.raises(UnknownNameError, match="transformer"):
        replace(SMALL, encoder="transformr")
    with pytest.raises(UnknownNameError, match="coordinate"):
        replace(SMALL, decoder="coordinates")


# ---- every decoder -----------------------------------------------------------------------------------------------


@each_decoder
@pytest.mark.parametrize("outputs", WIDTHS)
@pytest.mark.parametrize("inputs, kernel", [(1, (3, 3)), (7, (3, 3)), (300, ()), (3, (5,)), (48, (1, 1)), (3, (7, 7))])
def test_any_width(name, outputs, inputs, kernel):
    """Shape, spread and values: finite, and more than one."""
    found = decoder(name)(group(outputs, inputs, kernel), vectors())
    assert found.shape == (2, 1, outputs, inputs, *kernel) and torch.isfinite(found).all()
    rms = found.flatten(2).square().mean(-1).sqrt()
    if name == "fan-in-block":
        assert (rms > 0.1).all() and (rms < 5).all()
    else:
        torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=0)
    assert len(found[0, 0].unique()) > 1


@each_decoder
@pytest.mark.parametrize("shape", [(7, 3, (3, 3)), (48, 20, ())], ids=str)
def test_members_and_targets_at_once_are_those_one_by_one(name, shape):
    """Four targets, three blocks of one shape among them, for three members in one pass, against twelve passes."""
    made, nodes = decoder(name, gain_bound=3.0), vectors(3, 4)
    with torch.no_grad():
        made.gain.weight.normal_(generator=rng(4))
    blocks = (0, 1, 2, 0)
    together = made(group(*shape, blocks=blocks), nodes)
    for member in range(3):
        for index, block in enumerate(blocks):
            alone = made(group(*shape, blocks=(block,)), nodes[member : member + 1, index : index + 1])
            torch.testing.assert_close(together[member, index], alone[0, 0], rtol=1e-3, atol=1e-4)


@each_decoder
def test_rows_of_a_classifier_follow_the_class_codes(name):
    """Exchanging the codes of classes exchanges their rows, and nothing else; no two rows are alike."""
    made, target = decoder(name), group(10, 30, output=True)
    order = torch.randperm(10, generator=rng(5))
    with torch.no_grad():
        found = made(target, vectors())
        made.class_codes.copy_(made.class_codes[order])
        torch.testing.assert_close(made(target, vectors()), found[:, :, order], rtol=1e-3, atol=1e-4)
    assert torch.pdist(found[0, 0]).min() > 0.1


@each_decoder
def test_query_key_and_value_of_a_node_differ(name):
    found = decoder(name)(group(16, 16, blocks=(0, 1, 2)), vectors()[:, :1].expand(-1, 3, -1))
    flat = nn.functional.normalize(found.detach().flatten(2), dim=-1)
    assert (flat @ flat.mT)[:, [0, 0, 1], [1, 2, 2]].abs().max() < 0.995


# ---- what blocks cost --------------------------------------------------------------------------------------------


@each_decoder
def test_copies_and_rank_of_a_wide_target(name):
    """Without an anchor, 64 x 64 from blocks of 16 and ranks of 24.

    Blocks: each number 16 times, row 16 is row 0, rank at most 16. Core and coordinate: every number once, no rows
    alike, the rank they are set to, and a spectrum that is spread over at least a third of it.
    """
    made = decoder(name, rank=24, cells=32, block=16, width=64)
    weight = made(group(64, 64, (1, 1)), vectors())[0, 0].detach()
    row, rows = measure(weight), weight.flatten(1)
    nearest = torch.cdist(rows, rows).fill_diagonal_(math.inf).min() / rows.norm(dim=1).mean()
    if "block" in name:
        assert row.distinct_share <= 1 / 16 and torch.equal(rows[16], rows[0]) and row.numeric_rank <= 16
    else:
        assert row.distinct_share > 0.99 and nearest > 1e-2
        assert row.numeric_rank == 24 and row.stable_rank > 8


def test_core_is_level_beyond_its_outer_cells():
    """Its known weakness on layers of more than two rows per cell: the first rows are alike. Coordinates have none."""
    target = group(64, 64, (1, 1))
    for name, copies in (("core", 8), ("coordinate", 0)):  # half a cell, four rows, at either end
        weight = decoder(name, rank=8, cells=8, width=64)(target, vectors())[0, 0].detach().flatten(1)
        distances = torch.cdist(weight.double(), weight.double()).fill_diagonal_(math.inf)
        assert (distances.min(dim=1).values < 1e-4).sum() == copies, name


@each_decoder
def test_an_anchor_gives_every_decoder_full_rank(name):
    """At 0.6, what is left of the copies is their correlation: rows of one block position still resemble each other."""
    made = GHN(replace(SMALL, decoder=name, anchor=0.6, gain_bound=1.0))
    model = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10))
    weight = made.sample(model, 1, example_inputs=torch.zeros(1, 48))["0.weight"][0]
    row = measure(weight)
    assert row.numeric_rank == 48 and row.distinct_share > 0.99
    rows = nn.functional.normalize(weight, dim=1)
    alike = (rows[:40] * rows[8:]).sum(1).mean()  # 8: the side of a block
    assert (alike > 0.5) == ("block" in name)
