"""Fit a graph hypernetwork on the networks that it generates, over many architectures.

Per step one architecture and one batch of images; what for, `train_generators.objectives` says. Every step takes its
random streams from (seed, step), so a training that was killed goes on from its last state and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from collect.architectures import parse
from collect.data import ImageSet, load
from collect.durable import durable
from collect.forms import choose
from collect.provenance import versions
from collect.zoo import Zoo
from generators.checkpoint import save
from generators.commandline import progress
from generators.errors import ConfigError
from generators.ghn.ghn import GHN, GHNConfig
from generators.seeds import stream
from train_generators.judging import variety, zero_shot
from train_generators.objectives import Objective, Teachers, adapted_loss, images_loss, zoo_loss
from train_generators.subject import ImageStream, Subject
from train_generators.tracking import Track, Tracker
from train_generators.training_state import load_state, save_state

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GHNTrainingConfig:
    """Every choice of one GHN training; saved beside the checkpoint.

    Attributes:
        architectures: What the GHN is trained on, such as resnet-8-w8 vgg-3-w8; () takes those of the zoo.
        held_out: Architectures that are evaluated, on validation images, and never trained on.
        data: Data set, see `collect.data.load`.
        data_root: Where torchvision sets lie.
        steps: Optimiser steps, one architecture and one batch each.
        batch_size: Images per step.
        lr: Peak learning rate of AdamW: linear warm-up, then cosine to zero.
        warm_up: Share of the steps with rising learning rate.
        weight_decay: Of AdamW.
        clip_norm: Bound on the norm of the gradient.
        augmentation: Of the images: none, shift or flip-crop.
        draws: Members per step; the cosine needs two.
        anchor_warm_up: Share of the steps over which the anchor rises from 0 to its value: a GHN that meets all the
            noise at once stays at chance for long.
        cosine_weight: Weight of the cosine between the logits of two draws; 0 for a deterministic GHN.
        objective: What the GHN is trained for, see `train_generators.objectives`.
        log_every: Steps between lines of the log.
        evaluate_every: Steps between evaluations on the held-out architectures.
        save_every: Steps between saved training states.
        ghn: The shape of the GHN.
        name: What reports call it.
        seed: Root of all random streams.
    """

    architectures: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    data: str = "digits"
    data_root: Path | None = None
    steps: int = 2000
    batch_size: int = 64
    lr: float = 2e-3
    warm_up: float = 0.05
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    augmentation: Literal["none", "shift", "flip-crop"] = "none"
    draws: int = 1
    anchor_warm_up: float = 0.5
    cosine_weight: float = 0.0
    objective: Objective = field(default_factory=Objective)
    log_every: int = 50
    evaluate_every: int = 500
    save_every: int = 500
    ghn: GHNConfig = field(default_factory=GHNConfig)
    name: str = "ghn"
    seed: int = 0

    def __post_init__(self) -> None:
        both = set(self.architectures) & set(self.held_out)
        if both:
            raise ConfigError(f"{sorted(both)} are both trained on and held out; take them out of one list")
        if min(self.steps, self.draws, self.evaluate_every, self.save_every) < 1 or self.batch_size < 2:
            raise ConfigError("steps, draws and intervals must be at least 1, batch_size at least 2 (batch norm)")
        if self.cosine_weight and not self.objective.images:
            raise ConfigError("cosine_weight belongs to objective.images, whose weight is 0")
        if self.cosine_weight and (self.draws < 2 or not (self.ghn.anchor or self.ghn.code)):
            raise ConfigError("cosine_weight needs draws of 2 or more, and an anchor or a code so that they differ")
        for name in (*self.architectures, *self.held_out):
            parse(name)  # a wrong name is found now, not at the first evaluation


NOISE = GHNTrainingConfig(
    name="noise-ghn", ghn=GHNConfig(anchor=0.6, code=8), draws=2, cosine_weight=0.05, steps=2500
)  # fmt: skip
"""The noise GHN's default: see docs/decisions.md for the weight of the cosine and the anchor."""


