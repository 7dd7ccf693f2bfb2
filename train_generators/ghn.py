"""Fit a graph hypernetwork: the loss of the networks that it generates, over many architectures.

Per step one architecture and one batch of images. The paper's objectives (arXiv 2310.16695):

    ghn         L = cross-entropy(a)
    noise-ghn   L = mean over two draws j of cross-entropy(a_j) + cosine_weight * cos(a_0, a_1)

with a_j all logits of draw j as one vector: the cosine pushes the draws apart. Every step takes its random streams from
(seed, step), so a training that was killed goes on from its last state and ends with the same bits.
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
import torch.nn.functional as F
from torch import Tensor, nn

from collect.architectures import build, parse
from collect.augmentation import Batches
from collect.data import ImageSet, load
from collect.durable import durable
from collect.provenance import versions
from collect.stacked import CALIBRATION_IMAGES, Form, choose, predict
from collect.zoo import Zoo
from generators.checkpoint import save
from generators.commandline import progress
from generators.errors import ConfigError
from generators.ghn.ghn import GHN, GHNConfig
from generators.ghn.plan import DecodePlan
from generators.initialiser import Proposal, Request
from generators.inventory import inventory
from generators.pointwise import HE
from generators.seeds import derive, stream
from generators.statistics import measure
from train_generators.tracking import Track, Tracker
from train_generators.training_state import load_state, save_state

log = logging.getLogger(__name__)

JUDGED_MEMBERS = 3  # members per architecture in an evaluation


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
        if self.cosine_weight and (self.draws < 2 or not (self.ghn.anchor or self.ghn.code)):
            raise ConfigError("cosine_weight needs draws of 2 or more, and an anchor or a code so that they differ")
        for name in (*self.architectures, *self.held_out):
            parse(name)  # a wrong name is found now, not at the first evaluation


NOISE = GHNTrainingConfig(
    name="noise-ghn", ghn=GHNConfig(anchor=0.6, code=8), draws=2, cosine_weight=0.05, steps=2500
)  # fmt: skip
"""The noise GHN's default: see docs/decisions.md for the weight of the cosine and the anchor."""


class Subject:
    """One architecture in training: how to run it, what to decode, and what the fallback gives."""

    def __init__(self, name: str, ghn: GHN, images: ImageSet, *, draws: int) -> None:
        classes = len(images.classes)
        module = build(parse(name), shape=images.shape, classes=classes)
        self.name = name
        self.form: Form = choose(name, shape=images.shape, classes=classes)
        self.plan: DecodePlan = ghn.plan(module, torch.zeros(1, *images.shape))
        proposal, request = Proposal(), Request(self.plan.found)
        for info in self.plan.found:
            if info.name in self.plan.left_out:
                HE.fill(proposal, info, request, because="not decoded")
        start = {name: value.detach() for name, value in module.named_parameters()} | proposal.values
        decoded = {name for group in self.plan.groups for name in group.names}
        self.fixed = {name: value.expand(draws, *value.shape) for name, value in start.items() if name not in decoded}
        self.buffers = {
            name: value.detach().expand(draws, *value.shape).clone() for name, value in module.named_buffers()
        }

    def logits(self, decoded: dict[str, Tensor], images: Tensor) -> Tensor:
        """Logits `[M, B, classes]` of M generated networks on images `[M, B, C, H, W]`, batch statistics."""
        return self.form(self.fixed | decoded, self.buffers, images, training=True)


def _training_architectures(config: GHNTrainingConfig, zoo: Zoo | None) -> tuple[str, ...]:
    names = config.architectures
    if not names and zoo is not None:
        names = tuple(sorted({str(run["architecture"]) for run in zoo.runs} - set(config.held_out)))
    if not names:
        raise ConfigError("no architectures to train on; name some (--architectures resnet-8-w8 vgg-3-w8) or a --zoo")
    return names


