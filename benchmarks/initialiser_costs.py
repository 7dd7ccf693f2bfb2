"""What do initialisers that look at data or at the whole model cost?

An iteration of the scale optimisers in units of a plain training step of a ResNet-20 (batch 128, 32 x 32 pixels, one
thread), the rewiring of a ResNet-50 in CPU seconds, that of a matrix 256 x 1,152 with weighted choices row by row, as
its authors draw, in units of ours, and LSUV of a ResNet-50 in forward passes, counted in operations.

    python benchmarks/initialiser_costs.py --json costs.json [--quick]
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

sys.path = [str(Path(__file__).parents[1]), *(place for place in sys.path if Path(place) != Path(__file__).parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
import tyro  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks.measuring import cpu_seconds, plain_step, show, store  # noqa: E402
from collect.architectures import build  # noqa: E402
from generators import init  # noqa: E402
from generators.commandline import run  # noqa: E402
from generators.refining.gradinit import GradInit  # noqa: E402
from generators.refining.metainit import MetaInit  # noqa: E402
from generators.refining.nio import NIO  # noqa: E402
from generators.refining.rewiring import rewire_rows  # noqa: E402

BATCH = 128
MATRIX = (256, 1152)


def by_choice(matrix: np.ndarray, draws: np.random.Generator) -> None:
    """One pass of rewiring as its authors draw, in place: numpy's weighted choice without replacement for every row."""
    rows, columns = matrix.shape
    sums = np.zeros(columns)
    for row in range(1, rows):
        sums += matrix[row - 1]
        odds = sums + (abs(sums.min()) + 1.0)
        chosen = draws.choice(columns, columns, replace=False, p=odds / odds.sum())
        matrix[row, chosen] = np.sort(matrix[row])


def cost_figures(quick: bool) -> dict[str, float]:
    """The figures of speed that do not depend on a study."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32, generator=draw)
    batch = (images, torch.randint(10, (BATCH,), generator=draw))
    small = build("resnet-20-w16", shape=(3, 32, 32), classes=10)
    init(small, "he")
    step = plain_step(small, batch)
    step()
    step_s = cpu_seconds(step, 5)
    figures: dict[str, float] = {}
    few, many, rounds = (1, 2, 1) if quick else (1, 6, 3)
    for kind in (NIO, GradInit, MetaInit):
        seconds = []
        for iterations in (few, many):
            filled = partial(init, small, kind(iterations=iterations), data=[batch], loss=nn.functional.cross_entropy)
            seconds.append(cpu_seconds(filled, rounds))
        figures[f"{kind.name}_step_ratio"] = (seconds[1] - seconds[0]) / (many - few) / step_s
    large = torchvision.models.resnet50(weights=None)
    init(large, "he")
    figures["rewire_resnet50_s"] = cpu_seconds(lambda: init(large, "rewire"), 1)
    matrix = torch.randn(1, *MATRIX, generator=draw)
    slow = cpu_seconds(lambda: by_choice(matrix[0].numpy().copy(), np.random.default_rng(0)), rounds)
    fast = cpu_seconds(lambda: rewire_rows(matrix.clone(), [np.random.default_rng(0)]), rounds)
    figures["rewire_by_choice_ratio"] = slow / fast
    pictures = torch.randn(4, 3, 64, 64, generator=draw)
    with FlopCounterMode(display=False) as once, torch.no_grad():
        large.eval()(pictures)
    with FlopCounterMode(display=False) as all_of_it:
        init(large, "lsuv", data=[pictures])
    figures["lsuv_forwards"] = all_of_it.get_total_flops() / once.get_total_flops()
    return figures


def benchmark(*, json_file: Annotated[Path, tyro.conf.arg(name="json")], quick: bool = False) -> None:
    """Measure the cost of initialisers.

    Args:
        json_file: Where the figures go.
        quick: Fewer iterations and rounds.
    """
    figures = cost_figures(quick)
    show(figures)
    store(json_file, figures)


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(run(lambda: tyro.cli(benchmark)))
