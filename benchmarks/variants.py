"""Which decoder, encoder and anchor should a noise GHN have? One thing at a time, at equal training time.

Every variant is trained for the same CPU seconds, by steps that are timed beforehand, once per seed. Then networks of
unseen depth and width are trained from it for two epochs; He's start is trained at several learning rates, and the one
that ends best on validation images counts.

    python benchmarks/variants.py --json variants.json --data data/cifar10.npz [--quick] [--out runs/variants]

Leaves in --out the checkpoints, the zoos, a table, a picture per architecture and all curves; given again, it goes on.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

sys.path = [str(Path(__file__).parents[1]), *(place for place in sys.path if Path(place) != Path(__file__).parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402

from benchmarks.curves import RECIPE, Curve, best_rates, curves, figures, picture, table  # noqa: E402
from benchmarks.measuring import store  # noqa: E402
from collect.data import load  # noqa: E402
from collect.durable import durable  # noqa: E402
from collect.plan import plan  # noqa: E402
from collect.recipe import Recipe  # noqa: E402
from collect.runner import collect  # noqa: E402
from collect.workers import in_processes  # noqa: E402
from generators.commandline import progress, run  # noqa: E402
from generators.errors import CheckpointError, unknown_name  # noqa: E402
from train_generators.ghn import fit  # noqa: E402
from train_generators.ghn_config import NOISE, GHNTrainingConfig  # noqa: E402

BARE = {"anchor": 0.0, "decoded_limit": 0.0}
VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "core": {}, "core-no-anchor": BARE,
    "coordinate": {"decoder": "coordinate"}, "coordinate-no-anchor": {"decoder": "coordinate", **BARE},
    "block": {"decoder": "block"}, "block-no-anchor": {"decoder": "block", **BARE},
    "transformer": {"encoder": "transformer"}, "gated": {"encoder": "gated"},
    "free-spectrum": {"spectrum_steps": 0}, "free-scale": {"gain_bound": 2.0},
    "anchor-0.5": {"anchor": 0.5}, "anchor-0.9": {"anchor": 0.9},
})  # fmt: skip
"""What differs from the default of `noise-ghn`, as fields of `GHNConfig`."""
TRAINED_ON = (
    *(f"resnet-{depth}-w{width}" for depth in (8, 14) for width in (8, 10, 14, 20)),
    *(f"vgg-{depth}-w{width}" for depth in (4, 6) for width in (8, 12, 20)),
)
UNSEEN = ("resnet-20-w16", "vgg-8-w16")
FIRST_SEED = 3
"""Of the judged networks: GHN number N is judged on the one of seed FIRST_SEED + N."""
TIMED_STEPS = 84


@dataclass(frozen=True)
class Job:
    """One GHN to train, and the networks to train from it; or networks from a start that needs no training.

    Attributes:
        name: of the variant, or of the start.
        seed: of the GHN; the networks have `FIRST_SEED` more.
        ghn: how the GHN is trained; None for none.
        recipes: of the networks.
        out: folder, everything of this job in one of its own.
    """

    name: str
    seed: int
    ghn: GHNTrainingConfig | None
    recipes: tuple[Recipe, ...]
    out: Path

    @property
    def folder(self) -> Path:
        return self.out / f"{self.name}-{self.seed}"

    @property
    def trained(self) -> tuple[Recipe, ...]:
        """The recipes, from the checkpoint of this job if it has one."""
        start = (self.folder / "checkpoint").as_posix() if self.ghn else self.name
        return tuple(replace(each, init=start) for each in self.recipes)

    def __call__(self, tick: Callable[..., object]) -> None:
        if self.ghn:
            seconds, done = stopwatch()
            try:
                fit(self.ghn, self.folder / "checkpoint", quiet=True, on_step=lambda n: (tick(0), done(n)))
            except CheckpointError as error:  # collapsed: that is the result
                _write(self.folder / "refused.txt", str(error))
                tick(len(self.recipes))
                return
            if len(seconds) == self.ghn.steps:  # none of them in an earlier run
                _write(self.folder / "cpu_seconds.json", json.dumps(sum(seconds)))
        collect(
            plan(self.trained, runs=1, first_seed=FIRST_SEED + self.seed), self.folder / "zoo", workers=0,
            on_progress=tick,
        )  # fmt: skip


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with durable(path) as temporary:
        temporary.write_text(text)


def stopwatch() -> tuple[list[float], Callable[[float], None]]:
    """CPU seconds of every step of a training, filled by what it calls after each, and once before the first."""
    seconds: list[float] = []
    last: list[float] = []

    def done(number: float) -> None:
        now = time.process_time()
        if last:
            seconds.append(now - last[0])
        last[:] = [now]

    return seconds, done


def step_seconds(config: GHNTrainingConfig, steps: int) -> float:
    """CPU seconds of a step of a training, the mean of `steps` of them."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, done = stopwatch()
        short = replace(config, steps=steps, held_out=(), evaluate_every=steps + 1, ghn=replace(config.ghn, seed=0))
        with suppress(CheckpointError):  # too short a training to be worth saving
            fit(short, folder, quiet=True, on_step=done)
    return sum(seconds) / len(seconds)


