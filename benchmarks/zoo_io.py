"""How fast are networks stored and read? Population files beside the obvious way, one HDF5 group per network.

Both write the same networks (of about 5,000 weights) in turns, and end with an fsync. Ours are whole population files:
digests, tables, rename protocol. Then random batches of 256 networks are read back by every path of `collect.flat`.

    python benchmarks/zoo_io.py --json zoo_io.json [--quick]

Prints a table and writes its figures as flat JSON with machine, versions and commit. Rates are networks per second of
wall time, medians over interleaved rounds; files lie beside the JSON file while it runs, in the page cache when read.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import h5py
import numpy as np
import torch
import tyro

sys.path = [str(Path(__file__).parents[1]), *(place for place in sys.path if Path(place) != Path(__file__).parent)]

from benchmarks.measuring import show, store  # noqa: E402
from collect import data, zoo_file  # noqa: E402
from collect.flat import Flat  # noqa: E402
from collect.population import Population, train  # noqa: E402
from collect.recipe import Recipe  # noqa: E402
from collect.zoo import Zoo  # noqa: E402
from generators.commandline import run  # noqa: E402

ARCHITECTURE = "resnet-8-w4"
BATCH = 256
LARGE, SMALL = 256, 8  # networks per file: as many as a plan puts into one, and as few


@dataclass(frozen=True)
class Size:
    """How much is run: rounds, files of `LARGE` networks per round, random batches per round."""

    rounds: int = 9
    files: int = 8
    batches: int = 200


QUICK = Size(rounds=3, files=2, batches=40)


def populations(template: Population, together: int, count: int, first: int) -> Iterator[Population]:
    """Populations of `together` networks that no training made: random weights in the layout of the template."""
    random = np.random.default_rng(first)
    for start in range(first, first + together * count, together):
        tile = {
            name: np.repeat(getattr(template, name)[:1], together, axis=0) for name in ("weights", "buffers", "metrics")
        }
        tile["weights"] = random.standard_normal(tile["weights"].shape, dtype=np.float32)
        yield replace(template, seeds=tuple(range(start, start + together)), status=("ok",) * together, **tile)


def write_groups(population: Population, path: Path) -> None:
    """The slow obvious twin: one file, a group per network, a dataset per tensor."""
    with h5py.File(path, "w") as file:
        for member, seed in enumerate(population.seeds):
            group = file.create_group(f"network-{seed}")
            for layout, rows in (
                (population.layout, population.weights),
                (population.buffer_layout, population.buffers),
            ):
                for spec in layout:
                    values = rows[member, -1, spec.offset : spec.offset + spec.length]
                    group.create_dataset(spec.name, data=values.reshape(spec.shape))
            group.create_dataset("metrics", data=population.metrics[member])
    with path.open("rb") as written:
        os.fsync(written.fileno())


def read_groups(path: Path, template: Population, names: list[str]) -> np.ndarray:
    """Networks of `write_groups` as rows."""
    with h5py.File(path, "r") as file:
        return np.stack(
            [np.concatenate([file[name][spec.name][()].ravel() for spec in template.layout]) for name in names]
        )


class Rates:
    """Networks per second of everything that was timed."""

    def __init__(self) -> None:
        self._all: dict[str, list[float]] = defaultdict(list)

    def time(self, name: str, networks: int, work: Callable[[], object]) -> None:
        """Time one piece of work on so many networks."""
        start = time.perf_counter()
        work()
        self._all[name].append(networks / (time.perf_counter() - start))

    def median(self, name: str) -> float:
        return statistics.median(self._all[name])


def measure(folder: Path, size: Size) -> dict[str, float]:
    """All figures."""
    rates = Rates()
    template = train(Recipe(architecture=ARCHITECTURE, epochs=1, batch_size=256), (0,), data.load("digits"))
    large, small, groups = folder / "large", folder / "small", folder / "groups.h5"
    for turn in range(size.rounds):
        first = turn * size.files * LARGE
        stacks = list(populations(template, LARGE, size.files, first))
        rates.time("large", LARGE * size.files, lambda stacks=stacks: [zoo_file.write(each, large) for each in stacks])
        few = list(populations(template, SMALL, 8, first))
        rates.time("small", SMALL * 8, lambda few=few: [zoo_file.write(each, small) for each in few])
        rates.time("groups", LARGE, lambda stack=stacks[0]: write_groups(stack, groups))
    files = sorted(large.glob(f"*{zoo_file.SUFFIX}"))[: size.files]
    for _ in range(size.rounds):
        rates.time("verify", LARGE * len(files), lambda: [zoo_file.verify(path) for path in files])
    names = [f"network-{seed}" for seed in stacks[0].seeds]
    flat = Zoo(large).flat()
    expected = np.concatenate([stack.weights[:, -1] for stack in stacks[:1]])
    assert np.array_equal(read_groups(groups, template, names), expected)  # both hold the same networks
    ram = torch.from_numpy(flat.matrix())
    generator = torch.Generator().manual_seed(0)
    for _ in range(size.rounds):
        batches = [torch.randint(len(flat), (BATCH,), generator=generator) for _ in range(size.batches)]
        assert torch.equal(flat.batch(batches[0]), ram[batches[0]])
        networks = BATCH * size.batches
        rates.time("mapped", networks, lambda batches=batches: [flat.batch(each) for each in batches])
        rates.time("ram", networks, lambda batches=batches: [ram[each] for each in batches])
        rates.time("blocks", len(flat), lambda: blocks(flat, generator))
        chosen = [names[index] for index in torch.randperm(len(names), generator=generator)[:64]]
        rates.time("group_read", len(chosen), lambda chosen=chosen: read_groups(groups, template, chosen))
    return {
        "durable_nets_per_s": rates.median("large"),
        "durable_nets_per_s_small_files": rates.median("small"),
        "group_per_net_nets_per_s": rates.median("groups"),
        "group_per_net_ratio": rates.median("large") / rates.median("groups"),
        "verified_nets_per_s": rates.median("verify"),
        "random_nets_per_s": rates.median("mapped"),
        "ram_nets_per_s": rates.median("ram"),
        "block_shuffle_nets_per_s": rates.median("blocks"),
        "group_per_net_read_nets_per_s": rates.median("group_read"),
        "group_per_net_read_ratio": rates.median("mapped") / rates.median("group_read"),
        "weights_per_net": flat.columns,
        "bytes_per_net": files[0].stat().st_size / LARGE,
        "bytes_per_net_small_files": next(small.glob(f"*{zoo_file.SUFFIX}")).stat().st_size / SMALL,
        "nets": len(flat),
    }


def blocks(flat: Flat, generator: torch.Generator) -> int:
    """One whole pass in shuffled blocks."""
    return sum(len(rows) for _, rows in flat.blocks(BATCH, generator))


MEANING = {
    "durable_nets_per_s": f"written, {LARGE} networks per file",
    "durable_nets_per_s_small_files": f"written, {SMALL} networks per file",
    "group_per_net_nets_per_s": "written, one group per network",
    "group_per_net_ratio": "first row / third row",
    "verified_nets_per_s": "read whole and compared with their digests",
    "random_nets_per_s": "read, memory-mapped, random batches",
    "ram_nets_per_s": "read, from RAM, random batches",
    "block_shuffle_nets_per_s": "read, block shuffle, files opened anew",
    "group_per_net_read_nets_per_s": "read, one group per network, random",
    "group_per_net_read_ratio": "mapped / one group per network",
    "weights_per_net": f"weights of a {ARCHITECTURE}",
    "bytes_per_net": f"bytes on the disk per network, {LARGE} per file",
    "bytes_per_net_small_files": f"bytes on the disk per network, {SMALL} per file",
    "nets": "networks in the zoo",
}


def benchmark(*, json_file: Annotated[Path, tyro.conf.arg(name="json")], quick: bool = False) -> None:
    """Measure how fast a zoo is written and read.

    Args:
        json_file: Where the figures go.
        quick: A smaller version that ends within a minute.
    """
    json_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=json_file.parent, prefix="zoo_io-") as folder:
        figures = measure(Path(folder), QUICK if quick else Size())
    show(figures, MEANING.__getitem__)
    store(json_file, figures)


if __name__ == "__main__":
    torch.set_num_threads(1)
    raise SystemExit(run(lambda: tyro.cli(benchmark)))
