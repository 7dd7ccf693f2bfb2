"""The flat optimisers against `torch.optim` on every member alone."""

import pytest
import torch

from collect.optimisation import OPTIMISERS, clip
from collect.recipe import Recipe

MEMBERS = 3


@pytest.mark.parametrize(
    "changes",
    [
        {"optimiser": "sgd", "momentum": 0.0},
        {"optimiser": "sgd", "momentum": 0.9},
        {"optimiser": "sgd", "momentum": 0.9, "nesterov": True},
        {"optimiser": "adamw", "momentum": 0.8, "weight_decay": 0.05},
    ],
)
def test_optimiser_against_torch(changes: dict) -> None:
    """Twelve steps with a moving learning rate; weights of three members in one tensor against one at a time."""
    recipe = Recipe(**changes)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(MEMBERS, 50, generator=generator)
    gradients = torch.randn(12, MEMBERS, 50, generator=generator)
    references = [row.clone().requires_grad_() for row in weights]
    if recipe.optimiser == "sgd":
        own = {"momentum": recipe.momentum, "nesterov": recipe.nesterov, "weight_decay": recipe.weight_decay}
        theirs = [torch.optim.SGD([row], **own) for row in references]
    else:
        own = {"betas": (recipe.momentum, 0.999), "weight_decay": recipe.weight_decay}
        theirs = [torch.optim.AdamW([row], **own) for row in references]
    optimiser = OPTIMISERS[recipe.optimiser](weights, recipe)
    for step, gradient in enumerate(gradients):
        rate = 0.1 / (1 + step)
        for row, reference, own_gradient in zip(references, theirs, gradient, strict=True):
            row.grad = own_gradient.clone()
            reference.param_groups[0]["lr"] = rate
            reference.step()
        optimiser.step(gradient.clone(), lr=rate)
    torch.testing.assert_close(weights, torch.stack([row.detach() for row in references]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_rates_of_every_weight_against_groups_of_torch(name: str) -> None:
    """Two groups of parameters, each with a rate of its own."""
    recipe = Recipe(optimiser=name, momentum=0.9, weight_decay=0.05)
    generator = torch.Generator().manual_seed(0)
    weights, gradients = torch.randn(8, generator=generator), torch.randn(5, 8, generator=generator)
    halves = [half.clone().requires_grad_() for half in weights.split(4)]
    groups = [{"params": [half], "lr": rate} for half, rate in zip(halves, (0.1, 0.03), strict=True)]
    if name == "sgd":
        theirs: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.05)
    else:
        theirs = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=0.05)
    optimiser = OPTIMISERS[name](weights, recipe)
    rates = torch.tensor([0.1] * 4 + [0.03] * 4)
    for gradient in gradients:
        for half, part in zip(halves, gradient.split(4), strict=True):
            half.grad = part.clone()
        theirs.step()
        optimiser.step(gradient.clone(), lr=rates)
    torch.testing.assert_close(weights, torch.cat([half.detach() for half in halves]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_state_is_all_that_a_step_needs_beside_the_weights(name: str) -> None:
    recipe = Recipe(optimiser=name, momentum=0.9)
    gradients = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(20)
    optimiser = OPTIMISERS[name](weights, recipe)
    for gradient in gradients[:3]:
        optimiser.step(gradient.clone(), lr=0.1)
    others = weights.clone()
    resumed = OPTIMISERS[name](others, recipe)
    resumed.load({key: value.clone() for key, value in optimiser.state().items()})
    for gradient in gradients[3:]:
        optimiser.step(gradient.clone(), lr=0.1)
        resumed.step(gradient.clone(), lr=0.1)
    assert torch.equal(weights, others)


def test_clipping_against_torch_one_member_at_a_time() -> None:
    """One member is far over the limit, one below, one not finite: none of them touches another."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (5,), ()]
    gradients = [torch.randn(MEMBERS, *shape, generator=generator) for shape in shapes]
    for gradient in gradients:
        gradient[0] *= 1e3
        gradient[1] *= 1e-3
        gradient[2] *= torch.inf
    expected = []
    for member in range(2):
        alone = [torch.zeros(shape, requires_grad=True) for shape in shapes]
        for value, gradient in zip(alone, gradients, strict=True):
            value.grad = gradient[member].clone()
        torch.nn.utils.clip_grad_norm_(alone, 0.5)
        expected.append([value.grad for value in alone])
    clip(gradients, 0.5)
    for member in range(2):
        for gradient, reference in zip(gradients, expected[member], strict=True):
            torch.testing.assert_close(gradient[member], reference)
