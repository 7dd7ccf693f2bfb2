"""The training of a GHN as a whole: what its steps work on, one step of the optimiser, and the state that is kept."""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from collect.data import ImageSet
from collect.zoo import Zoo
from generators import checkpoint
from generators.errors import ConfigError
from generators.ghn.config import GHNConfig
from generators.ghn.ghn import GHN
from generators.statistics import is_finite
from train_generators.ghn_config import DETERMINISTIC, NOISE, GHNTrainingConfig, differences, facts
from train_generators.ghn_step import gradients
from train_generators.objectives import Teachers
from train_generators.subject import ImageStream, Subject
from train_generators.training_state import load_state, save_state

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """What the steps of a training work on.

    Attributes:
        config: with all that the zoo, the data and the start decide.
        fabric: processes, device and precision.
        images: the data set.
        ghn: what is trained.
        subjects: the architectures.
        teachers: the networks of a zoo, if they are fitted.
        optimiser: of the GHN and of the codes of the teachers.
        source: the batches of images.
        card: see `facts`.
        state: file of the saved state.
    """

    config: GHNTrainingConfig
    fabric: Fabric
    images: ImageSet
    ghn: GHN
    subjects: list[Subject]
    teachers: Teachers | None
    optimiser: torch.optim.Optimizer
    source: ImageStream
    card: dict[str, Any]
    state: Path

    @property
    def held(self) -> dict[str, Any]:
        """What a saved state holds, by name."""
        codes = {"teachers": self.teachers} if self.teachers else {}
        return {"ghn": self.ghn, **codes, "optimiser": self.optimiser}

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.fabric.is_global_zero


def rate(config: GHNTrainingConfig, step: int) -> float:
    """The learning rate of a step."""
    warm = min(1.0, (step + 1) / max(config.warm_up * config.steps, 1.0))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def _first(config: GHNTrainingConfig, classes: int) -> GHN:
    """The GHN before its first step: a new one, or the one to start from.

    Raises:
        ConfigError: the one to start from does not fit the configuration or the data.
    """
    if not config.start:
        for name, given, own, way_out in (
            ("seed", config.ghn.seed, config.seed, "--seed sets it"),
            ("classes", config.ghn.classes, classes, "the data set sets it"),
        ):
            if given not in (getattr(GHNConfig, name), own):
                raise ConfigError(f"ghn.{name} is {given}, but the GHN gets {own}: leave --ghn.{name} alone; {way_out}")
        return GHN(dataclasses.replace(config.ghn, classes=classes, seed=config.seed), name=config.name)
    ghn = checkpoint.load(config.start)
    if not isinstance(ghn, GHN):
        raise ConfigError(f"start: {config.start} holds a {ghn.kind_name}, not a GHN")
    if config.ghn not in (DETERMINISTIC.ghn, NOISE.ghn):
        raise ConfigError(
            f"start: the shape of the GHN comes with {config.start}; leave --ghn.*, --encoder and --decoder alone"
        )
    if ghn.config.classes != classes:
        raise ConfigError(
            f"start: {config.start} makes classifiers of {ghn.config.classes} classes, the data set has {classes}"
        )
    if config.cosine_weight and ghn.kind_name == "ghn":
        raise ConfigError(f"start: members of {config.start} are equal, so there is no cosine; --cosine-weight 0")
    ghn.name = config.name
    return ghn.train()


def _acquaint(ghn: GHN, subjects: list[Subject], met: tuple[str, ...] | None) -> None:
    """Note in the GHN what it meets in the training, besides the sorts of layers it had `met`; None if not known."""
    widest = max(subject.plan.widest for subject in subjects)
    if met is not None:
        met = tuple(sorted({*met, *(sort for subject in subjects for sort in subject.sorts)}))
    ghn.config = dataclasses.replace(ghn.config, widest=max(widest, ghn.config.widest), met=met or ())


def _teachers(
    config: GHNTrainingConfig, ghn: GHN, subjects: list[Subject], zoo: Zoo | None, images: ImageSet
) -> Teachers | None:
    if not config.objective.zoo:
        return None
    if zoo is None:
        raise ConfigError("objective.zoo needs the networks of a zoo: give one with --zoo")
    return Teachers(zoo, subjects, images, code=ghn.config.code).to(ghn.device)


def _optimiser(config: GHNTrainingConfig, ghn: GHN, teachers: Teachers | None) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": list(ghn.parameters())}]
    if teachers is not None:
        groups.append({"params": list(teachers.parameters()), "weight_decay": 0.0})  # their prior pulls them to 0
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


