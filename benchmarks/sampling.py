"""How fast do local generators draw slices? Every kind, beside plain normal numbers.

A slice model of every kind, in its default shape and with random weights, draws one layer of 3x3 kernels on one core.

    python benchmarks/sampling.py --json sampling.json [--quick]

Prints a table and writes its figures as flat JSON with machine, versions and commit. Rates are slices per second of CPU
time of the process, medians over interleaved rounds.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import tyro

sys.path = [str(Path(__file__).parents[1]), *(place for place in sys.path if Path(place) != Path(__file__).parent)]

from benchmarks.measuring import cpu_seconds, show, store  # noqa: E402
from generators.commandline import run  # noqa: E402
from generators.local.config import LocalConfig  # noqa: E402
from generators.local.generator import SLICE_MODELS, LocalGenerator  # noqa: E402
from generators.local.groups import GroupKey  # noqa: E402
from generators.local.slice_model import Layer  # noqa: E402
from generators.seeds import stream  # noqa: E402

KEY = GroupKey("conv_weight", (3, 3), 1)


def measure(rounds: int, channels: int) -> dict[str, float]:
    """Slices per second of every kind, for a layer of `channels` outputs and inputs."""
    layer = Layer(channels, channels, 9 * channels, 9 * channels)
    work = {"he": lambda: torch.randn(layer.count, *KEY.shape, generator=stream(0))}
    for kind in SLICE_MODELS:
        model = LocalGenerator(LocalConfig(kind=kind, groups=(str(KEY),))).model(KEY)
        work[kind] = lambda model=model: model.draw(layer, stream(0))
    seconds = defaultdict(list)
    for turn in range(rounds + 1):  # the first makes caches
        for name, draw in work.items():
            taken = cpu_seconds(draw)
            if turn:
                seconds[name].append(taken)
    return {f"slices_per_s/{name}": layer.count / statistics.median(taken) for name, taken in seconds.items()}


def benchmark(*, json_file: Annotated[Path, tyro.conf.arg(name="json")], quick: bool = False) -> None:
    """Measure how fast local generators draw slices.

    Args:
        json_file: Where the figures go.
        quick: A smaller version that ends within a minute.
    """
    torch.set_num_threads(1)
    figures = measure(3, 128) if quick else measure(9, 512)
    show(figures)
    store(json_file, figures)


if __name__ == "__main__":
    raise SystemExit(run(lambda: tyro.cli(benchmark)))
