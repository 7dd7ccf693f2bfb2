"""SGD and AdamW over one flat tensor that holds the weights of all members.

The update rules are those of `torch.optim`, which the tests compare against. One flat tensor makes a step a handful of
operations however many tensors and members there are; every operation is elementwise, so members do not touch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from collect.recipe import Recipe

SECOND_BETA = 0.999
EPSILON = 1e-8


class SGD:
    """`v <- momentum v + g`, `w <- w - lr v` with `g` = gradient plus `weight_decay w`; Nesterov: `g + momentum v`."""

    def __init__(self, weights: Tensor, recipe: Recipe) -> None:
        self.weights, self.recipe = weights, recipe
        self.velocity = torch.zeros_like(weights)

    def step(self, gradient: Tensor, *, lr: float | Tensor) -> None:
        """Update the weights in place. `gradient` is overwritten; `lr` may differ from weight to weight."""
        gradient.add_(self.weights, alpha=self.recipe.weight_decay)
        if self.recipe.momentum:
            self.velocity.mul_(self.recipe.momentum).add_(gradient)
            gradient = (
                gradient.add_(self.velocity, alpha=self.recipe.momentum) if self.recipe.nesterov else self.velocity
            )
        if isinstance(lr, Tensor):
            self.weights.addcmul_(gradient, lr, value=-1)
        else:
            self.weights.add_(gradient, alpha=-lr)

    def state(self) -> dict[str, Tensor]:
        """What a step changes beside the weights."""
        return {"velocity": self.velocity}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        self.velocity.copy_(state["velocity"])


class AdamW:
    """Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101: Adam with decoupled weight decay."""

    def __init__(self, weights: Tensor, recipe: Recipe) -> None:
        self.weights, self.recipe = weights, recipe
        self.first, self.second = torch.zeros_like(weights), torch.zeros_like(weights)
        self.steps = 0

    def step(self, gradient: Tensor, *, lr: float | Tensor) -> None:
        """Update the weights in place; `lr` may differ from weight to weight."""
        beta = self.recipe.momentum
        self.steps += 1
        self.weights.mul_(1 - lr * self.recipe.weight_decay)
        self.first.lerp_(gradient, 1 - beta)
        self.second.mul_(SECOND_BETA).addcmul_(gradient, gradient, value=1 - SECOND_BETA)
        scale = (self.second / (1 - SECOND_BETA**self.steps)).sqrt_().add_(EPSILON)
        share = -1 / (1 - beta**self.steps)
        if isinstance(lr, Tensor):
            self.weights.addcmul_(self.first / scale, lr, value=share)
        else:
            self.weights.addcdiv_(self.first, scale, value=lr * share)

    def state(self) -> dict[str, Tensor]:
        """What a step changes beside the weights."""
        return {"first": self.first, "second": self.second, "steps": torch.tensor(self.steps)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`."""
        self.first.copy_(state["first"])
        self.second.copy_(state["second"])
        self.steps = int(state["steps"])


OPTIMISERS: dict[str, Callable[[Tensor, Recipe], SGD | AdamW]] = {"sgd": SGD, "adamw": AdamW}


def clip(gradients: Sequence[Tensor], largest: float) -> None:
    """Scale the gradients `[K, ...]` of each of K members in place so that the member's norm is at most `largest`.

    As `torch.nn.utils.clip_grad_norm_`, but one norm per member: a member's explosion must not slow the others.
    """
    norms = torch.stack([gradient.reshape(len(gradient), -1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = (largest / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))