def objective(logits: Tensor, labels: Tensor, cosine_weight: float) -> tuple[Tensor, dict[str, float]]:
    """The loss of M draws and its parts.

    Args:
        logits: `[M, B, classes]`.
        labels: `[B]`.
        cosine_weight: weight of the mean cosine over pairs of draws, each draw's logits as one vector.
    """
    draws = len(logits)
    entropy = F.cross_entropy(logits.flatten(0, 1), labels.repeat(draws))
    parts = {"cross_entropy": entropy.item()}
    if draws < 2:
        return entropy, parts
    flat = F.normalize(logits.flatten(1), dim=1)
    cosine = ((flat @ flat.T).sum() - draws) / (draws * (draws - 1))
    parts["cosine"] = cosine.item()
    return entropy + cosine_weight * cosine if cosine_weight else entropy, parts


def zero_shot(ghn: GHN, name: str, images: ImageSet, split: str, *, members: int = JUDGED_MEMBERS) -> dict[str, float]:
    """Accuracy before any training of generated networks, batch-norm statistics from training images.

    Returns:
        `accuracy` (mean over members) and `disagreement` (share of images on which two members differ, mean of pairs).
    """
    module = build(parse(name), shape=images.shape, classes=len(images.classes))
    states = ghn.sample(module, members, seed=0, example_inputs=torch.zeros(1, *images.shape))
    part = getattr(images, split)
    logits = predict(
        name, states, part.images, shape=images.shape, classes=len(images.classes),
        calibration=images.train.images[:CALIBRATION_IMAGES],
    )  # fmt: skip
    votes = logits.argmax(dim=-1)
    pairs = [(i, j) for i in range(members) for j in range(i)]
    return {
        "accuracy": (votes == part.labels).float().mean().item(),
        "disagreement": sum((votes[i] != votes[j]).float().mean().item() for i, j in pairs) / max(len(pairs), 1),
    }


def variety(ghn: GHN, name: str, images: ImageSet) -> dict[str, float]:
    """Least stable rank, distinct share and both ends of the std ratio over the decoded tensors of one network."""
    module = build(parse(name), shape=images.shape, classes=len(images.classes))
    request = Request(inventory(module), example_inputs=torch.zeros(1, *images.shape))
    proposal = ghn.propose(module, request)
    spread = {group_name: group.target_std for group in ghn.plan(module, request.example_inputs).groups
              for group_name in group.names}  # fmt: skip
    rows = [measure(proposal.values[name], target) for name, target in spread.items()]
    return {
        "least_stable_rank": min(row.stable_rank for row in rows if row.rank_limit > 1),
        "least_distinct_share": min(row.distinct_share for row in rows),
        "least_std_ratio": min(row.std_ratio for row in rows),
        "greatest_std_ratio": max(row.std_ratio for row in rows),
    }


def _rate(config: GHNTrainingConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / max(config.warm_up * config.steps, 1.0))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


