"""What members of a noise GHN differ in: their codes, beside the node embeddings, and their white noise.

In the published GHNs it is nearly all the white noise; see docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from generators.arguments import real_tensor
from generators.errors import ConfigError
from generators.initialiser import Request
from generators.seeds import stream

SAME_CIRCLE = 1e-4  # sine of the angle between two codes, below which they lie in one direction or in opposite ones

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


def check_codes(request: Request, *, name: str, wanted: tuple[int, int, int]) -> None:
    """Raise `ConfigError` unless the codes of a request can be those of `wanted`: members, nodes, length of a code."""
    if (request.codes is not None or request.shared_noise) and not wanted[2]:
        raise ConfigError(f"{name} was made without noise codes (code=0)")
    if request.codes is not None and tuple(request.codes.shape) != wanted:
        raise ConfigError(
            f"the codes of {wanted[0]} members of this model have shape {wanted} (members, nodes, code), "
            f"got {tuple(request.codes.shape)}"
        )


def interpolate_codes(first: Tensor, second: Tensor, shares: Sequence[float] | Tensor | float) -> Tensor:
    """Codes on the way from one member to another along the great circle: all of them are as likely as the ends.

    Between codes from N(0, I) the straight way leads through codes that are too short. Two sorts of ends name no great
    circle, or more than one: ends in one direction are joined by a straight line; those in opposite directions by the
    great circle through a third direction, orthogonal to theirs and always the same (codes of a single number have no
    such direction, and are joined by a straight line).

    The rows of `sample(..., codes=way)` differ in their white noise too; for a way without jumps in the weights pass
    `shared_noise=True`.

    Args:
        first, second: `[nodes, code]`, one code each, see `GHN.codes`.
        shares: S numbers, 0 for the first code, 1 for the second; a single number is a list of one.

    Returns:
        `[S, nodes, code]`, for `sample(codes=)`. With share 0 it is `first`, with share 1 `second`, bit for bit.

    Raises:
        ConfigError: the codes are no tensors of floating-point numbers of one shape `[nodes, code]`; the shares are
            no finite numbers, or have two axes.
    """
    for name, code in (("first", first), ("second", second)):
        real_tensor(name, code, what="one code [nodes, code], such as codes(model, 2)[0]", axes=2)
    if first.shape != second.shape:
        raise ConfigError(f"two codes of one model have one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    try:
        share = torch.as_tensor(shares, dtype=torch.float64, device=first.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"shares must be numbers, 0 for the first code, 1 for the second, got {shares!r}") from error
    if share.dim() > 1 or not torch.isfinite(share).all():
        raise ConfigError(f"shares must be one number or a list of finite numbers, got {shares!r}")
    share = share.reshape(-1, 1, 1)
    cosine = nn.functional.cosine_similarity(first.flatten().double(), second.flatten().double(), dim=0)
    angle = torch.acos(cosine.clamp(-1, 1))
    if torch.sin(angle) >= SAME_CIRCLE:
        shares_of = [torch.sin((1 - share) * angle), torch.sin(share * angle)]
        one, other = ((each / torch.sin(angle)).to(first) for each in shares_of)
        return one * first + other * second
    if cosine > 0 or first.numel() == 1:
        return torch.lerp(first, second, share.to(first))
    between = _orthogonal_to(first) * (first.norm() + second.norm()) / 2
    double = 2 * share.flatten()
    there, on = interpolate_codes(first, between, double), interpolate_codes(between, second, double - 1)
    return torch.where(share < 0.5, there, on)


def _orthogonal_to(code: Tensor) -> Tensor:
    """A direction of length 1 that has the cosine 0 to a code; drawn, as codes are, but always the same."""
    drawn = torch.randn(
        code.shape, generator=stream(0, "ghn-between-opposite-codes"), dtype=torch.float64, device="cpu"
    )
    along = code.double() / code.double().norm()
    across = drawn.to(along) - (drawn.to(along) * along).sum() * along
    return (across / across.norm()).to(code)
