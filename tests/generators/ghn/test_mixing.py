"""Shares of noise and of what is decoded, against singular values and against the formula written out."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from generators.ghn.codes import member_noise, with_codes
from generators.ghn.config import GHNConfig
from generators.ghn.ghn import GHN
from generators.ghn.mixing import largest_singular_value, shares
from generators.ghn.plan import Group
from generators.statistics import measure

CONFIG = GHNConfig(hidden=16, heads=2, layers=1, width=32, rank=8, cells=8, anchor=0.7, code=4)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def group(outputs: int, inputs: int, kernel: tuple[int, ...] = (3, 3), count: int = 2) -> Group:
    return Group(
        names=tuple(f"w{index}" for index in range(count)), blocks=(0,) * count,
        nodes=torch.zeros(count, dtype=torch.long), outputs=outputs, inputs=inputs, kernel=kernel,
        fan_in=inputs * math.prod(kernel), output=False,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(8, 300), (24, 24), (200, 30), (1, 9), (64, 1)])
def test_largest_singular_value_is_that_of_a_decomposition(shape):
    """From below, within a tenth on matrices of noise, whose spectrum is the hardest; exact for one direction."""
    noise = torch.randn(5, 2, *shape, generator=rng(0))
    exact = torch.linalg.svdvals(noise)[..., 0]
    found = largest_singular_value(noise)
    assert (found <= exact * (1 + 1e-5)).all() and (found >= 0.9 * exact).all()
    one = torch.randn(shape[0], 1, generator=rng(1)) @ torch.randn(1, shape[1], generator=rng(2))
    torch.testing.assert_close(largest_singular_value(one), torch.linalg.svdvals(one)[0], rtol=1e-4, atol=0)
    assert largest_singular_value(torch.zeros(shape)) == 0


def test_shares_by_hand():
    """Three members: a flat spectrum stays below the limit, one direction is cut, no limit changes nothing."""
    target = group(16, 4, (1, 1))
    flat = torch.eye(4, 4) / 2.0
    single = torch.zeros(4, 4).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(1.0))
    right = torch.stack([flat, single])[:, None].expand(2, 2, 4, 4)
    spread = torch.full((2, 2, 1), 8.0)  # sqrt(16 * 4)
    own, share = shares(target, right, spread, anchor=0.6, limit=1.0)
    noise = math.sqrt(16) + math.sqrt(4)
    assert own[0].tolist() == pytest.approx([0.6, 0.6]) and share[0].tolist() == pytest.approx([0.8, 0.8])
    assert share[1].tolist() == pytest.approx([noise / 8.0] * 2)  # 0.75: one direction of norm 8
    torch.testing.assert_close(own.square() + share.square(), torch.ones(2, 2))
    for without in ({"anchor": 0.6, "limit": 0.0}, {"anchor": 0.0, "limit": 1.0}):
        own, share = shares(target, right, spread, **without)
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
        found = ghn.decode(plan, vectors, member_noise(5, members))
        cut = [share for target in plan.groups for share in ghn._shares(target, vectors, None)[1].flatten().tolist()]
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
