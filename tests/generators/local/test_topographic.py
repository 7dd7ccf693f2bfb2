"""The coupling of a topographic VAE against loops over capsules and their circles."""

from __future__ import annotations

import torch
from torch import nn

from generators.local.config import LocalOptions
from generators.local.topographic import CAPSULE, EPSILON, TopographicVAE
from generators.seeds import stream


@torch.no_grad()
def test_units_share_the_scale_of_their_neighbours_on_the_circle_of_their_capsule():
    model = TopographicVAE((3, 3), LocalOptions(kind="topographic-vae", channels=4, hidden=8))
    assert model.units == 12 and model.latent == 24, "whole capsules for 9 weights, z and u"
    model.location.normal_(generator=stream(0, "location"))
    model.decoder = nn.Identity()
    latents = torch.randn(5, 24, generator=stream(0, "latents"))
    found = model.decode(latents)
    for number, (z, u) in enumerate(zip(latents[:, :12], latents[:, 12:], strict=True)):
        for unit in range(12):
            capsule, place = divmod(unit, CAPSULE)
            around = [u[capsule * CAPSULE + (place + step) % CAPSULE] for step in (-1, 0, 1)]
            expected = (z[unit] + model.location[unit]) / (sum(each**2 for each in around) + EPSILON) ** 0.5
            assert torch.allclose(found[number, unit], expected)
