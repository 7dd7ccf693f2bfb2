"""How much white noise should a generated weight hold? The anchor of the GHN, swept on the digits.

A generated weight is `he_std (a eps + sqrt(1 - a^2) decoded)`: all the generator's with a = 0, He with a = 1. For every
anchor and generator seed one GHN is trained; then networks of unseen depth and width are trained from it, and from He,
at several learning rates, of which each initialiser gets the one that ends best on validation images.

    python benchmarks/anchors.py --json anchors.json [--quick] [--out runs/anchors]

Prints the table of the comparison, writes its figures as flat JSON with machine, versions and commit, and leaves zoo,
checkpoints and the full report in --out. Given again, it goes on. `--quick` ends within a minute and means nothing.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro

sys.path = [str(Path(__file__).parents[1]), *(place for place in sys.path if Path(place) != Path(__file__).parent)]

from collect.durable import durable  # noqa: E402
from collect.plan import plan, sweep  # noqa: E402
from collect.recipe import Recipe  # noqa: E402
from collect.runner import collect  # noqa: E402
from generators.commandline import progress, run  # noqa: E402
from generators.ghn.config import GHNConfig  # noqa: E402
from train_generators import ghn  # noqa: E402
from train_generators.compare import CompareConfig  # noqa: E402
from train_generators.compare import run as compare  # noqa: E402
from train_generators.demo import Fit, families, fit_side_by_side  # noqa: E402
from train_generators.ghn_config import GHNTrainingConfig  # noqa: E402

UNSEEN = ("resnet-20-w12", "vgg-5-w12")
CODE = 8
HORIZONS = (0, 10, 40, 100, 200, 400)


@dataclass(frozen=True)
class Size:
    """How much is run.

    Attributes:
        anchors: values of a.
        generator_seeds: GHNs per anchor.
        steps: of a GHN training.
        epochs: of a compared network.
        runs: compared networks per initialiser, architecture and learning rate.
        rates: learning rates.
    """

    anchors: tuple[float, ...] = (0.0, 0.5, 0.7, 0.85)
    generator_seeds: tuple[int, ...] = (0, 1)
    steps: int = 2000
    epochs: int = 20
    runs: int = 5
    rates: tuple[float, ...] = (0.02, 0.05, 0.1)


QUICK = Size(anchors=(0.0, 0.7), generator_seeds=(0,), steps=40, epochs=1, runs=2, rates=(0.1,))


def benchmark(
    *, json_file: Annotated[Path, tyro.conf.arg(name="json")], out: Path = Path("runs/anchors"), quick: bool = False
) -> None:
    """Sweep the anchor of the GHN on the digits.

    Args:
        json_file: Where the figures go.
        out: Folder of zoo, checkpoints and report.
        quick: A tiny version that ends within a minute.
    """
    size = QUICK if quick else Size()
    out = out / "quick" if quick else out
    base = GHNTrainingConfig(architectures=families(), held_out=UNSEEN, steps=size.steps)
    fits, inits = [], ["he"]
    for anchor in size.anchors:
        for seed in size.generator_seeds:
            name = f"anchor-{anchor:g}-seed-{seed}"
            config = replace(base, name=name, seed=seed, ghn=GHNConfig(anchor=anchor, code=CODE if anchor else 0))
            fits.append(Fit(name, ghn.fit, (config, out / "checkpoints" / name), size.steps))
            inits.append((out / "checkpoints" / name).as_posix())
    fit_side_by_side(fits)
    trained = Recipe(epochs=size.epochs, evaluations_per_epoch=2, saved=(0, size.epochs))
    recipes = sweep(trained, architecture=UNSEEN, init=inits, lr=size.rates)
    with progress("training the compared networks", len(recipes) * size.runs) as bar:
        collect(plan(recipes, runs=size.runs), out / "zoo", on_progress=bar)
    shifts = () if quick else CompareConfig.shifts
    result = compare(CompareConfig(zoo=(out / "zoo",), out=out / "report", horizons=HORIZONS, shifts=shifts))
    with durable(json_file) as temporary:
        temporary.write_text(json.dumps({**result.facts, **result.figures}, indent=1, sort_keys=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(run(lambda: tyro.cli(benchmark)))
