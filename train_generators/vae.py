"""Fit one slice model per weight group on the trained kernels of a zoo: local generators of every kind.

What the card says of a group is measured on networks that had no part in the fit. Every step draws its batch from a
stream of its own, so a fit that was killed goes on from its last state and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from collect.durable import durable
from collect.provenance import versions
from collect.zoo import Zoo
from generators.checkpoint import save
from generators.commandline import progress
from generators.errors import CollapseError, ConfigError
from generators.local.generator import SLICE_MODELS, LocalGenerator
from train_generators.tracking import Track, Tracker
from train_generators.training_state import load_state, save_state
from train_generators.vae_config import VAEConfig
from train_generators.vae_data import FitData, open_data
from train_generators.vae_group import finish, steps

log = logging.getLogger(__name__)

LOG_EVERY = 50  # steps
DEFAULT = VAEConfig()


def fit(
    zoo: str | Path | Zoo,
    config: VAEConfig,
    out: str | Path,
    *,
    track: Track = "none",
    project: str = "powerhouse",
    quiet: bool = False,
    on_step: Callable[[float], object] | None = None,
) -> LocalGenerator:
    """Fit the slice models and save the generator as a checkpoint in `out`. Called again after a kill, it goes on.

    Args:
        zoo: folder of a zoo, or an opened one (or a view of it); or a folder of `.npy` kernels
            (`train_generators.slice_folder`).
        config: how.
        out: folder of the checkpoint; `out/training` keeps the resolved configuration, the log and the state.
        track: "wandb" logs to Weights & Biases too.
        project: the wandb project.
        quiet: no progress bar.
        on_step: called with numbers of steps done since the last call; over the whole fit they add up to
            `config.steps` (all groups count as one).

    Returns:
        The generator. `card["metrics"][group]` holds what `judge` measured.

    Raises:
        ZooError: the zoo cannot be read or holds nothing to fit; DataError for a collection of kernels.
        CollapseError: a group has collapsed; the message names it and the figures.
        ConfigError: `out` holds another training.
    """
    started = time.process_time()
    material = open_data(zoo, config)
    groups = material.groups
    generator = LocalGenerator(config.generator(tuple(map(str, groups))), name=config.name)
    facts = _facts(material, config)
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    folder = Path(out) / "training"
    state, meta = _resume(folder / "state.safetensors", fingerprint)
    done, metrics = meta["step"], meta["metrics"]
    if state:
        generator.load_state_dict(state["generator"])
    else:
        with durable(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(asdict(config), indent=1, sort_keys=True))

    bar = contextlib.nullcontext() if quiet else progress(f"fitting {generator.name}", config.steps * len(groups))
    tracker = Tracker(folder, track=track, project=project, config=asdict(config), resumed_at=done or None)
    with _forgotten_if_collapsed(folder / "state.safetensors"), tracker, bar as shown:
        share = 1 / len(groups) if on_step else 1.0
        advance = on_step or (shown.advance if shown else lambda amount: None)
        advance(done * share)
        for index, (key, data) in enumerate(groups.items()):
            before = index * config.steps
            if done >= before + config.steps:
                continue
            model = generator.model(key)
            optimiser = torch.optim.Adam(model.parameters(), fused=True)
            if done > before:
                optimiser.load_state_dict(state["optimiser"])
            else:
                model.standardise(data.train.in_ram())
            for step, parts in steps(model, data, optimiser, config, first=max(done - before, 0)):
                advance(share)
                if step % LOG_EVERY == 0 or step == config.steps:
                    values = {name: value.mean().item() for name, value in parts.items()}
                    if not math.isfinite(values["loss"]):
                        raise CollapseError(f"weight group {key}: the loss is not finite at step {step}; lower --lr")
                    tracker.log(before + step, group=str(key), **values)
                if step == config.steps:
                    metrics[str(key)] = finish(key, model, data, config)
                if step % config.save_every == 0 or step == config.steps:
                    held = {"generator": generator.state_dict(), "optimiser": optimiser.state_dict()}
                    saved = {
                        "step": before + step, "metrics": metrics, "fingerprint": fingerprint,
                        "cpu_seconds": meta["cpu_seconds"] + time.process_time() - started,
                    }  # fmt: skip
                    save_state(folder / "state.safetensors", held, saved)
    generator.card.update(facts, versions=versions(), metrics=metrics)
    save(generator.eval(), out)
    return generator


@contextlib.contextmanager
def _forgotten_if_collapsed(state: Path) -> Iterator[None]:
    """A fit that has collapsed is none to go on with: its state is deleted, so that other settings can be tried."""
    try:
        yield
    except CollapseError:
        state.unlink(missing_ok=True)
        raise


def _facts(material: FitData, config: VAEConfig) -> dict[str, Any]:
    """What the card says besides the figures; also what a training must agree on to be resumed."""
    model = SLICE_MODELS[config.kind]
    return {
        "kind": config.kind,
        "summary": model.summary,
        "paper": model.paper,
        "licence": "Apache-2.0",
        **material.facts,
        "training": asdict(config),
        "skipped_groups": material.skipped,
    }


def _resume(path: Path, fingerprint: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The saved tensors and facts of the training, or those of one that has not begun.

    Raises:
        ConfigError: the state belongs to other data or another configuration.
    """
    if not path.exists():
        return {}, {"step": 0, "metrics": {}, "cpu_seconds": 0.0}
    tensors, meta = load_state(path)
    meta.setdefault("cpu_seconds", 0.0)  # states of earlier versions do not say
    if meta["fingerprint"] != fingerprint:
        raise ConfigError(
            f"{path.parent.parent} holds a training with another configuration or zoo; "
            f"choose another folder, or delete {path} to start again"
        )
    log.info("going on from step %d", meta["step"])
    return tensors, meta


