"""Noise codes: members of given codes, codes per network, codes that do not fit, and the ways between two."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from generators.errors import ConfigError
from generators.ghn.codes import interpolate_codes, member_noise
from generators.ghn.ghn import GHN
from small_ghn import NOISY, SMALL, equal, network


@pytest.mark.parametrize("per", ["node", "network"])
def test_members_of_given_codes(per):
    """Their own codes give the members bit for bit; those of other members give weights between neither."""
    ghn, model = GHN(replace(SMALL, code=4, code_per=per)), network("vit-2-w16")
    codes = ghn.codes(model, 11, seed=3)
    assert codes.shape == (11, len(ghn.plan(model).table.features) if per == "node" else 1, 4)
    assert equal(ghn.sample(model, 11, seed=3), ghn.sample(model, 11, seed=3, codes=codes))
    assert torch.equal(codes[6:9], ghn.codes(model, 3, seed=3, first=6))
    moved = ghn.sample(model, 3, seed=8, first=2, codes=codes[6:9])
    wanted = ghn.sample(model, 3, seed=3, first=6)
    for name in {name for group in ghn.plan(model).groups for name in group.names}:
        torch.testing.assert_close(moved[name], wanted[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(wanted[name][0], wanted[name][1])


def test_white_noise_stays_that_of_the_member_when_codes_are_given():
    """Two members of one code differ by their white noise alone."""
    ghn, model = GHN(NOISY), network()
    codes = ghn.codes(model, 1, seed=3).expand(2, -1, -1)
    states, (group, *_) = ghn.sample(model, 2, seed=3, codes=codes), ghn.plan(model).groups
    own = member_noise(3, range(2))(f"{group.names[0]}[0]", (2, *group.shape))
    difference = group.target_std * ghn.config.anchor * (own[0] - own[1])
    torch.testing.assert_close(
        states[group.names[0]][0] - states[group.names[0]][1], difference, rtol=1e-3, atol=1e-5
    )  # fmt: skip


def test_codes_per_network_are_the_same_for_all_nodes():
    """As `predict` has it for codes that were written out node by node."""
    ghn, model = GHN(replace(SMALL, code=4, code_per="network")), network()
    plan, codes = ghn.plan(model), ghn.codes(model, 2)
    one = ghn.predict(plan, codes, lambda _, shape: torch.zeros(shape))
    other = ghn.predict(plan, codes.expand(-1, len(plan.table.features), -1), lambda _, shape: torch.zeros(shape))
    assert equal(one, other)


def test_codes_that_do_not_fit():
    model = network()
    with pytest.raises(ConfigError, match="without noise codes"):
        GHN(replace(SMALL, anchor=0.5)).sample(model, 2, codes=torch.zeros(2, 1, 4))
    with pytest.raises(ConfigError, match=r"\(2, 1, 4\).*got \(3, 1, 4\)"):
        GHN(replace(NOISY, code_per="network")).sample(model, 2, codes=torch.zeros(3, 1, 4))
    with pytest.raises(ConfigError, match="without noise codes"):
        GHN(SMALL).sample(model, 2, shared_noise=True)
    with pytest.raises(ConfigError, match="code_per"):
        replace(SMALL, code_per="layer")


def test_interpolated_codes():
    """Ends exactly, equal angles on the way, lengths of codes (a straight way has 0.7 of it in the middle)."""
    first, second = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(4))
    way = interpolate_codes(first, second, [0.0, 0.25, 0.5, 0.75, 1.0])
    assert torch.equal(way[[0, -1]], torch.stack([first, second]))
    unit = nn.functional.normalize(way.flatten(1), dim=1)
    angles = torch.acos((unit[1:] * unit[:-1]).sum(1))
    assert angles.std() < 0.05 * angles.mean()
    assert way.flatten(1).norm(dim=1).min() > 0.95 * min(first.norm(), second.norm())
    torch.testing.assert_close(interpolate_codes(first, 3 * first, [0.5])[0], 2 * first)
    assert torch.equal(interpolate_codes(first, second, 0.25)[0], way[1])
    assert torch.equal(interpolate_codes(first, second, torch.tensor(0.25))[0], way[1])


@pytest.mark.parametrize("stretch", [-1.0, -1.02])
def test_codes_in_opposite_directions(stretch):
    """Over half a circle in steps of one length: no code on the way is short, and the way is always the same."""
    first = torch.randn(40, 8, generator=torch.Generator().manual_seed(4))
    way = interpolate_codes(first, stretch * first, torch.linspace(0, 1, 11))
    assert torch.equal(way[[0, -1]], torch.stack([first, stretch * first]))
    lengths, unit = way.flatten(1).norm(dim=1), nn.functional.normalize(way.flatten(1), dim=1)
    angles = torch.acos((unit[1:] * unit[:-1]).sum(1))
    torch.testing.assert_close(angles, torch.full((10,), torch.pi / 10), rtol=0.02, atol=0.0)
    assert lengths.min() > 0.99 * first.norm() and unit[5].abs().max() < 0.25, "a code like any other in the middle"
    assert abs(unit[5] @ unit[0]) < 1e-5
    assert torch.equal(way, interpolate_codes(first, stretch * first, torch.linspace(0, 1, 11)))
    assert interpolate_codes(first[:1, :1], -first[:1, :1], 0.5).abs().max() < 1e-6, (
        "nothing is orthogonal to one number"
    )


ONE = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("first", "second", "shares", "words"),
    [
        (ONE, torch.ones(2, 4), [0.5], r"one shape, got \(3, 4\) and \(2, 4\)"),
        (ONE[None], ONE, [0.5], r"first must be one code .* got torch.float32 of shape \(1, 3, 4\)"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4), [0.5], r"first must be one code .*\(2, 3, 4\)"),
        (ONE, [[1.0]], [0.5], "second must be one code .* got list"),
        (ONE, ONE.long(), [0.5], "second must be one code .* got torch.int64"),
        (ONE, ONE, "half", "shares must be numbers, .* got 'half'"),
        (ONE, ONE, None, "shares must be numbers, .* got None"),
        (ONE, ONE, [float("nan")], r"shares must be .*finite numbers, got \[nan\]"),
        (ONE, ONE, [[0.5]], r"shares must be one number or a list .* got \[\[0.5\]\]"),
    ],
)
def test_ways_that_make_no_sense(first, second, shares, words):
    with pytest.raises(ConfigError, match=words):
        interpolate_codes(first, second, shares)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"n": 0}, "n must be a whole number of at least 1, got 0"),
        ({"n": 1.5}, "n must be a whole number of at least 1, got 1.5"),
        ({"n": True}, "n must be a whole number of at least 1, got True"),
        ({"first": -1}, "first must be a whole number of at least 0, got -1"),
        ({"seed": "a"}, "seed must be a whole number, got 'a'"),
    ],
)
def test_codes_of_members_that_make_no_sense(asked, words):
    with pytest.raises(ConfigError, match=words):
        GHN(NOISY).codes(network(), **{"n": 2, **asked})


@pytest.mark.parametrize("classes", [10, 7])
@pytest.mark.parametrize("first", [0, 5])
def test_a_way_through_codes_with_shared_noise(first, classes):
    """Starts at a member bit for bit, goes in small steps, and ends at the other member's codes; stacked too.

    All that is drawn is that of the first, what the GHN leaves to He included, such as a classifier of seven classes.
    """
    ghn, model = GHN(NOISY), network("vit-1-w16", classes=classes)
    ends = ghn.codes(model, 2, seed=3, first=first)
    way = interpolate_codes(ends[0], ends[1], torch.linspace(0, 1, 11))
    states = ghn.sample(model, 11, seed=3, first=first, codes=way, shared_noise=True)
    (parameters, buffers) = ghn.sample(model, 11, seed=3, first=first, codes=way, shared_noise=True, stacked=True)
    assert equal({name: value.detach() for name, value in {**parameters, **buffers}.items()}, states)
    assert equal(
        {name: value[:1] for name, value in states.items()}, ghn.sample(model, 1, seed=3, first=first)
    )  # fmt: skip
    alone = ghn.sample(model, 1, seed=3, first=first, codes=ends[1:])
    members = ghn.sample(model, 2, seed=3, first=first)
    decoded = {name for group in ghn.plan(model).groups for name in group.names}
    assert len(decoded) >= 5 - (classes == 7)
    for name, value in states.items():
        torch.testing.assert_close(value[-1], alone[name][0], rtol=1e-4, atol=1e-6)
        if name not in decoded:
            assert torch.equal(value, value[:1].expand_as(value)), name
            continue
        steps, apart = (value[1:] - value[:-1]).flatten(1).norm(dim=1), (members[name][0] - members[name][1]).norm()
        assert steps.min() > 0 and steps.max() < 0.2 * apart, name


def test_with_shared_noise_members_have_their_own_codes():
    ghn, model = GHN(NOISY), network()
    states = ghn.sample(model, 3, seed=3, first=2, shared_noise=True)
    codes = ghn.codes(model, 3, seed=3, first=2)
    assert equal(states, ghn.sample(model, 3, seed=3, first=2, shared_noise=True, codes=codes))
    name = ghn.plan(model).groups[0].names[0]
    assert len({value.sum().item() for value in states[name]}) == 3
