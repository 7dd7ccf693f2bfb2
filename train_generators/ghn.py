"""Fit a graph hypernetwork on the networks that it generates, over many architectures.

What for, `train_generators.objectives` says; `train_generators.ghn_step` makes one step. Every step takes its random
streams from (seed, step), so a training that was killed goes on from its last state and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn

from collect.data import ImageSet, load
from collect.durable import durable
from collect.zoo import Zoo
from generators import checkpoint
from generators.commandline import progress
from generators.errors import CheckpointError, ConfigError
from generators.ghn.ghn import GHN
from train_generators.architectures import resolve
from train_generators.ghn_config import DETERMINISTIC, NOISE, GHNTrainingConfig, facts
from train_generators.ghn_step import gradients
from train_generators.judging import figures, models, table, variety, zero_shot
from train_generators.objectives import Teachers
from train_generators.processes import Device, join
from train_generators.subject import ImageStream, Subject
from train_generators.tracking import Track, Tracker
from train_generators.training_state import load_state, save_state

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)


def _rate(config: GHNTrainingConfig, step: int) -> float:
    warm = min(1.0, (step + 1) / max(config.warm_up * config.steps, 1.0))
    return config.lr * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def _first(config: GHNTrainingConfig, classes: int) -> GHN:
    """The GHN before its first step: a new one, or the one to start from.

    Raises:
        ConfigError: the one to start from does not fit the configuration or the data.
    """
    if not config.start:
        return GHN(dataclasses.replace(config.ghn, classes=classes, seed=config.seed), name=config.name)
    ghn = checkpoint.load(config.start)
    if not isinstance(ghn, GHN):
        raise ConfigError(f"start: {config.start} holds a {ghn.kind_name}, not a GHN")
    if config.ghn not in (DETERMINISTIC.ghn, NOISE.ghn):
        raise ConfigError(f"start: the shape of the GHN comes with {config.start}; leave --ghn.* alone")
    if ghn.config.classes != classes:
        raise ConfigError(
            f"start: {config.start} makes classifiers of {ghn.config.classes} classes, the data set has {classes}"
        )
    if config.cosine_weight and ghn.kind_name == "ghn":
        raise ConfigError(f"start: members of {config.start} are equal, so there is no cosine; --cosine-weight 0")
    ghn.name = config.name
    return ghn.train()


def _judge(ghn: GHN, config: GHNTrainingConfig, images: ImageSet) -> dict[str, Any]:
    """Figures of the log: held-out architectures on validation images, and how varied the weights are."""
    values: dict[str, Any] = {}
    for name in config.held_out:
        found = zero_shot(ghn, name, images, "validation")
        values |= {f"{name}/{key}": value for key, value in found.items()}
    return values | variety(ghn, (*config.held_out, *config.architectures)[0], images)


def _warn_of_collapse(ghn: GHN) -> None:
    """Say now what `checkpoint.save` would refuse at the end, as far as the probe models show it."""
    try:
        checkpoint.check_spectrum(ghn)
    except CheckpointError as error:
        log.warning("if nothing changes, it will not be saved: %s", error)


def fit(
    config: GHNTrainingConfig,
    out: str | Path,
    *,
    zoo: str | Path | Zoo | None = None,
    images: ImageSet | None = None,
    fabric: Fabric | None = None,
    track: Track = "none",
    project: str = "powerhouse",
    quiet: bool = False,
    on_step: Callable[[float], object] | None = None,
) -> GHN:
    """Train the GHN and save it as a checkpoint in `out`. Called again after a kill, it goes on.

    Args:
        config: every choice of the training.
        out: folder of the checkpoint, which all processes see; `out/training` keeps the resolved configuration, the log
            and the state.
        zoo: where the architectures come from if the configuration names none, and the teachers of `objective.zoo`.
        images: the data set, if it is loaded already.
        fabric: processes, device and precision of the training, see `train_generators.processes.join`; by default this
            process on its CPU, in the precision of the configuration.
        track: "wandb" logs to Weights & Biases too.
        project: the wandb project.
        quiet: no progress bar.
        on_step: called with numbers of steps done since the last call.

    Returns:
        The GHN, on the CPU and in evaluation mode.

    Raises:
        ConfigError: nothing to train on, fewer units in a step than processes, or `out` holds another training.
        DataError: the data set is not there.
        CheckpointError: what was trained has collapsed: a matrix for one of its architectures has hardly any rank.
    """
    fabric = fabric or join("cpu", precision=config.precision)
    if config.meta_batch % fabric.world_size:
        raise ConfigError(
            f"{fabric.world_size} processes cannot share {config.meta_batch} architectures per step evenly; give a "
            f"--meta-batch that is a multiple of {fabric.world_size}"
        )
    opened = zoo if isinstance(zoo, Zoo) or zoo is None else Zoo(zoo)
    if images is None:
        images = load(config.data, root=config.data_root)
    config = resolve(config, opened, images)
    if opened is not None and (others := {str(run["data"]) for run in opened.runs} - {images.name, config.data}):
        log.warning(
            "the networks of the zoo were trained on %s, the image loss is that of %s: is --data right?",
            ", ".join(sorted(others)), images.name,
        )  # fmt: skip
    ghn = _first(config, len(images.classes)).to(fabric.device)
    start_digest, ghn.digest = ghn.digest, ""  # what is trained on is no longer what was loaded
    if config.ghn.met:
        raise ConfigError("ghn.met is what a training finds out; leave it alone")
    met = ghn.config.met
    ghn.config = dataclasses.replace(ghn.config, met=())  # all that it is trained on is decoded
    config = dataclasses.replace(config, ghn=ghn.config)
    subjects = [
        Subject(name, ghn, images, draws=config.draws, autocast=fabric.autocast) for name in config.architectures
    ]
    widest = max(group.outputs for subject in subjects for group in subject.plan.groups)
    if met or not config.start:  # else what it had met before is not known
        met = tuple(sorted({*met, *(sort for subject in subjects for sort in subject.sorts)}))
    ghn.config = dataclasses.replace(ghn.config, widest=max(widest, ghn.config.widest), met=met)
    held: dict[str, Any] = {"ghn": ghn}
    groups: list[dict[str, Any]] = [{"params": list(ghn.parameters())}]
    teachers = None
    if config.objective.zoo:
        if opened is None:
            raise ConfigError("objective.zoo needs the networks of a zoo: give one with --zoo")
        teachers = Teachers(opened, subjects, images, code=ghn.config.code).to(fabric.device)
        groups.append({"params": list(teachers.parameters()), "weight_decay": 0.0})  # their prior pulls them to 0
        held["teachers"] = teachers
    held["optimiser"] = optimiser = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    card = facts(config, images, start_digest=start_digest, zoo=teachers.digest if teachers else None)
    fingerprint = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
    folder = Path(out) / "training"
    done, recent = _resume(folder / "state.safetensors", fingerprint, held)
    source = ImageStream(
        images, batch_size=config.batch_size, augmentation=config.augmentation, seed=config.seed, device=fabric.device
    )  # fmt: skip
    followed = "cross_entropy" if config.objective.images else "loss"
    first = fabric.is_global_zero  # the process that writes
    with contextlib.ExitStack() as stack:
        advance = on_step or (lambda amount: None)
        if first:
            if not done:
                with durable(folder / "config.json") as temporary:
                    temporary.write_text(json.dumps(asdict(config), indent=1, sort_keys=True, default=str))
            tracker = Tracker(folder, track=track, project=project, config=card, resumed_at=done or None)
            stack.enter_context(tracker)
            if not (quiet or on_step):
                advance = stack.enter_context(progress(f"training {config.name}", config.steps)).advance
        advance(done)
        for step in range(done, config.steps):
            for group in optimiser.param_groups:
                group["lr"] = _rate(config, step)
            optimiser.zero_grad()
            loss, parts = gradients(fabric, ghn, subjects, config, source, step, teachers)
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
            if not first:
                continue
            values = _judge(ghn, config, images) if (step + 1) % config.evaluate_every == 0 or last else {}
            if values and not last:
                _warn_of_collapse(ghn)
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
    if first:
        ghn.card = card | figures(ghn, config.held_out, config.architectures, images)
        examined = models((*config.architectures, *config.held_out), images)
        checkpoint.save(ghn.cpu().eval(), out, examined=examined)
    fabric.barrier()
    return ghn.cpu().eval()


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


@dataclass(frozen=True)
class Launch:
    """Where a GHN is trained, and what is kept of it."""

    out: Path
    """Folder of the checkpoint, for `python -m generators init --with OUT`. Given again after a kill, the training
    goes on."""
    zoo: Path | None = None
    """Folder of a zoo: its architectures are trained on if no others are given; --objective.zoo fits its networks."""
    encoder: str | None = None
    """sparse, transformer (GHN-3) or gated (GHN-2), in place of --ghn.encoder."""
    decoder: str | None = None
    """core, coordinate, block (GHN-2 and GHN-3) or fan-in-block (the same, spread free), in place of --ghn.decoder."""
    device: Device = "auto"
    """auto (a GPU per process if there are any), cpu or cuda. `torchrun --nproc-per-node N -m train_generators ...`
    trains with N processes, which share --meta-batch."""
    track: Track = "none"
    """Also log to Weights & Biases; set WANDB_MODE=offline to do so without an account."""
    project: str = "powerhouse"
    """The wandb project."""


def main(launch: Launch, config: GHNTrainingConfig = DETERMINISTIC) -> None:
    """Train a graph hypernetwork on the loss of the networks that it generates, and save it.

    Example: python -m train_generators ghn --architectures resnet-8-w8 vgg-3-w8 --held-out resnet-20-w12 --out runs/ghn
    """
    torch.set_num_threads(1)  # operations are small: more threads wait for each other
    shape = dataclasses.replace(
        config.ghn, encoder=launch.encoder or config.ghn.encoder, decoder=launch.decoder or config.ghn.decoder
    )  # fmt: skip
    config = dataclasses.replace(config, ghn=shape)
    fabric = join(launch.device, precision=config.precision)
    ghn = fit(config, launch.out, zoo=launch.zoo, fabric=fabric, track=launch.track, project=launch.project)
    if fabric.is_global_zero:
        Console().print(table(ghn.card, title=f"{ghn.name}: {launch.out}"))


def main_noise(launch: Launch, config: GHNTrainingConfig = NOISE) -> None:
    """Train a graph hypernetwork whose members differ (noise codes, and white noise in every weight), and save it.

    Example: python -m train_generators noise-ghn --architectures resnet-8-w8 vgg-3-w8 --out runs/noise-ghn
    """
    main(launch, config)
