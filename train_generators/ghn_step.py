"""One step of a GHN's training: architectures, batches and draws to the gradient of the objective.

A step has `meta_batch` units, each of one architecture and one batch of images. A unit takes its random streams from
(seed, step, unit), so it is the same whichever process works on it, and whether or not the training was killed before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from generators.ghn.ghn import GHN
from generators.seeds import stream
from train_generators.ghn_config import GHNTrainingConfig
from train_generators.objectives import Teachers, adapted_loss, images_loss, zoo_loss
from train_generators.processes import sum_gradients, total
from train_generators.subject import ImageStream, Subject

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def _stream(config: GHNTrainingConfig, purpose: str, step: int, unit: int) -> torch.Generator:
    return stream(config.seed, purpose, step, *((unit,) if unit else ()))


def anchor_at(config: GHNTrainingConfig, anchor: float, step: int) -> float:
    """The share of noise at a step: rises to `anchor`, or is there at once where a trained GHN is trained on."""
    warm_up = 0.0 if config.start else config.anchor_warm_up * config.steps
    return anchor * min(1.0, step / max(warm_up, 1.0)) if warm_up else anchor


def train_step(
    ghn: GHN, subject: Subject, config: GHNTrainingConfig, source: ImageStream, step: int,
    teachers: Teachers | None = None, unit: int = 0,
) -> tuple[float, dict[str, float]]:  # fmt: skip
    """Loss of one unit of a step and its parts.

    Its share of the gradient of the step is added to those of the GHN and of the codes of the teachers.
    """
    draw, objective = _stream(config, "ghn-draw", step, unit), config.objective
    anchor = anchor_at(config, ghn.config.anchor, step)

    def generate(codes: Tensor) -> dict[str, Tensor]:
        return ghn.predict(subject.plan, codes, lambda _, shape: torch.randn(shape, generator=draw), anchor=anchor)

    images, labels = source.batch(step, unit=unit)
    losses: list[Tensor] = []
    parts: dict[str, float] = {}
    if objective.images or objective.adapted:
        decoded = generate(torch.randn(config.draws, subject.codes, ghn.config.code, generator=draw))
    if objective.images:
        logits = subject.logits(decoded, images.expand(config.draws, *images.shape))
        loss, found = images_loss(logits, labels, config.cosine_weight)
        losses.append(objective.images * loss)
        parts |= found
    if objective.adapted:
        ahead = objective.steps_ahead(step, config.steps)
        batches = [source.batch(step, number, unit=unit) for number in range(ahead + 1)]
        loss, found = adapted_loss(subject, decoded, batches, objective)
        losses.append(objective.adapted * loss)
        parts |= found
    if objective.zoo and teachers is not None:
        pick = _stream(config, "ghn-teacher", step, unit)
        number = int(torch.randint(teachers.count(subject.name), (), generator=pick))
        code = teachers.code(subject.name, number)
        loss, found = zoo_loss(
            subject, generate(code[None]), teachers.state(subject.name, number), code, images, prior=objective.prior
        )
        losses.append(objective.zoo * loss)
        parts |= found
    loss = torch.stack(losses).sum()
    (loss / config.meta_batch).backward()
    return loss.item(), parts


def gradients(
    fabric: Fabric, ghn: GHN, subjects: Sequence[Subject], config: GHNTrainingConfig, source: ImageStream, step: int,
    teachers: Teachers | None = None,
) -> tuple[float, dict[str, float]]:  # fmt: skip
    """Mean loss of a step over its units and its parts; all processes have them, and the gradients, alike.

    Args:
        fabric: the processes, which take the units in turns.
        ghn, teachers: what the gradients are left in.
        subjects: the architectures, of which every unit draws one.
        config: of the training.
        source: the images.
        step: number of the step.
    """
    values: dict[str, float] = {}
    for unit in range(fabric.global_rank, config.meta_batch, fabric.world_size):
        choice = torch.randint(len(subjects), (), generator=_stream(config, "ghn-architecture", step, unit))
        loss, parts = train_step(ghn, subjects[int(choice)], config, source, step, teachers, unit)
        for name, value in {"loss": loss, **parts}.items():
            values[name] = values.get(name, 0.0) + value / config.meta_batch
    sum_gradients(fabric, [*ghn.parameters(), *(teachers.parameters() if teachers else ())])
    summed = total(fabric, torch.tensor(list(values.values()), dtype=torch.float64, device=ghn.device))
    means = dict(zip(values, summed.tolist(), strict=True))
    return means.pop("loss"), means
