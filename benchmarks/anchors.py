"""How much white noise should a generated weight hold? The anchor of the GHN, swept on the digits.

A generated weight is `he_std (a eps + sqrt(1 - a^2) decoded)`: all the generator's with a = 0, He with a = 1. For every
anchor and generator seed one GHN is trained; then networks of unseen depth and width are trained from it, and from He,
at several learning rates, of which each initialiser gets the one that ends best on validation images.

    python benchmarks/anchors.py --json docs/results/anchors/figures.json [--quick] [--out runs/anchors]

Prints one table, writes the figures as flat JSON, and leaves zoo, checkpoints and the full report in --out. Resumable.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from rich.console import Console

from collect.plan import plan, sweep
from collect.recipe import Recipe
from collect.runner import collect
from generators.commandline import progress, run
from generators.ghn.ghn import GHNConfig
from train_generators import ghn
from train_generators.compare import CompareConfig
from train_generators.compare import run as compare
from train_generators.demo import Fit, families, fit_side_by_side
from train_generators.ghn import GHNTrainingConfig

UNSEEN = ("resnet-20-w6", "vgg-5-w10")
CODE = 8


def benchmark(
    json_file: Path = Path("docs/results/anchors/figures.json"),
    *,
    out: Path = Path("runs/anchors"),
    quick: bool = False,
) -> None:
    """Sweep the anchor.

    Args:
        json_file: Where the figures go.
        out: Zoo, checkpoints and report; given again, the sweep goes on.
        quick: A tiny version that ends within a minute; its figures mean nothing.
    """
    anchors = (0.0, 0.7) if quick else (0.0, 0.5, 0.7, 0.85)
    generator_seeds = (0,) if quick else (0, 1)
    steps, epochs, runs = (60, 2, 2) if quick else (2000, 20, 5)
    rates = (0.1,) if quick else (0.02, 0.05, 0.1)
    base = GHNTrainingConfig(architectures=families(), held_out=UNSEEN, steps=steps)
    fits, inits = [], ["he"]
    for anchor in anchors:
        for seed in generator_seeds:
            name = f"anchor-{anchor:g}-seed-{seed}"
            config = replace(base, name=name, seed=seed, ghn=GHNConfig(anchor=anchor, code=CODE if anchor else 0))
            fits.append(Fit(name, ghn.fit, (config, out / "checkpoints" / name), steps))
            inits.append((out / "checkpoints" / name).as_posix())
    fit_side_by_side(fits, workers=None)
    recipes = sweep(
        Recipe(epochs=epochs, evaluations_per_epoch=2, saved=(0, epochs)), architecture=UNSEEN, init=inits, lr=rates
    )
    tasks = plan(recipes, runs=runs)
    with progress("training the compared networks", len(recipes) * runs) as bar:
        collect(tasks, out / "zoo", on_progress=bar)
    horizons = (0, 20, 40, 100, 200, 400)
    result = compare(CompareConfig(zoo=(out / "zoo",), out=out / "report", horizons=horizons), console=Console())
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps(result.figures, indent=1, sort_keys=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(run(lambda: tyro.cli(benchmark)))
