"""One step of a GHN's training: architectures, batches and draws to the gradient of the objective.

A step has `meta_batch` units, each of one architecture and one batch of images. A unit takes its random streams from
(seed, step, unit), so it is the same whichever process works on it, and whether or not the training was killed before.
Units are decoded together, run one after the other, and the gradients of their weights go back together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from generators.ghn.codes import Noise
from generators.ghn.ghn import GHN, NUMBERS_AT_ONCE
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


@dataclass(frozen=True)
class Unit:
    """An architecture and a batch of images.

    Attributes:
        number: which one of the step.
        subject: the architecture.
        draw: its codes and its white noise, in this order.
    """

    number: int
    subject: Subject
    draw: torch.Generator


def generate(ghn: GHN, units: Sequence[Unit], codes: Sequence[Tensor], anchor: float) -> list[dict[str, Tensor]]:
    """What the codes `[M, nodes, code]` of every unit decode to, name -> `[M, *shape]`, with noise of its own."""

    def white(unit: Unit, members: int) -> Noise:
        found = {  # drawn in the order of its plan, whatever is decoded beside it
            f"{name}[{block}]": torch.randn((members, *group.shape), generator=unit.draw)
            for group in unit.subject.plan.groups
            for name, block in zip(group.names, group.blocks, strict=True)
        }
        return lambda target, shape: found[target]

    noise = [white(unit, len(code) if anchor else 0) for unit, code in zip(units, codes, strict=True)]
    return ghn.predict_together([unit.subject.plan for unit in units], codes, noise, anchor=anchor)


def unit_loss(
    unit: Unit, weights: dict[str, Tensor], config: GHNTrainingConfig, source: ImageStream, step: int
) -> tuple[Tensor, dict[str, float]]:
    """Of the objectives `images` and `adapted`: their weighted sum, and its parts."""
    objective, subject = config.objective, unit.subject
    images, labels = source.batch(step, unit=unit.number)
    loss = images.new_zeros(())
    parts: dict[str, float] = {}
    if objective.images:
        logits = subject.logits(weights, images.expand(config.draws, *images.shape))
        entropy, parts = images_loss(logits, labels, config.cosine_weight)
        loss = loss + objective.images * entropy
    if objective.adapted:
        ahead = objective.steps_ahead(step, config.steps)
        batches = [source.batch(step, number, unit=unit.number) for number in range(ahead + 1)]
        entropy, found = adapted_loss(subject, weights, batches, objective)
        loss, parts = loss + objective.adapted * entropy, parts | found
    return loss, parts


def teacher_loss(
    ghn: GHN, unit: Unit, teachers: Teachers, config: GHNTrainingConfig, source: ImageStream, step: int
) -> tuple[Tensor, dict[str, float]]:
    """Of the objective `zoo`, for one collected network of the architecture."""
    name = unit.subject.name
    pick = _stream(config, "ghn-teacher", step, unit.number)
    number = int(torch.randint(teachers.count(name), (), generator=pick))
    code = teachers.code(name, number)
    (decoded,) = generate(ghn, [unit], [code[None]], anchor_at(config, ghn.config.anchor, step))
    images, _ = source.batch(step, unit=unit.number)
    loss, parts = zoo_loss(
        unit.subject, decoded, teachers.state(name, number), code, images, prior=config.objective.prior
    )
    return config.objective.zoo * loss, parts


def train_step(
    ghn: GHN, subjects: Mapping[int, Subject], config: GHNTrainingConfig, source: ImageStream, step: int,
    teachers: Teachers | None = None,
) -> list[tuple[float, dict[str, float]]]:  # fmt: skip
    """Loss and its parts for each of some units of a step, whose architectures are given by number of the unit.

    Their share of the gradient of the step is added to those of the GHN and of the codes of the teachers.
    """
    generated = bool(config.objective.images or config.objective.adapted)
    units = [Unit(number, each, _stream(config, "ghn-draw", step, number)) for number, each in subjects.items()]
    decoded: list[dict[str, Tensor]] = [{} for _ in units]
    if generated:
        codes = [torch.randn(config.draws, u.subject.codes, ghn.config.code, generator=u.draw) for u in units]
        decoded = generate(ghn, units, codes, anchor_at(config, ghn.config.anchor, step))
    leaves = [{name: value.detach().requires_grad_() for name, value in each.items()} for each in decoded]
    results = []
    for unit, weights in zip(units, leaves, strict=True):
        terms = [unit_loss(unit, weights, config, source, step)] if generated else []
        if config.objective.zoo and teachers is not None:
            terms.append(teacher_loss(ghn, unit, teachers, config, source, step))
        loss = torch.stack([term for term, _ in terms]).sum()
        (loss / config.meta_batch).backward()
        results.append((loss.item(), {name: value for _, parts in terms for name, value in parts.items()}))
    pass_back(decoded, leaves)
    return results


def pass_back(decoded: Sequence[Mapping[str, Tensor]], leaves: Sequence[Mapping[str, Tensor]]) -> None:
    """On into the GHN with the gradients that the detached weights have got; weights that nothing read have none."""
    reached: list[Tensor] = []
    slopes: list[Tensor] = []
    for values, own in zip(decoded, leaves, strict=True):
        for name, leaf in own.items():
            if leaf.grad is not None:
                reached.append(values[name])
                slopes.append(leaf.grad)
    if reached:
        torch.autograd.backward(reached, slopes)


def at_once(subjects: Mapping[int, Subject], draws: int) -> Iterator[dict[int, Subject]]:
    """Units in their order, as many together as have `NUMBERS_AT_ONCE` decoded weights, and at least one."""
    taken: dict[int, Subject] = {}
    for number, subject in subjects.items():
        if taken and draws * sum(each.plan.numel for each in (*taken.values(), subject)) > NUMBERS_AT_ONCE:
            yield taken
            taken = {}
        taken[number] = subject
    if taken:
        yield taken


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
    chosen = {}
    for unit in range(fabric.global_rank, config.meta_batch, fabric.world_size):
        choice = torch.randint(len(subjects), (), generator=_stream(config, "ghn-architecture", step, unit))
        chosen[unit] = subjects[int(choice)]
    values: dict[str, float] = {}
    for taken in at_once(chosen, config.draws):
        for loss, parts in train_step(ghn, taken, config, source, step, teachers):
            for name, value in {"loss": loss, **parts}.items():
                values[name] = values.get(name, 0.0) + value / config.meta_batch
    sum_gradients(fabric, [*ghn.parameters(), *(teachers.parameters() if teachers else ())])
    summed = total(fabric, torch.tensor(list(values.values()), dtype=torch.float64, device=ghn.device))
    means = dict(zip(values, summed.tolist(), strict=True))
    return means.pop("loss"), means