def _training_architectures(config: GHNTrainingConfig, zoo: Zoo | None) -> tuple[str, ...]:
    names = config.architectures
    if not names and zoo is not None:
        names = tuple(sorted({str(run["architecture"]) for run in zoo.runs} - set(config.held_out)))
    if not names:
        raise ConfigError("no architectures to train on; name some (--architectures resnet-8-w8 vgg-3-w8) or a --zoo")
    return names


def _rate(config: GHNTrainingConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / max(config.warm_up * config.steps, 1.0))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def train_step(
    ghn: GHN, subject: Subject, config: GHNTrainingConfig, source: ImageStream, step: int,
    teachers: Teachers | None = None,
) -> tuple[float, dict[str, float]]:  # fmt: skip
    """Loss of one step and its parts; the gradients are left in the GHN, and in the codes of the teachers."""
    draw, objective = stream(config.seed, "ghn-draw", step), config.objective
    anchor = config.ghn.anchor * min(1.0, step / max(config.anchor_warm_up * config.steps, 1.0))

    def generate(codes: Tensor) -> dict[str, Tensor]:
        return ghn.predict(subject.plan, codes, lambda _, shape: torch.randn(shape, generator=draw), anchor=anchor)

    images, labels = source.batch(step)
    losses: list[Tensor] = []
    parts: dict[str, float] = {}
    if objective.images or objective.adapted:
        decoded = generate(torch.randn(config.draws, subject.codes, config.ghn.code, generator=draw))
    if objective.images:
        logits = subject.logits(decoded, images.expand(config.draws, *images.shape))
        loss, found = images_loss(logits, labels, config.cosine_weight)
        losses.append(objective.images * loss)
        parts |= found
    if objective.adapted:
        ahead = objective.steps_ahead(step, config.steps)
        batches = [source.batch(step, number) for number in range(ahead + 1)]
        loss, found = adapted_loss(subject, decoded, batches, objective)
        losses.append(objective.adapted * loss)
        parts |= found
    if objective.zoo and teachers is not None:
        pick = stream(config.seed, "ghn-teacher", step)
        number = int(torch.randint(teachers.count(subject.name), (), generator=pick))
        code = teachers.code(subject.name, number)
        loss, found = zoo_loss(
            subject, generate(code[None]), teachers.state(subject.name, number), code, images, prior=objective.prior
        )
        losses.append(objective.zoo * loss)
        parts |= found
    total = torch.stack(losses).sum()
    total.backward()
    return total.item(), parts