def prepare(config: GHNTrainingConfig, state: Path, *, zoo: Zoo | None, images: ImageSet, fabric: Fabric) -> Training:
    """All that a training needs before its first step. Nothing is written.

    Args:
        config: with its architectures by name.
        state: file of the saved state.
        zoo: the networks of `objective.zoo`.
        images: the data set.
        fabric: processes, device and precision.

    Raises:
        ConfigError: the start or the zoo does not fit the configuration or the data.
    """
    ghn = _first(config, len(images.classes)).to(fabric.device)
    start_digest, ghn.digest = ghn.digest, ""  # what is trained on is no longer what was loaded
    if config.ghn.met:
        raise ConfigError("ghn.met is what a training finds out; leave it alone")
    met = None if config.start and not ghn.config.met else ghn.config.met
    ghn.config = dataclasses.replace(ghn.config, met=())  # all that it is trained on is decoded
    config = dataclasses.replace(config, ghn=ghn.config)
    subjects = [
        Subject(name, ghn, images, draws=config.draws, autocast=fabric.autocast) for name in config.architectures
    ]
    _acquaint(ghn, subjects, met)
    teachers = _teachers(config, ghn, subjects, zoo, images)
    source = ImageStream(
        images, batch_size=config.batch_size, augmentation=config.augmentation, seed=config.seed, device=fabric.device
    )  # fmt: skip
    card = facts(config, images, start_digest=start_digest, zoo=teachers.digest if teachers else None)
    optimiser = _optimiser(config, ghn, teachers)
    return Training(config, fabric, images, ghn, subjects, teachers, optimiser, source, card, state)


def optimise(training: Training, step: int) -> dict[str, float]:
    """One step of the optimiser; the loss and its parts before it.

    Raises:
        ConfigError: the loss or the gradient is not finite; no weight has changed then.
    """
    config, optimiser = training.config, training.optimiser
    for group in optimiser.param_groups:
        group["lr"] = rate(config, step)
    optimiser.zero_grad()
    loss, parts = gradients(
        training.fabric, training.ghn, training.subjects, config, training.source, step, training.teachers
    )
    norm = nn.utils.clip_grad_norm_(training.ghn.parameters(), config.clip_norm)
    if not math.isfinite(loss):
        raise _diverged(training, "loss", step)
    if not (math.isfinite(norm) and _finite_gradient(training.teachers)):
        raise _diverged(training, "gradient", step)
    optimiser.step()
    return {"loss": loss, **parts}


def _finite_gradient(teachers: Teachers | None) -> bool:
    """Of the codes, whose gradient is not clipped."""
    found = [value.grad for value in teachers.parameters() if value.grad is not None] if teachers else []
    return all(is_finite(gradient) for gradient in found)


def _diverged(training: Training, what: str, step: int) -> ConfigError:
    config, objective = training.config, training.config.objective
    ways = [f"--lr (now {config.lr})"]
    if objective.adapted:
        ways += [f"--objective.inner-lr ({objective.inner_lr})", f"--objective.horizon ({objective.horizon})"]
    saved = ", and give another --out, since this one holds the state of this training"
    return ConfigError(
        f"{config.name}: the {what} is not finite at step {step}; lower {' or '.join(ways)}"
        f"{saved if training.state.exists() else ''}"
    )


def keep(training: Training, done: int, recent: list[dict[str, float]]) -> None:
    """Save the state after `done` steps, with the losses since the last line of the log."""
    tensors = {name: each.state_dict() for name, each in training.held.items()}
    save_state(training.state, tensors, {"step": done, "card": training.card, "recent": recent})


def resume(training: Training) -> tuple[int, list[dict[str, float]]]:
    """Load the saved state if there is one; the steps done, and the losses since the last line of the log.

    Raises:
        ConfigError: the state belongs to another configuration or data set.
    """
    path = training.state
    if not path.exists():
        return 0, []
    tensors, meta = load_state(path)
    way_out = f"choose another folder, or delete {path} to start again"
    if "card" not in meta:
        raise ConfigError(
            f"{path.parent.parent} holds a training that an earlier version of the package began; finish it with "
            f"that version, {way_out}"
        )
    if apart := differences(meta["card"], training.card):
        raise ConfigError(
            f"{path.parent.parent} holds a training with another configuration or data set ({'; '.join(apart)}); "
            f"{way_out}"
        )
    for name, each in training.held.items():
        each.load_state_dict(tensors[name])
    log.info("going on from step %d", meta["step"])
    return meta["step"], meta["recent"]
