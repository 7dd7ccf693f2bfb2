"""Does a generated start beat He on families that its generator never met? Every start at its own best rate.

For each architecture every start is trained once at each learning rate; the rate that ends best on validation images is
then used for fresh seeds, so what is compared was not chosen on them. Networks without normalisation get `+lsuv`, which
rescales them on data, and He gets it too.

    python benchmarks/unseen.py --json unseen.json --data data/cifar10.npz [--quick] [--out runs/unseen]

Leaves the zoos of the search and of the comparison in --out, with a table of both and a picture per architecture of the
comparison; given again, it goes on.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

sys.path = [str(Path(__file__).parents[1]), *(place for place in sys.path if Path(place) != Path(__file__).parent)]

import torch  # noqa: E402
import tyro  # noqa: E402

from benchmarks.curves import RECIPE, best_rates, curves, figures, picture, table  # noqa: E402
from benchmarks.measuring import store  # noqa: E402
from collect.plan import plan  # noqa: E402
from collect.runner import collect  # noqa: E402
from generators.commandline import progress, run  # noqa: E402

UNSEEN = ("vgg-8-w16", "mobilenet-8-w16", "vit-4-w64", "resnet-32-w8", "cnn-4-w32", "bare-resnet-20-w8")
RATES = (0.03, 0.1, 0.3)
SEARCH_SEED = 3


def chains(architecture: str, start: str) -> tuple[str, ...]:
    """The starts that are compared on an architecture."""
    return ("he", "he+lsuv", f"{start}+lsuv") if architecture.startswith("bare-") else ("he", start)


def benchmark(
    *,
    json_file: Annotated[Path, tyro.conf.arg(name="json")],
    data: str = "cifar10",
    start: str = "noise-ghn-cifar10-long",
    architectures: tuple[str, ...] = UNSEEN,
    rates: tuple[float, ...] = RATES,
    runs: int = 3,
    workers: int = 0,
    quick: bool = False,
    out: Path = Path("runs/unseen"),
) -> None:
    """Compare a generator with He on architectures that it never met.

    Args:
        json_file: Where the figures go.
        data: Data set, or the path of an .npz.
        start: The generator.
        architectures: Which ones; those called bare-... have no normalisation.
        rates: Learning rates of the search.
        runs: Networks per architecture and start, at the rate that the search chose.
        workers: Processes; 0 trains in this one.
        quick: A tiny version on the digits that means nothing.
        out: Folder of zoos, tables and pictures.
    """
    recipe = replace(RECIPE, data=data)
    if quick:
        recipe = replace(recipe, data="digits", augmentation="none", evaluation_steps=())
    searched, compared = [], []
    for architecture in architectures:  # one after the other, so that what is done by then can be read
        starts = [replace(recipe, architecture=architecture, init=chain) for chain in chains(architecture, start)]
        tried = [replace(each, lr=lr) for each in starts for lr in rates]
        with progress(f"learning rates of {architecture}", len(tried)) as bar:
            tasks = plan(tried, runs=1, first_seed=SEARCH_SEED)
            collect(tasks, out / "search" / architecture, workers=workers, on_progress=bar)
        chosen = best_rates([out / "search" / architecture], starts)
        with progress(f"comparison on {architecture}", len(chosen) * runs) as bar:
            tasks = plan(chosen, runs=runs, first_seed=SEARCH_SEED + 1)
            collect(tasks, out / "zoo", workers=workers, on_progress=bar)
        searched += curves(out / "search" / architecture, tried)
        compared += (found := curves(out / "zoo", chosen))
        (out / f"{architecture}.png").write_bytes(picture(found))
        (out / "search.md").write_text(table(searched))
        (out / "unseen.md").write_text(table(compared))
    store(json_file, figures(compared), start=start, rates=list(rates), runs=runs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(run(lambda: tyro.cli(benchmark)))