def _table(generator: LocalGenerator) -> Table:
    """What was measured per group, for the screen."""
    metrics = generator.card["metrics"]
    held_out = all(row["held_out_runs"] for row in metrics.values())
    table = Table(
        title=f"{generator.name}, measured on networks {'not ' if held_out else ''}fitted on",
        caption="covariance error: of samples/white noise/the training networks\n"
        "told apart, AUROC: samples/white noise/a normal of the same covariance",
    )
    for heading in ("weight group", "active", "2nd moment", "covariance error", "told apart"):
        table.add_column(heading, no_wrap=True)
    for key, row in metrics.items():
        errors = "/".join(f"{row[f'covariance_error{of}']:.2f}" for of in ("", "_white", "_train"))
        told = "/".join(f"{row[f'auroc{of}']:.2f}" for of in ("", "_he", "_normal") if f"auroc{of}" in row)
        used = f"{row['active_units']}/{row['latent_units']}"
        table.add_row(key, used, f"{row['second_moment_ratio']:.2f}", errors, told)
    return table


def main(
    zoo: Path, out: Path, config: VAEConfig = DEFAULT, *, track: Track = "none", project: str = "powerhouse"
) -> None:  # fmt: skip
    """Fit one slice model per weight group on the kernels of a zoo, and save the generator.

    Example: python -m train_generators vae --zoo runs/zoo --out runs/conv-vae --steps 1000

    Args:
        zoo: Folder of a zoo, made by `python -m collect run`, or of `.npy` kernels, [N, 1, h, w] per file.
        out: Folder of the checkpoint. Given again after a kill, the fit goes on; use it with
            `python -m generators init --with OUT`.
        config: How the slice models are fitted.
        track: Also log to Weights & Biases; set WANDB_MODE=offline to do so without an account.
        project: The wandb project.
    """
    from rich.console import Console

    torch.set_num_threads(1)
    Console().print(_table(fit(zoo, config, out, track=track, project=project)))
