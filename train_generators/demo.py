"""The main job end to end on scikit-learn's real digits, in a few minutes on two cores.

    zoo of trained networks  ->  conv VAE, GHN, noise GHN  ->  initial weights for unseen architectures  ->  the report

The unseen architectures have another depth and width than any network of the zoo or of the GHN trainings, and one is of
a family that the GHNs never met. Every step is resumable: after a kill, the same command goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from collect.durable import durable
from collect.plan import Task, plan, sweep
from collect.recipe import Recipe
from collect.runner import collect
from collect.workers import in_processes, usable_cores
from generators.commandline import progress
from generators.errors import ConfigError
from train_generators import ghn, vae
from train_generators.compare import CompareConfig, run
from train_generators.ghn_config import NOISE, GHNTrainingConfig
from train_generators.vae_config import VAEConfig

log = logging.getLogger(__name__)

ZOO = ("resnet-8-w4", "resnet-8-w8", "resnet-14-w8", "vgg-3-w8", "vgg-6-w8", "mlp-1-w64", "mlp-2-w32")
FAMILIES = {
    "resnet": ((8, 14), (4, 6, 8, 10, 16)),
    "vgg": ((3, 4, 6, 7, 8), (4, 6, 8, 10, 16)),
    "mlp": ((1, 2, 3), (32, 64, 96)),
}
"""Architectures of the GHN trainings: families of the zoo, with more depths and widths."""
UNSEEN = ("resnet-20-w12", "vgg-5-w12", "mobilenet-6-w12")
"""Another depth and width than any above; mobilenet is a family that nothing above belongs to."""
POINTWISE = ("he", "xavier")
SMALL_NOISE = replace(
    NOISE, ghn=replace(NOISE.ghn, anchor=0.6, rank=16, cells=16), draws=2, cosine_weight=0.05, steps=2500
)
"""Less noise than by default, for narrow networks that are to be above chance before any training; members are pushed
apart instead, as in arXiv 2310.16695."""


def families() -> tuple[str, ...]:
    """Names of the architectures that `FAMILIES` spans."""
    return tuple(
        f"{family}-{depth}-w{width}"
        for family, (depths, widths) in FAMILIES.items()
        for depth in depths
        for width in widths
    )


@dataclass(frozen=True)
class DemoConfig:
    """The whole job. The defaults fit two cores and a few minutes; all lengths are in steps, so results repeat.

    Attributes:
        out: Folder for the zoo, the checkpoints, the comparison and the raw records.
        zoo: Architectures of the zoo.
        zoo_runs: Networks per architecture of the zoo.
        zoo_recipe: How the zoo is trained.
        ghn_architectures: What the GHNs are trained on.
        unseen: Architectures of the comparison, in no training set.
        seeds: Networks per unseen architecture and initialiser.
        learning_rates: Tried for every initialiser alike; the best on validation images counts.
        comparison_recipe: How the compared networks are trained.
        vae: How the VAEs are fitted.
        ghn: How the GHN is trained.
        noise_ghn: How the noise GHN is trained.
        workers: Worker processes; none for one per core.
    """

    out: Path = Path("runs/demo")
    zoo: tuple[str, ...] = ZOO
    zoo_runs: int = 4
    zoo_recipe: Recipe = field(default_factory=lambda: Recipe(epochs=10))
    ghn_architectures: tuple[str, ...] = field(default_factory=families)
    unseen: tuple[str, ...] = UNSEEN
    seeds: int = 5
    learning_rates: tuple[float, ...] = (0.02, 0.1)
    comparison_recipe: Recipe = field(default_factory=lambda: Recipe(epochs=12, evaluations_per_epoch=2))
    vae: VAEConfig = field(default_factory=VAEConfig)
    ghn: GHNTrainingConfig = field(default_factory=GHNTrainingConfig)
    noise_ghn: GHNTrainingConfig = SMALL_NOISE
    workers: int | None = None

    def __post_init__(self) -> None:
        seen = {*self.zoo, *self.ghn_architectures} & set(self.unseen)
        if seen:
            raise ConfigError(f"{sorted(seen)} would be trained on and cannot be unseen; take them out of one list")


@dataclass(frozen=True)
class Fit:
    """One generator to fit: `call(*arguments, quiet=True, on_step=...)` in a process of its own, and its steps."""

    name: str
    call: Callable[..., object]
    arguments: tuple
    steps: int

    def __call__(self, tick: Callable[..., object]) -> None:
        self.call(*self.arguments, quiet=True, on_step=tick)


def fit_side_by_side(fits: list[Fit], *, workers: int | None = None) -> None:
    """Fit several generators at once, one process each, with one bar over all their steps."""
    count = min(workers or usable_cores(), len(fits))
    with progress(f"fitting {', '.join(each.name for each in fits)}", sum(each.steps for each in fits)) as bar:
        for _ in in_processes(fits, workers=count, on_tick=bar):
            pass


@contextlib.contextmanager
def _timed(times: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    times[name] = round(time.monotonic() - start, 1)


def _collect(tasks: list[Task], folder: Path, what: str, workers: int | None) -> None:
    with progress(what, sum(len(task.seeds) for task in tasks)) as bar:
        collect(tasks, folder, workers=workers, on_progress=bar)


def demo(config: DemoConfig) -> Path:
    """Run the job; the folder with everything.

    Raises:
        Interrupted: asked to stop; the same call goes on from there.
    """
    out = config.out
    times: dict[str, float] = {}
    with durable(out / "config.json") as temporary:
        temporary.write_text(json.dumps(asdict(config), indent=1, sort_keys=True, default=str))
    checkpoints = {name: out / "checkpoints" / name for name in ("conv-vae", "ghn", "noise-ghn")}
    with _timed(times, "collecting the zoo"):
        recipes = sweep(config.zoo_recipe, architecture=config.zoo)
        _collect(plan(recipes, runs=config.zoo_runs), out / "zoo", "training the zoo", config.workers)
    with _timed(times, "fitting the generators"):
        plain, noise = (
            replace(each, architectures=config.ghn_architectures, held_out=config.unseen)
            for each in (config.ghn, config.noise_ghn)
        )
        fit_side_by_side(
            [
                Fit("noise-ghn", ghn.fit, (noise, checkpoints["noise-ghn"]), noise.steps),
                Fit("ghn", ghn.fit, (plain, checkpoints["ghn"]), plain.steps),
                Fit("conv-vae", vae.fit, (out / "zoo", config.vae, checkpoints["conv-vae"]), config.vae.steps),
            ],
            workers=config.workers,
        )
    with _timed(times, "training the compared networks"):
        base = replace(config.comparison_recipe, saved=(0, config.comparison_recipe.epochs))
        inits = (*POINTWISE, *(path.as_posix() for path in checkpoints.values()))
        recipes = sweep(base, architecture=config.unseen, init=inits, lr=config.learning_rates)
        tasks = plan(recipes, runs=config.seeds)
        _collect(tasks, out / "comparison-zoo", "training the compared networks", config.workers)
    with _timed(times, "comparing"):
        run(CompareConfig(zoo=(out / "comparison-zoo",), out=out / "report", target_share=0.95, shift_images=200))
    with durable(out / "times.json") as temporary:
        temporary.write_text(json.dumps(times, indent=1))
    log.info("%s", ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.items()))
    log.info("the report: %s", out / "report" / "report.html")
    return out


def main(config: DemoConfig = DemoConfig()) -> None:
    """Run the main job end to end on the digits: zoo, conv VAE, GHN, noise GHN, comparison on unseen architectures.

    Example: python -m train_generators demo --out runs/demo

    Args:
        config: The whole job.
    """
    torch.set_num_threads(1)
    demo(config)