def configs(
    names: Sequence[str], base: GHNTrainingConfig, seconds: float, known: Path, timed_steps: int
) -> dict[str, GHNTrainingConfig]:
    """Variants of a training with as many steps as `seconds` allow, which `known` keeps for the next run."""
    steps: dict[str, int] = json.loads(known.read_text()) if known.exists() else {}
    found = {name: replace(base, name=name, ghn=replace(base.ghn, **VARIANTS[name])) for name in names}
    with progress("timing the variants", len(found)) as bar:
        for name, config in found.items():
            steps.setdefault(name, 0)
            steps[name] = steps[name] or max(1, round(seconds / step_seconds(config, timed_steps)))
            bar.advance(1)
    _write(known, json.dumps(steps, indent=1))
    return {name: replace(config, steps=steps[name], evaluate_every=steps[name]) for name, config in found.items()}


def gathered(jobs: Iterable[Job], chosen: Sequence[Recipe]) -> list[Curve]:
    """A curve for every start and architecture, over the seeds; of starts at several rates, the `chosen` one."""
    rates = {(recipe.architecture, recipe.init): recipe.lr for recipe in chosen}
    parts: dict[tuple[str, str, float], list[Curve]] = {}
    for job in jobs:
        if (job.folder / "zoo").exists():
            for curve in curves(job.folder / "zoo", job.trained):
                if rates.get((curve.architecture, curve.start), curve.lr) == curve.lr:
                    parts.setdefault((curve.architecture, job.name, curve.lr), []).append(curve)
    found = [Curve(*key, rows[0].steps, np.concatenate([row.accuracy for row in rows])) for key, rows in parts.items()]
    return sorted(found, key=lambda curve: (curve.architecture, -curve.accuracy[:, -1].mean()))


def as_csv(found: Sequence[Curve]) -> str:
    """One row per network and evaluation."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["architecture", "start", "lr", "number", "step", "test_accuracy"])
    for curve in found:
        for number, row in enumerate(curve.accuracy):
            for step, value in zip(curve.steps, row, strict=True):
                rows.writerow([curve.architecture, curve.start, curve.lr, number, step, f"{value:.4f}"])
    return text.getvalue()


def benchmark(
    *,
    json_file: Annotated[Path, tyro.conf.arg(name="json")],
    data: str = "cifar10",
    variants: tuple[str, ...] = tuple(VARIANTS),
    starts: tuple[str, ...] = (),
    architectures: tuple[str, ...] = UNSEEN,
    seconds: float = 225.0,
    seeds: tuple[int, ...] = (0, 1),
    rate: float = 0.1,
    he_rates: tuple[float, ...] = (0.05, 0.1),
    workers: int = 1,
    quick: bool = False,
    out: Path = Path("runs/variants"),
) -> None:
    """Compare variants of a noise GHN at equal training time.

    Args:
        json_file: Where the figures go.
        data: Data set, or the path of an .npz.
        variants: Which ones; He is compared besides.
        starts: Published generators that are compared too, such as noise-ghn-cifar10-long.
        architectures: What is trained from them, and no GHN is trained on.
        seconds: CPU seconds of each GHN.
        seeds: Of the GHNs; each is judged on a network of its own.
        rate: Learning rate of the networks that start from a GHN or a published generator.
        he_rates: Those of He, of which the best on validation images counts.
        workers: Processes.
        quick: A tiny version on the digits that means nothing.
        out: Folder of checkpoints, zoos, tables and pictures.
    """
    for name in variants:
        if name not in VARIANTS:
            raise unknown_name("variant", name, VARIANTS)
    base = replace(
        NOISE, architectures=TRAINED_ON, held_out=architectures, data=data, augmentation="flip-crop",
        precision="bfloat16",
    )  # fmt: skip
    recipe = replace(
        RECIPE, data=data, epochs=2, batch_size=112, evaluations_per_epoch=1, evaluation_steps=(50, 200, 800)
    )
    timed_steps = TIMED_STEPS
    if quick:
        base = replace(
            base, architectures=("resnet-8-w4", "vgg-3-w4"), data="digits", augmentation="none", precision="float32"
        )
        recipe = replace(recipe, data="digits", augmentation="none", epochs=1, evaluation_steps=())
        seconds, timed_steps, out = min(seconds, 1.0), 4, out / "quick"
    load(base.data)  # one that is not there is said now
    named = [replace(recipe, architecture=architecture) for architecture in architectures]
    he = tuple(replace(each, lr=lr) for each in named for lr in he_rates)
    trained = configs(variants, base, seconds, out / "steps.json", timed_steps)
    generated = tuple(replace(each, lr=rate) for each in named)
    jobs = [Job("he", seed, None, he, out) for seed in seeds]
    jobs += [Job(name, seed, None, generated, out) for name in starts for seed in seeds]
    jobs += [
        Job(name, seed, replace(config, seed=seed), generated, out)
        for name, config in trained.items()
        for seed in seeds
    ]
    with progress("training GHNs and networks", sum(len(job.recipes) for job in jobs)) as bar:
        for _ in in_processes(jobs, workers=workers, on_tick=bar.advance):
            pass
    chosen = best_rates([job.folder / "zoo" for job in jobs if job.name == "he"], he)
    found = gathered(jobs, chosen)
    for architecture in architectures:
        (out / f"{architecture}.png").write_bytes(
            picture([each for each in found if each.architecture == architecture])
        )
    (out / "variants.md").write_text(table(found))
    (out / "curves.csv").write_text(as_csv(found))
    taken = {job.folder.name: job.folder / "cpu_seconds.json" for job in jobs}
    store(
        json_file, figures(found), seeds=list(seeds), seconds=seconds,
        steps={name: config.steps for name, config in trained.items()},
        cpu_seconds={name: json.loads(path.read_text()) for name, path in taken.items() if path.exists()},
        refused={job.folder.name: path.read_text() for job in jobs if (path := job.folder / "refused.txt").exists()},
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(run(lambda: tyro.cli(benchmark)))
