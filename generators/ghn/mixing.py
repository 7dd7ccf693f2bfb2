"""How much of a generated matrix is decoded, and how much is noise.

    W = he_std * (noise_share * eps + share * gain * decoded),      noise_share^2 + share^2 = 1

A decoded matrix has few directions: R of them, whatever its size. Those of white noise `[O, K]` grow with it, its
largest singular value being about sqrt(O) + sqrt(K) (Davidson and Szarek 2001). On a layer much wider than any in
training a fixed share would therefore be a few directions that dwarf all others: of He's stable rank a tenth is left
on a ResNet-50. With a `limit` the decoded part is at most `limit` times as large in any direction as noise of unit
spread; what it gives up the noise takes, and very wide layers go over into He's. Where B matrices are stacked in one
parameter (query, key and value), what they decode to may have its directions in common, which makes the whole sqrt(B)
times as large in them, while its noise has norm sqrt(B O) + sqrt(K): so each has 1 / sqrt(B) of that as its measure.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from generators.ghn.decoder import Part
from generators.ghn.plan import Group


@torch.no_grad()
def shares(group: Group, part: Part, *, anchor: float, limit: float = 0.0) -> tuple[Tensor, Tensor]:
    """The noise's and the decoded part's share in each target of M members.

    Args:
        group: G targets `[O, I, *kernel]`.
        part: what they decode to; its largest singular values are not needed without a limit.
        anchor: the least share of the noise.
        limit: largest spectral norm of the decoded part, in units of that of noise of unit spread; 0 for none.

    Returns:
        Two tensors `[M, G]` whose squares add up to 1.
    """
    least, most = (torch.full_like(part.norm, value) for value in (anchor, math.sqrt(1 - anchor**2)))
    if part.largest is None or not (anchor and limit):
        return least, most
    sides = [group.outputs, math.prod(group.shape) / group.outputs]
    sides[1 - group.axis] /= group.stacked
    noise = sum(map(math.sqrt, sides))
    share = torch.minimum(most, limit * noise / (part.norm * part.largest).clamp_min(1e-30))
    return torch.where(share < most, (1 - share.square()).sqrt(), least), share
