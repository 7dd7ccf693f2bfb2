"""Fit a graph hypernetwork on the networks that it generates, over many architectures.

What for, `train_generators.objectives` says; `train_generators.ghn_training` makes the steps. Every step takes its
random streams from (seed, step), so a training that was killed goes on from its last state and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from collect.data import ImageSet, load
from collect.durable import durable
from collect.zoo import Zoo
from generators import checkpoint
from generators.commandline import progress
from generators.errors import CheckpointError, ConfigError
from generators.ghn.ghn import GHN
from train_generators.architectures import resolve
from train_generators.ghn_config import DETERMINISTIC, NOISE, GHNTrainingConfig
from train_generators.ghn_training import Training, keep, optimise, prepare, rate, resume
from train_generators.judging import figures, models, table, variety, zero_shot
from train_generators.processes import Device, join
from train_generators.tracking import Track, Tracker

if TYPE_CHECKING:
    from lightning_fabric import Fabric

log = logging.getLogger(__name__)


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


def _warn_of_other_data(zoo: Zoo | None, config: GHNTrainingConfig, images: ImageSet) -> None:
    if zoo is not None and (others := {str(run["data"]) for run in zoo.runs} - {images.name, config.data}):
        log.warning(
            "the networks of the zoo were trained on %s, the image loss is that of %s: is --data right?",
            ", ".join(sorted(others)), images.name,
        )  # fmt: skip


def _line(recent: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over steps of the parts of the loss, and of the loss itself where it is not the one cross-entropy."""
    means = {name: sum(values[name] for values in recent) / len(recent) for name in recent[-1]}
    if means.keys() == {"loss", "cross_entropy"}:
        del means["loss"]
    return means


@contextlib.contextmanager
def _recorded(training: Training, *, track: Track, project: str, resumed_at: int | None) -> Iterator[Tracker | None]:
    """The log of the training, beside its resolved configuration; None in a process that does not write."""
    if not training.writes:
        yield None
        return
    config, folder = training.config, training.state.parent
    with durable(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(asdict(config), indent=1, sort_keys=True, default=str))
    with Tracker(folder, track=track, project=project, config=training.card, resumed_at=resumed_at) as tracker:
        yield tracker


def _record(training: Training, tracker: Tracker, done: int, recent: list[dict[str, float]]) -> list[dict[str, float]]:
    """Evaluate, log and save where the configuration says so; the losses that are still to be logged."""
    config = training.config
    last = done == config.steps
    values = _judge(training.ghn, config, training.images) if done % config.evaluate_every == 0 or last else {}
    if values and not last:
        _warn_of_collapse(training.ghn)
    if done % config.log_every == 0 or values:
        tracker.log(done, **_line(recent), lr=rate(config, done - 1), **values)
        recent = []
    if done % config.save_every == 0 or last:
        keep(training, done, recent)
    return recent


def _save(training: Training, out: str | Path) -> None:
    """The checkpoint, with the figures that are measured now."""
    ghn, config, images = training.ghn, training.config, training.images
    ghn.card = training.card | figures(ghn, config.held_out, config.architectures, images)
    examined = models((*config.architectures, *config.held_out), images)
    checkpoint.save(ghn.cpu().eval(), out, examined=examined)


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
        ConfigError: nothing to train on, settings that would be ignored, fewer units in a step than processes, `out`
            holds another training, or the loss or its gradient is not finite.
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
    _warn_of_other_data(opened, config, images)
    training = prepare(config, Path(out) / "training" / "state.safetensors", zoo=opened, images=images, fabric=fabric)
    done, recent = resume(training)
    with contextlib.ExitStack() as stack:
        advance = on_step or (lambda amount: None)
        tracker = stack.enter_context(_recorded(training, track=track, project=project, resumed_at=done or None))
        if training.writes and not (quiet or on_step):
            advance = stack.enter_context(progress(f"training {config.name}", config.steps)).advance
        advance(done)
        for step in range(done, config.steps):
            recent.append(optimise(training, step))
            advance(1)
            if tracker is not None:
                recent = _record(training, tracker, step + 1, recent)
    if training.writes:
        _save(training, out)
    fabric.barrier()
    return training.ghn.cpu().eval()


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