class ImageStream:
    """Batches of training images that depend on nothing but (seed, step)."""

    def __init__(self, images: ImageSet, config: GHNTrainingConfig) -> None:
        self.seed = config.seed
        self.batches = Batches(
            images, [0], batch_size=config.batch_size, augmentation=config.augmentation, device=torch.device("cpu")
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images `[B, C, H, W]` and labels `[B]` of one step: the first batch of an epoch of its own."""
        self.batches.reseed([derive(self.seed, "ghn-batch", step)])
        drawn, labels = next(self.batches.epoch())
        return drawn[0], labels[0]


def train_step(
    ghn: GHN, subject: Subject, config: GHNTrainingConfig, images: Tensor, labels: Tensor, step: int
) -> tuple[float, dict[str, float]]:
    """Loss of one step and its parts; the gradients are left in the GHN."""
    draw = stream(config.seed, "ghn-draw", step)
    nodes = len(subject.plan.table.features)
    codes = torch.randn(config.draws, nodes, config.ghn.code, generator=draw)
    anchor = config.ghn.anchor * min(1.0, step / max(config.anchor_warm_up * config.steps, 1.0))
    decoded = ghn.predict(subject.plan, codes, lambda _, shape: torch.randn(shape, generator=draw), anchor=anchor)
    logits = subject.logits(decoded, images.expand(config.draws, *images.shape))
    loss, parts = objective(logits, labels, config.cosine_weight)
    loss.backward()
    return loss.item(), parts


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
    optimiser = torch.optim.AdamW(ghn.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    facts = _facts(config, images)
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    folder = Path(out) / "training"
    done, recent = _resume(folder / "state.safetensors", fingerprint, ghn, optimiser)
    if not done:
        with durable(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(asdict(config), indent=1, sort_keys=True, default=str))
    tracker = Tracker(
        folder, track=track, project=project, config=facts,
        resumed_at=done or None,
    )  # fmt: skip
    bar = contextlib.nullcontext() if quiet else progress(f"training {config.name}", config.steps)
    source = ImageStream(images, config)
    with tracker, bar as shown:
        advance = on_step or (shown.advance if shown else lambda amount: None)
        advance(done)
        for step in range(done, config.steps):
            for group in optimiser.param_groups:
                group["lr"] = _rate(config, step)
            choice = torch.randint(len(subjects), (), generator=stream(config.seed, "ghn-architecture", step))
            drawn, labels = source.batch(step)
            optimiser.zero_grad()
            loss, parts = train_step(ghn, subjects[int(choice)], config, drawn, labels, step)
            nn.utils.clip_grad_norm_(ghn.parameters(), config.clip_norm)
            if not math.isfinite(loss):
                raise ConfigError(
                    f"{config.name}: the loss is not finite at step {step}; lower --lr (now {config.lr}) and give "
                    "another --out, since this one holds the state of this training"
                )
            optimiser.step()
            recent.append(parts.pop("cross_entropy"))
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
                    step + 1, cross_entropy=sum(recent) / len(recent), lr=_rate(config, step), **parts, **values
                )
                recent = []
            if (step + 1) % config.save_every == 0 or last:
                held = {"ghn": ghn.state_dict(), "optimiser": optimiser.state_dict()}
                save_state(
                    folder / "state.safetensors", held, {"step": step + 1, "fingerprint": fingerprint, "recent": recent}
                )
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


def _resume(path: Path, fingerprint: str, ghn: GHN, optimiser: torch.optim.Optimizer) -> tuple[int, list[float]]:
    """Load the saved state into `ghn` and `optimiser`; the steps done, and their losses since the last line of the log.

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
    ghn.load_state_dict(tensors["ghn"])
    optimiser.load_state_dict(tensors["optimiser"])
    log.info("going on from step %d", meta["step"])
    return meta["step"], meta["recent"]


def main(
    out: Path, zoo: Path | None = None, config: GHNTrainingConfig = GHNTrainingConfig(), *, track: Track = "none",
    project: str = "powerhouse",
) -> None:  # fmt: skip
    """Train a graph hypernetwork on the loss of the networks that it generates, and save it.

    Example: python -m train_generators ghn --architectures resnet-8-w8 vgg-3-w8 --held-out resnet-20-w12 --out runs/ghn

    Args:
        out: Folder of the checkpoint. Given again after a kill, the training goes on; use it with
            `python -m generators init --with OUT`.
        zoo: Folder of a zoo whose architectures to train on, if --architectures names none.
        config: How the GHN is trained.
        track: Also log to Weights & Biases; set WANDB_MODE=offline to do so without an account.
        project: The wandb project.
    """
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(1)
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
    out: Path, zoo: Path | None = None, config: GHNTrainingConfig = NOISE, *, track: Track = "none",
    project: str = "powerhouse",
) -> None:  # fmt: skip
    """Train a graph hypernetwork whose members differ (noise codes, anchors, two draws per step), and save it.

    Example: python -m train_generators noise-ghn --architectures resnet-8-w8 vgg-3-w8 --out runs/noise-ghn

    Args:
        out: Folder of the checkpoint. Given again after a kill, the training goes on.
        zoo: Folder of a zoo whose architectures to train on, if --architectures names none.
        config: How the GHN is trained.
        track: Also log to Weights & Biases; set WANDB_MODE=offline to do so without an account.
        project: The wandb project.
    """
    main(out, zoo, config, track=track, project=project)