def fit(
    config: GHNTrainingConfig,
    out: str | Path,
    *,
    zoo: str | Path | Zoo | None = None,
    images: ImageSet | None = None,
    track: Track = "none",
    project: str = "powerhouse",
    quiet: bool = False,
    on_step: Callable[[float], object] | None = None,
) -> GHN:
    """Train the GHN and save it as a checkpoint in `out`. Called again after a kill, it goes on.

    Args:
        config: every choice of the training.
        out: folder of the checkpoint; `out/training` keeps the resolved configuration, the log and the state.
        zoo: where the architectures come from if the configuration names none.
        images: the data set, if it is loaded already.
        track: "wandb" logs to Weights & Biases too.
        project: the wandb project.
        quiet: no progress bar.
        on_step: called with numbers of steps done since the last call.

    Raises:
        ConfigError: nothing to train on, or `out` holds another training.
        DataError: the data set is not there.
    """
    opened = zoo if isinstance(zoo, Zoo) or zoo is None else Zoo(zoo)
    config = dataclasses.replace(config, architectures=_training_architectures(config, opened))
    if images is None:
        images = load(config.data, root=config.data_root)
    for name in config.held_out:  # one that does not fit the images is found now, not at the first evaluation
        choose(name, shape=images.shape, classes=len(images.classes))
    if opened is not None and (others := {str(run["data"]) for run in opened.runs} - {images.name, config.data}):
        log.warning(
            "the networks of the zoo were trained on %s, the image loss is that of %s: is --data right?",
            ", ".join(sorted(others)), images.name,
        )  # fmt: skip
    shape = dataclasses.replace(config.ghn, classes=len(images.classes), seed=config.seed)
    ghn = GHN(shape, name=config.name)
    subjects = [Subject(name, ghn, images, draws=config.draws) for name in config.architectures]
    widest = max(group.outputs for subject in subjects for group in subject.plan.groups)
    ghn.config = dataclasses.replace(shape, widest=widest)
    teachers = None
    groups: list[dict[str, Any]] = [{"params": list(ghn.parameters())}]
    if config.objective.zoo:
        if opened is None:
            raise ConfigError("objective.zoo needs the networks of a zoo: give one with --zoo")
        teachers = Teachers(opened, subjects, images, code=shape.code)
        groups.append({"params": list(teachers.parameters()), "weight_decay": 0.0})  # their prior pulls them to 0
    optimiser = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    facts = _facts(config, images)
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    folder = Path(out) / "training"
    held: dict[str, Any] = {"ghn": ghn, "optimiser": optimiser} | ({"teachers": teachers} if teachers else {})
    done, recent = _resume(folder / "state.safetensors", fingerprint, held)
    if not done:
        with durable(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(asdict(config), indent=1, sort_keys=True, default=str))
    tracker = Tracker(
        folder, track=track, project=project, config=facts,
        resumed_at=done or None,
    )  # fmt: skip
    bar = contextlib.nullcontext() if quiet else progress(f"training {config.name}", config.steps)
    source = ImageStream(
        images, batch_size=config.batch_size, augmentation=config.augmentation, seed=config.seed
    )  # fmt: skip
    with tracker, bar as shown:
        advance = on_step or (shown.advance if shown else lambda amount: None)
        advance(done)
        followed = "cross_entropy" if config.objective.images else "loss"
        for step in range(done, config.steps):
            for group in optimiser.param_groups:
                group["lr"] = _rate(config, step)
            choice = torch.randint(len(subjects), (), generator=stream(config.seed, "ghn-architecture", step))
            optimiser.zero_grad()
            loss, parts = train_step(ghn, subjects[int(choice)], config, source, step, teachers)
            nn.utils.clip_grad_norm_(ghn.parameters(), config.clip_norm)
            if not math.isfinite(loss):
                raise ConfigError(
                    f"{config.name}: the loss is not finite at step {step}; lower --lr (now {config.lr}) and give "
                    "another --out, since this one holds the state of this training"
                )
            optimiser.step()
            recent.append(parts.pop(followed, loss))
            advance(1)
            last = step + 1 == config.steps
            values: dict[str, Any] = {}
            if (step + 1) % config.evaluate_every == 0 or last:
                for name in config.held_out:
                    figures = zero_shot(ghn, name, images, "validation")
                    values |= {f"{name}/{key}": value for key, value in figures.items()}
                values |= variety(ghn, config.held_out[0] if config.held_out else config.architectures[0], images)
            if (step + 1) % config.log_every == 0 or values:
                tracker.log(
                    step + 1, **{followed: sum(recent) / len(recent)}, lr=_rate(config, step), **parts, **values
                )
                recent = []
            if (step + 1) % config.save_every == 0 or last:
                save_state(
                    folder / "state.safetensors", {name: each.state_dict() for name, each in held.items()},
                    {"step": step + 1, "fingerprint": fingerprint, "recent": recent},
                )  # fmt: skip
    judged = (*config.held_out, config.architectures[0])
    metrics: dict[str, Any] = {
        f"{name} (never trained on)" if name in config.held_out else name: {
            f"test {key} before training": value for key, value in zero_shot(ghn, name, images, "test").items()
        }
        for name in judged
    }
    ghn.card.update(facts, versions=versions(), metrics=metrics, variety=variety(ghn, judged[0], images))
    save(ghn.eval(), out)
    return ghn


