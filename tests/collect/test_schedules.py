"""Schedules against torch's own and against their ends."""

import pytest
import torch

from collect.recipe import Recipe
from collect.schedules import learning_rate

STEPS = 10  # per epoch


def _rates(**changes: object) -> list[float]:
    recipe = Recipe(lr=0.2, epochs=4, **changes)
    return [learning_rate(recipe, step, steps_per_epoch=STEPS) for step in range(4 * STEPS)]


def _torch_rates(make: type, **arguments: object) -> list[float]:
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    scheduler = make(optimiser, **arguments)
    rates = []
    for _ in range(4 * STEPS):
        rates.append(scheduler.get_last_lr()[0])
        optimiser.step()
        scheduler.step()
    return rates


def test_against_torch() -> None:
    schedulers = torch.optim.lr_scheduler
    assert _rates(schedule="cosine") == pytest.approx(_torch_rates(schedulers.CosineAnnealingLR, T_max=4 * STEPS))
    assert _rates(schedule="step") == pytest.approx(_torch_rates(schedulers.MultiStepLR, milestones=[20, 30]))
    linear = _torch_rates(schedulers.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=4 * STEPS)
    assert _rates(schedule="linear") == pytest.approx(linear)
    assert _rates(schedule="constant") == [0.2] * 4 * STEPS


def test_warm_up_rises_in_a_line_and_the_schedule_covers_the_rest() -> None:
    rates = _rates(schedule="linear", warmup_epochs=0.5)
    assert rates[:5] == pytest.approx([0.04, 0.08, 0.12, 0.16, 0.2])
    assert rates[5] == 0.2
    assert rates[-1] == pytest.approx(0.2 / 35)
