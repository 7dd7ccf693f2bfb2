"""How fast do slices get from a zoo's files into batches? Beside a plain copy of memory, and beside the obvious ways.

Networks with random weights in the layout of a `resnet-20-w16` are stored as a zoo. Then batches of 128 slices of 3x3
are drawn from its largest weight group, with the files in the page cache.

    python benchmarks/slices.py --json slices.json [--quick]

Prints a table and writes its figures as flat JSON with machine, versions and commit. Rates are bytes of slices in
batches per second of CPU time of the process, so that other work on the machine counts less; they are medians over
interleaved rounds. GB are 10^9 bytes.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor

sys.path = [str(Path(__file__).parents[1]), *(place for place in sys.path if Path(place) != Path(__file__).parent)]

from benchmarks.measuring import show, store  # noqa: E402
from collect import data, zoo_file  # noqa: E402
from collect.memory import keep_freed_memory  # noqa: E402
from collect.population import train  # noqa: E402
from collect.recipe import Recipe  # noqa: E402
from collect.zoo import Zoo  # noqa: E402
from generators.commandline import run  # noqa: E402
from generators.local.groups import GroupKey  # noqa: E402
from generators.seeds import stream  # noqa: E402
from train_generators.slices import open_groups  # noqa: E402

ARCHITECTURE = "resnet-20-w16"
BATCH = 128
KEY = GroupKey("conv_weight", (3, 3), 2)


@dataclass(frozen=True)
class Size:
    """How much is run: rounds, networks in the zoo, batches per round, and of the obvious ways."""

    rounds: int = 9
    networks: int = 128
    batches: int = 20_000
    slow_batches: int = 200


QUICK = Size(rounds=3, networks=24, batches=4_000, slow_batches=40)


def write_zoo(folder: Path, networks: int) -> None:
    """One population of so many networks that no training made."""
    one = train(Recipe(architecture=ARCHITECTURE, epochs=1, batch_size=256), (0,), data.load("digits"))
    tile = {name: np.repeat(getattr(one, name), networks, axis=0) for name in ("buffers", "metrics")}
    tile["weights"] = np.random.default_rng(0).standard_normal((networks, *one.weights.shape[1:]), dtype=np.float32)
    zoo_file.write(replace(one, seeds=tuple(range(networks)), status=("ok",) * networks, **tile), folder)


def write_slices(zoo: Zoo, folder: Path) -> list[Path]:
    """The slices of one network, a file each."""
    paths = []
    for _, _, spec, _, values in zoo.where(id=zoo.runs[0]["id"]).tensors(role="conv_weight", kernel=(3, 3)):
        for number, kernel in enumerate(values.reshape(-1, 3, 3)):
            paths.append(folder / f"{spec.name}-{number}.npy")
            np.save(paths[-1], kernel)
    return paths


class Rates:
    """Bytes per second of CPU time of everything that was timed."""

    def __init__(self) -> None:
        self._all: dict[str, list[float]] = defaultdict(list)

    def time(self, name: str, size: int, work: Callable[[], object]) -> None:
        """Time one piece of work on so many bytes."""
        start = time.process_time()
        work()
        self._all[name].append(size / (time.process_time() - start))

    def median(self, name: str) -> float:
        """In GB per second."""
        return statistics.median(self._all[name]) / 1e9


def measure(folder: Path, size: Size) -> dict[str, float]:
    """All figures."""
    write_zoo(folder / "zoo", size.networks)
    zoo, rates = Zoo(folder / "zoo"), Rates()
    sizes = dict(patch=8, depth_buckets=3, slices_per_tensor=1 << 20, ram_limit=1 << 40)
    slices = open_groups(zoo, **sizes)[KEY].train
    pruned = slices.pruned(0.25)
    (folder / "files").mkdir()
    paths, ram = write_slices(zoo, folder / "files"), slices.in_ram()
    plain, copy = torch.zeros(1 << 26), torch.zeros(1 << 26)
    each = 4 * math.prod(KEY.shape)
    weights = zoo.populations[0].weights.nbytes

    def consume(batches: Iterator[Tensor]) -> None:
        for _ in islice(batches, size.batches):
            pass

    def from_ram(step: int) -> Tensor:
        return ram[torch.randint(len(ram), (BATCH,), generator=stream(0, step))]

    def from_files(step: int) -> Tensor:
        chosen = torch.randint(len(paths), (BATCH,), generator=stream(0, step)).tolist()
        return torch.from_numpy(np.stack([np.load(paths[index]) for index in chosen]))

    for turn in range(size.rounds):
        rates.time("copy", plain.nbytes, lambda: copy.copy_(plain))
        rates.time("open", weights, lambda: open_groups(zoo, **sizes))
        for name, source in (("batches", slices), ("pruned", pruned)):
            batches = source.batches(BATCH, seed=0, first=turn * size.batches)
            rates.time(name, size.batches * BATCH * each, lambda batches=batches: consume(batches))
        steps = range(turn * size.slow_batches, (turn + 1) * size.slow_batches)
        for name, batch in (("ram", from_ram), ("files", from_files)):
            rates.time(name, len(steps) * BATCH * each, lambda batch=batch, steps=steps: list(map(batch, steps)))
    return {
        "copy_gb_per_s": rates.median("copy"),
        "slices_gb_per_s": rates.median("batches"),
        "slices_per_copy": rates.median("batches") / rates.median("copy"),
        "slices_pruned_gb_per_s": rates.median("pruned"),
        "slices_ram_gb_per_s": rates.median("ram"),
        "slices_files_gb_per_s": rates.median("files"),
        "slices_per_ram": rates.median("batches") / rates.median("ram"),
        "slices_per_files": rates.median("batches") / rates.median("files"),
        "open_gb_per_s": rates.median("open"),
        "slices_per_s": rates.median("batches") * 1e9 / each,
        "zoo_bytes": weights,
        "group_slices": len(slices),
    }


MEANING = {
    "copy_gb_per_s": "plain copy of 256 MiB",
    "slices_gb_per_s": f"batches of {BATCH} slices from mapped files",
    "slices_per_copy": "of the rate of the plain copy",
    "slices_pruned_gb_per_s": "the same without a quarter of the slices, those of small norm",
    "slices_ram_gb_per_s": "all slices in RAM, one draw of indices per batch",
    "slices_files_gb_per_s": "a file per slice",
    "slices_per_ram": "mapped files / RAM",
    "slices_per_files": "mapped files / a file per slice",
    "open_gb_per_s": "first pass over the weights: the size of every tensor",
    "slices_per_s": "slices in batches from mapped files",
    "zoo_bytes": "weights in the zoo",
    "group_slices": f"training slices of the group {KEY}",
}


def benchmark(*, json_file: Annotated[Path, tyro.conf.arg(name="json")], quick: bool = False) -> None:
    """Measure how fast slices get from a zoo into batches.

    Args:
        json_file: Where the figures go.
        quick: A smaller version that ends within a minute.
    """
    json_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=json_file.parent, prefix="slices-") as folder:
        figures = measure(Path(folder), QUICK if quick else Size())
    show(figures, MEANING.__getitem__)
    store(json_file, figures)


if __name__ == "__main__":
    torch.set_num_threads(1)
    keep_freed_memory()  # as `python -m train_generators` does
    raise SystemExit(run(lambda: tyro.cli(benchmark)))