def _facts(config: GHNTrainingConfig, images: ImageSet) -> dict[str, Any]:
    """What the card says besides the figures; also what a training must agree on to be resumed."""
    kind = "noise-ghn" if config.ghn.anchor or config.ghn.code else "ghn"
    summaries = {"ghn": "deterministic graph hypernetwork", "noise-ghn": "graph hypernetwork whose members differ"}
    training = asdict(config)
    del training["data_root"]  # where the data lie on this machine; which data, the digest says
    return {
        "kind": kind,
        "summary": summaries[kind],
        "paper": "arXiv 2310.16695",
        "licence": "Apache-2.0",
        "data": images.name,
        "data_digest": images.digest,
        "architectures": list(config.architectures),
        "held_out": list(config.held_out),
        "training": json.loads(json.dumps(training)),  # tuples as the checkpoint gives them back: lists
    }


def _resume(path: Path, fingerprint: str, held: dict[str, Any]) -> tuple[int, list[float]]:
    """Load the saved state into what is `held`; the steps done, and their losses since the last line of the log.

    Raises:
        ConfigError: the state belongs to another configuration or data set.
    """
    if not path.exists():
        return 0, []
    tensors, meta = load_state(path)
    if meta["fingerprint"] != fingerprint:
        raise ConfigError(
            f"{path.parent.parent} holds a training with another configuration or data set; "
            f"choose another folder, or delete {path} to start again"
        )
    for name, each in held.items():
        each.load_state_dict(tensors[name])
    log.info("going on from step %d", meta["step"])
    return meta["step"], meta["recent"]


def main(
    out: Path, zoo: Path | None = None, config: GHNTrainingConfig = GHNTrainingConfig(), *, encoder: str | None = None,
    decoder: str | None = None, track: Track = "none", project: str = "powerhouse",
) -> None:  # fmt: skip
    """Train a graph hypernetwork on the loss of the networks that it generates, and save it.

    Example: python -m train_generators ghn --architectures resnet-8-w8 vgg-3-w8 --held-out resnet-20-w12 --out runs/ghn

    Args:
        out: Folder of the checkpoint. Given again after a kill, the training goes on; use it with
            `python -m generators init --with OUT`.
        zoo: Folder of a zoo whose architectures to train on, if --architectures names none.
        config: How the GHN is trained.
        encoder: sparse, transformer (GHN-3) or gated (GHN-2), in place of --ghn.encoder.
        decoder: core, coordinate, block (GHN-2 and GHN-3) or fan-in-block (the same, spread free), in place of
            --ghn.decoder.
        track: Also log to Weights & Biases; set WANDB_MODE=offline to do so without an account.
        project: The wandb project.
    """
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(1)
    shape = dataclasses.replace(
        config.ghn, encoder=encoder or config.ghn.encoder, decoder=decoder or config.ghn.decoder
    )  # fmt: skip
    config = dataclasses.replace(config, ghn=shape)
    ghn = fit(config, out, zoo=zoo, track=track, project=project)
    table = Table(
        "architecture", "test accuracy before training", "disagreement of members", title=f"{ghn.name}: {out}"
    )
    for name, row in ghn.card["metrics"].items():
        table.add_row(
            name,
            f"{row['test accuracy before training']:.1%}",
            f"{row['test disagreement before training']:.1%}",
        )
    Console().print(table)


def main_noise(
    out: Path, zoo: Path | None = None, config: GHNTrainingConfig = NOISE, *, encoder: str | None = None,
    decoder: str | None = None, track: Track = "none", project: str = "powerhouse",
) -> None:  # fmt: skip
    """Train a graph hypernetwork whose members differ (noise codes, anchors, two draws per step), and save it.

    Example: python -m train_generators noise-ghn --architectures resnet-8-w8 vgg-3-w8 --out runs/noise-ghn

    Args:
        out: Folder of the checkpoint. Given again after a kill, the training goes on.
        zoo: Folder of a zoo whose architectures to train on, if --architectures names none.
        config: How the GHN is trained.
        encoder: sparse, transformer (GHN-3) or gated (GHN-2), in place of --ghn.encoder.
        decoder: core, coordinate, block (GHN-2 and GHN-3) or fan-in-block (the same, spread free), in place of
            --ghn.decoder.
        track: Also log to Weights & Biases; set WANDB_MODE=offline to do so without an account.
        project: The wandb project.
    """
    main(out, zoo, config, encoder=encoder, decoder=decoder, track=track, project=project)
