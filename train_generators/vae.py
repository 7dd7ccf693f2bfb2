"""Fit one convolutional VAE per weight group on the trained kernels of a zoo.

What the card says of a group is measured on networks that had no part in the fit. Every step draws its batch from a
stream of its own, so a fit that was killed goes on from its last state and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor

from collect.durable import durable
from collect.provenance import versions
from collect.zoo import Zoo
from generators.checkpoint import save
from generators.commandline import progress
from generators.errors import CollapseError, ConfigError, ZooError
from generators.local.conv_vae import ConvVAE, ConvVAEConfig
from generators.local.fidelity import active_units, match
from generators.local.groups import GroupKey
from generators.local.slice_vae import SliceVAE
from generators.seeds import derive, stream
from train_generators.slices import GroupData, read_groups
from train_generators.tracking import Track, Tracker
from train_generators.training_state import load_state, save_state

log = logging.getLogger(__name__)

LOG_EVERY = 50  # steps
JUDGED = 1 << 15  # slices drawn to judge a group
RATIO_BOUNDS = (0.5, 2.0)  # second moment of samples over the data's, before calibration; a fit outside has failed


@dataclass(frozen=True)
class VAEConfig:
    """How the VAEs are fitted.

    Attributes:
        steps: Optimiser steps per weight group.
        batch_size: Slices per step.
        lr: Highest learning rate of Adam; rises over the first 50 steps, then falls to 0 linearly.
        warm_up: Share of the steps over which the weight of the KL term rises from 0 to 1.
        seed: Of the first weights, batches and posterior samples.
        init: Only networks that started from this initialiser are used, lest a generator be fitted on its own
            offspring; "any" uses all.
        depth_buckets: Into how many parts of equal depth networks are divided.
        patch: Length of the row patches of 1x1 convolutions and linear layers.
        latent: Latent units of a group at most; never more than a slice has weights.
        channels: Channels of the encoder's and decoder's maps.
        hidden: Channels between these maps and the latents.
        noise_bounds: Least and largest decoder variance, as shares of the data's variance.
        scale: Spread of a generated tensor: "he" (the He std of its fan-in), "zoo" (as far from He's as the tensors of
            the group in the zoo are), "none" (that of the zoo, whatever the fan-in).
        slices_per_tensor: Slices used of one tensor at most, chosen at random.
        least_slices: Groups with fewer training slices are left out, and the card says so.
        save_every: Steps between two states to resume from.
        name: What reports call the generator.
    """

    steps: int = 400
    batch_size: int = 128
    lr: float = 1e-2
    warm_up: float = 0.3
    seed: int = 0
    init: str = "he"
    depth_buckets: int = 3
    patch: int = 8
    latent: int = 64
    channels: int = 16
    hidden: int = 64
    noise_bounds: tuple[float, float] = (1e-3, 0.25)
    scale: Literal["he", "zoo", "none"] = "he"
    slices_per_tensor: int = 4096
    least_slices: int = 256
    save_every: int = 200
    name: str = "conv-vae"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "slices_per_tensor", "least_slices", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.lr > 0 or not 0 <= self.warm_up <= 1:
            raise ConfigError(f"lr must be above 0 and warm_up in [0, 1], got {self.lr} and {self.warm_up}")
        self.generator(())

    def generator(self, groups: tuple[str, ...]) -> ConvVAEConfig:
        """The configuration of the generator that is fitted."""
        shared = {each.name for each in dataclasses.fields(ConvVAEConfig)} & set(asdict(self))
        return ConvVAEConfig(groups=groups, **{name: getattr(self, name) for name in shared})


def _choose(zoo: Zoo, config: VAEConfig) -> tuple[dict[GroupKey, GroupData], dict[str, str], Zoo]:
    """The groups that can be fitted, why the others cannot, and the runs used.

    Raises:
        ZooError: no run or no group can be used.
    """
    chosen = zoo.where(status="ok") if config.init == "any" else zoo.where(status="ok", init=config.init)
    if not len(chosen):
        raise ZooError(
            f"{zoo.folder}: no finished network started from {config.init!r}; collect some, or use --init any"
        )
    groups = read_groups(
        chosen, patch=config.patch, depth_buckets=config.depth_buckets, slices_per_tensor=config.slices_per_tensor,
        seed=config.seed,
    )  # fmt: skip
    skipped = {
        str(key): f"{data.count} training slices, fewer than {config.least_slices}"
        for key, data in groups.items()
        if data.count < config.least_slices
    }
    usable = {key: data for key, data in groups.items() if str(key) not in skipped}
    if not usable:
        raise ZooError(
            f"{zoo.folder}: none of {len(groups)} weight groups has {config.least_slices} training slices "
            f"({skipped}); collect more networks, or lower --least-slices"
        )
    return usable, skipped, chosen


def judge(vae: SliceVAE, data: GroupData, *, seed: int, label: str) -> dict[str, Any]:
    """How samples of a group's VAE match slices of held-out networks (of the training ones if none is held out).

    Returns:
        The figures of `generators.local.fidelity.match`, of the same for the training slices as far as the data allow
        (`covariance_error_train`), and counts. `held_out_runs` 0 says that the training slices were the measure.
    """
    train = torch.cat(data.train)
    reference = torch.cat(data.held_out) if data.held_out else train
    drawn = vae.draw(JUDGED, stream(seed, "judge", label))
    with torch.no_grad():
        means, _ = vae.encode(vae.standardised(reference))
    return {
        **match(drawn, reference),
        "covariance_error_train": match(train, reference)["covariance_error"],
        "active_units": active_units(means),
        "latent_units": vae.latent,
        "noise_share": vae.noise.mean().item(),
        "zoo_gain": data.gain,
        "train_slices": len(train),
        "train_runs": len(data.train_runs),
        "held_out_slices": sum(map(len, data.held_out)),
        "held_out_runs": len(data.held_out_runs),
    }


def _finish(key: GroupKey, vae: SliceVAE, data: GroupData, config: VAEConfig) -> dict[str, Any]:
    """Settle, check and calibrate a fitted group; its figures.

    Raises:
        CollapseError: the latents carry nothing, or the spread of samples is far from the data's.
    """
    train = torch.cat(data.train)
    some = vae.standardised(train[torch.randperm(len(train), generator=stream(config.seed, "settle", str(key)))[:8192]])
    draws = torch.randn(len(some), vae.latent, generator=stream(config.seed, "settle draws", str(key)))
    with torch.no_grad():
        vae.settle(some, draws)
    ratio = match(vae.draw(JUDGED, stream(config.seed, "raw", str(key))), train)["second_moment_ratio"]
    active = active_units(vae.encode(some)[0].detach())
    if active == 0 or not RATIO_BOUNDS[0] <= ratio <= RATIO_BOUNDS[1]:
        raise CollapseError(
            f"weight group {key} ({data.count} {key.slices}) has collapsed: {active} of {vae.latent} latent units are "
            f"active, and the second moment of its samples is {ratio:.3g} of the data's; nothing was saved. "
            "Use more --steps or another --lr"
        )
    if not data.held_out:
        log.warning("weight group %s: no network is held out, so it is judged on those it was fitted on", key)
    vae.calibrate(train, stream(config.seed, "calibrate", str(key)))
    vae.zoo_gain.fill_(data.gain)
    vae.zoo_std.fill_(data.std)
    return {**judge(vae, data, seed=config.seed, label=str(key)), "second_moment_ratio_raw": ratio}


def _steps(
    key: GroupKey, vae: SliceVAE, slices: Tensor, optimiser: torch.optim.Optimizer, config: VAEConfig, first: int
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Train one group from step `first` of `config.steps`; yields (steps done, parts of the loss)."""
    for step in range(first, config.steps):
        draws = stream(config.seed, "step", str(key), step)
        batch = slices[torch.randint(len(slices), (config.batch_size,), generator=draws)]
        noise = torch.randn(config.batch_size, vae.latent, generator=draws)
        rate = config.lr * min(1.0, (step + 1) / 50) * (1.0 - step / config.steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        beta = min(1.0, (step + 1) / max(config.warm_up * config.steps, 1.0))
        loss, parts = vae.loss(batch, noise, beta=beta)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        yield step + 1, {"loss": loss.detach(), **parts}


def fit(
    zoo: str | Path | Zoo,
    config: VAEConfig,
    out: str | Path,
    *,
    track: Track = "none",
    project: str = "powerhouse",
    quiet: bool = False,
    on_step: Callable[[float], object] | None = None,
) -> ConvVAE:
    """Fit the VAEs and save the generator as a checkpoint in `out`. Called again after a kill, it goes on.

    Args:
        zoo: folder of a zoo, or an opened one (or a view of it).
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
        ZooError: the zoo cannot be read or holds nothing to fit.
        CollapseError: a group has collapsed; the message names it and the figures.
        ConfigError: `out` holds another training.
    """
    zoo = zoo if isinstance(zoo, Zoo) else Zoo(zoo)
    groups, skipped, chosen = _choose(zoo, config)
    generator = ConvVAE(config.generator(tuple(map(str, groups))), name=config.name)
    facts = _facts(chosen, config, skipped)
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    folder = Path(out) / "training"
    state, meta = _resume(folder / "state.safetensors", fingerprint)
    done, metrics = meta["step"], meta["metrics"]
    if state:
        generator.load_state_dict(state["generator"])
    else:
        with durable(folder / "config.json") as temporary:
            temporary.write_text(json.dumps(asdict(config), indent=1, sort_keys=True))

    bar = contextlib.nullcontext() if quiet else progress("fitting VAEs", config.steps * len(groups))
    tracker = Tracker(folder, track=track, project=project, config=asdict(config), resumed_at=done or None)
    with _forgotten_if_collapsed(folder / "state.safetensors"), tracker, bar as shown:
        share = 1 / len(groups) if on_step else 1.0
        advance = on_step or (shown.advance if shown else lambda amount: None)
        advance(done * share)
        for index, (key, data) in enumerate(groups.items()):
            before = index * config.steps
            if done >= before + config.steps:
                continue
            vae = generator.vae(key)
            optimiser = torch.optim.Adam(vae.parameters(), fused=True)
            if done > before:
                optimiser.load_state_dict(state["optimiser"])
            else:
                vae.standardise(torch.cat(data.train))
            slices = vae.standardised(torch.cat(data.train))
            for step, parts in _steps(key, vae, slices, optimiser, config, max(done - before, 0)):
                advance(share)
                if step % LOG_EVERY == 0 or step == config.steps:
                    values = {name: value.mean().item() for name, value in parts.items()}
                    if not math.isfinite(values["loss"]):
                        raise CollapseError(f"weight group {key}: the loss is not finite at step {step}; lower --lr")
                    tracker.log(before + step, group=str(key), **values)
                if step == config.steps:
                    metrics[str(key)] = _finish(key, vae, data, config)
                if step % config.save_every == 0 or step == config.steps:
                    held = {"generator": generator.state_dict(), "optimiser": optimiser.state_dict()}
                    saved = {"step": before + step, "metrics": metrics, "fingerprint": fingerprint}
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


def _facts(chosen: Zoo, config: VAEConfig, skipped: dict[str, str]) -> dict[str, Any]:
    """What the card says besides the figures; also what a training must agree on to be resumed."""
    runs = sorted(run["id"] for run in chosen.runs)
    return {
        "kind": "conv-vae",
        "summary": "one convolutional VAE per weight group (kernel size, role, depth)",
        "paper": "arXiv 2310.16695",
        "licence": "Apache-2.0",
        "data": ", ".join(sorted({run["data"] for run in chosen.runs})),
        "zoo": {
            "runs": len(runs),
            "architectures": sorted({run["architecture"] for run in chosen.runs}),
            "digest": derive(0, *runs),
        },
        "training": asdict(config),
        "skipped_groups": skipped,
    }


def _resume(path: Path, fingerprint: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The saved tensors and facts of the training, or those of one that has not begun.

    Raises:
        ConfigError: the state belongs to other data or another configuration.
    """
    if not path.exists():
        return {}, {"step": 0, "metrics": {}}
    tensors, meta = load_state(path)
    if meta["fingerprint"] != fingerprint:
        raise ConfigError(
            f"{path.parent.parent} holds a training with another configuration or zoo; "
            f"choose another folder, or delete {path} to start again"
        )
    log.info("going on from step %d", meta["step"])
    return tensors, meta


def _table(generator: ConvVAE) -> Table:
    """What was measured per group, for the screen."""
    table = Table(
        title=f"{generator.name}: samples against networks that had no part in the fit",
        caption="covariance error of: samples, white noise (He), the training networks themselves",
    )
    for heading in ("weight group", "slices", "active units", "2nd moment", "samples", "white", "training"):
        table.add_column(heading, no_wrap=heading == "weight group")
    for key, row in generator.card["metrics"].items():
        errors = (row[f"covariance_error{of}"] for of in ("", "_white", "_train"))
        figures = (f"{figure:.3f}" for figure in (row["second_moment_ratio"], *errors))
        table.add_row(key, str(row["train_slices"]), f"{row['active_units']}/{row['latent_units']}", *figures)
    return table


def main(
    zoo: Path, out: Path, config: VAEConfig = VAEConfig(), *, track: Track = "none", project: str = "powerhouse"
) -> None:  # fmt: skip
    """Fit one VAE per weight group on the kernels of a zoo, and save the generator.

    Example: python -m train_generators vae --zoo runs/zoo --out runs/conv-vae --steps 1000

    Args:
        zoo: Folder of a zoo, made by `python -m collect run`.
        out: Folder of the checkpoint. Given again after a kill, the fit goes on; use it with
            `python -m generators init --with OUT`.
        config: How the VAEs are fitted.
        track: Also log to Weights & Biases; set WANDB_MODE=offline to do so without an account.
        project: The wandb project.
    """
    from rich.console import Console

    torch.set_num_threads(1)
    Console().print(_table(fit(zoo, config, out, track=track, project=project)))
