"""Shares of noise and of what is decoded, against the formula written out and against what is sampled."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from generators.ghn.codes import member_noise, with_codes
from generators.ghn.config import GHNConfig
from generators.ghn.decoder import Part
from generators.ghn.ghn import GHN
from generators.ghn.mixing import shares
from generators.ghn.plan import Group
from generators.statistics import measure
from small_models import Forward

CONFIG = GHNConfig(hidden=16, heads=2, layers=1, width=32, rank=8, cells=8, anchor=0.7, code=4)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def group(outputs: int, inputs: int, kernel: tuple[int, ...] = (3, 3), count: int = 2) -> Group:
    return Group(
        names=tuple(f"w{index}" for index in range(count)), blocks=(0,) * count,
        nodes=torch.zeros(count, dtype=torch.long), outputs=outputs, inputs=inputs, kernel=kernel,
        fan_in=inputs * math.prod(kernel), output=False,
    )  # fmt: skip


def test_shares_by_hand():
    """Three members: a flat spectrum stays below the limit, one direction is cut, no limit changes nothing."""
    target = group(16, 4, (1, 1))
    largest = torch.tensor([[0.5, 0.5], [1.0, 1.0]])  # of four equal values of norm 1, and of one
    part = Part(None, torch.empty(2, 2, 16, 4), norm=torch.full((2, 2), 8.0), largest=largest)  # sqrt(16 * 4)
    own, share = shares(target, part, anchor=0.6, limit=1.0)
    noise = math.sqrt(16) + math.sqrt(4)
    assert own[0].tolist() == pytest.approx([0.6, 0.6]) and share[0].tolist() == pytest.approx([0.8, 0.8])
    assert share[1].tolist() == pytest.approx([noise / 8.0] * 2)  # 0.75: one direction of norm 8
    torch.testing.assert_close(own.square() + share.square(), torch.ones(2, 2))
    for without in ({"anchor": 0.6, "limit": 0.0}, {"anchor": 0.0, "limit": 1.0}):
        own, share = shares(target, part, **without)
        assert own.unique().tolist() == pytest.approx([without["anchor"]])
        assert share.unique().tolist() == pytest.approx([math.sqrt(1 - without["anchor"] ** 2)])


@pytest.mark.parametrize("decoder", ["core", "coordinate", "block"])
def test_a_limit_keeps_half_of_the_stable_rank_of_he_on_wide_layers(decoder):
    """He's stable rank for the shape, from noise, against that of sampled matrices with and without the limit."""
    model = nn.Sequential(nn.Linear(600, 700), nn.ReLU(), nn.Linear(700, 500), nn.ReLU(), nn.Linear(500, 10))
    shares_of_he = {}
    for limit in (0.0, 1.0):
        ghn = GHN(replace(CONFIG, decoder=decoder, decoded_limit=limit))
        state = ghn.sample(model, 1, example_inputs=torch.zeros(1, 600))
        shares_of_he[limit] = [
            measure(state[name][0]).stable_rank
            / measure(torch.randn(state[name].shape[1:], generator=rng(3))).stable_rank
            for name in ("0.weight", "2.weight")
        ]
        for name in ("0.weight", "2.weight"):
            he = math.sqrt(2 / state[name].shape[-1])
            assert state[name].std().item() == pytest.approx(he, rel=0.05), "the spread stays He's"
    assert max(shares_of_he[0.0]) < 0.3 and min(shares_of_he[1.0]) > 0.5


def test_stacked_sides_are_those_of_the_whole():
    """Three matrices one under the other, and their transposes side by side, have the same shares."""
    part = Part(None, torch.empty(1, 2, 16, 4), norm=torch.full((1, 2), 8.0), largest=torch.ones(1, 2))
    under = replace(group(16, 4, (1, 1)), stacked=3)
    beside = replace(group(4, 16, (1, 1)), stacked=3, axis=1)
    _, share = shares(under, part, anchor=0.6, limit=1.0)
    assert share[0, 0].item() == pytest.approx((math.sqrt(16) + math.sqrt(4 / 3)) / 8)
    assert torch.equal(shares(beside, part, anchor=0.6, limit=1.0)[1], share)


@pytest.mark.parametrize("decoder", ["core", "coordinate", "block"])
def test_stacked_matrices_keep_half_of_it_together(decoder):
    """Query, key and value in one tensor may share their directions; its stable rank is that of all three."""
    ghn = GHN(replace(CONFIG, decoder=decoder, decoded_limit=1.0))
    attention = nn.MultiheadAttention(512, 4, batch_first=True)
    model = Forward(lambda m, x: m.attention(x, x, x, need_weights=False)[0], attention=attention)
    weight = ghn.sample(model, 1, example_inputs=torch.zeros(1, 2, 512))["attention.in_proj_weight"][0]
    he = measure(torch.randn(weight.shape, generator=rng(3))).stable_rank
    assert measure(weight).stable_rank / he > 0.5
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.05)


@pytest.mark.parametrize("decoder", ["core", "block"])
def test_what_is_written_is_what_decode_gives(decoder):
    """With a limit that cuts some matrices and leaves others, two members at once."""
    ghn = GHN(replace(CONFIG, decoder=decoder, decoded_limit=1.0))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 300, 3), nn.Flatten(), nn.Linear(300, 10))
    example = torch.zeros(1, 3, 5, 5)
    state = ghn.sample(model, 2, seed=5, example_inputs=example)
    plan = ghn.plan(model, example)
    with torch.no_grad():
        members = range(2)
        codes = torch.stack([ghn.code(5, member, ghn.code_nodes(plan)) for member in members])
        vectors = with_codes(ghn.encoder(plan.table), codes)
        found = ghn.decode(plan.groups, vectors, member_noise(5, members))
        cut = [each for *_, share in ghn._parts(plan.groups, vectors) for each in share.flatten().tolist()]
    assert min(cut) < 0.6 < 0.71 < max(cut)
    for name, value in found.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


def test_training_knows_no_limit():
    """With an anchor of its own, `predict` mixes evenly."""
    model, example = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10)), torch.zeros(1, 300)
    plain, limited = GHN(CONFIG), GHN(replace(CONFIG, decoded_limit=0.1))
    made = []
    for ghn in (plain, limited):
        plan = ghn.plan(model, example)
        codes = torch.zeros(1, ghn.code_nodes(plan), 4)
        made.append(ghn.predict(plan, codes, member_noise(0, range(1)), anchor=0.7))
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
