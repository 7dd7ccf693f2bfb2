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
    with pytest.raises(ConfigError, match="code_per"):
        replace(SMALL, code_per="layer")


def test_interpolated_codes():
    """Ends exactly, equal angles on the way, lengths of codes (a straight way has 0.7 of it in the middle)."""
    first, second = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(4))
    way = interpolate_codes(first, second, [0.0, 0.25, 0.5, 0.75, 1.0])
    torch.testing.assert_close(way[[0, -1]], torch.stack([first, second]))
    unit = nn.functional.normalize(way.flatten(1), dim=1)
    angles = torch.acos((unit[1:] * unit[:-1]).sum(1))
    assert angles.std() < 0.05 * angles.mean()
    assert way.flatten(1).norm(dim=1).min() > 0.95 * min(first.norm(), second.norm())
    torch.testing.assert_close(interpolate_codes(first, 3 * first, [0.5])[0], 2 * first)
