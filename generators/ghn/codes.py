"""What members of a noise GHN differ in: their codes, beside the node embeddings, and their white noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from generators.seeds import stream

Noise = Callable[[str, tuple[int, ...]], Tensor]
"""Name of a target and a shape `[M, *shape]` to white noise: each member's own stream, or training noise."""


def noise_stream(seed: int, member: int, target: str) -> torch.Generator:
    """Where the white noise of a member in one target, `name[block]`, comes from."""
    return stream(seed, "ghn-noise", member, target)


def member_noise(seed: int, members: range) -> Noise:
    """The white noise of `members`, for `GHN.decode` and `GHN.predict`."""

    def noise(target: str, shape: tuple[int, ...]) -> Tensor:
        return torch.stack([torch.randn(shape[1:], generator=noise_stream(seed, each, target)) for each in members])

    return noise


def with_codes(hidden: Tensor, codes: Tensor) -> Tensor:
    """`[M, N, hidden + code]` from embeddings `[N, hidden]` and codes `[M, N or 1, code]`."""
    return torch.cat(
        [hidden.expand(len(codes), -1, -1), codes.to(hidden).expand(-1, len(hidden), -1)], dim=-1
    )  # fmt: skip


def interpolate_codes(first: Tensor, second: Tensor, shares: Sequence[float] | Tensor) -> Tensor:
    """Codes on the way from one member to another along the great circle: all of them are as likely as the ends.

    Between codes from N(0, I) the straight way leads through codes that are too short. Ends in one direction, between
    which there is no circle, are joined by a straight line.

    Args:
        first, second: `[nodes, code]`, see `GHN.codes`.
        shares: S numbers, 0 for the first code, 1 for the second.

    Returns:
        `[S, nodes, code]`, for `sample(codes=)`.
    """
    share = torch.as_tensor(shares, dtype=first.dtype, device=first.device)[:, None, None]
    cosine = nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0)
    angle = torch.acos(cosine.double().clamp(-1, 1)).to(first)
    if torch.sin(angle) < 1e-4:
        return torch.lerp(first, second, share)
    return (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * second) / torch.sin(angle)
