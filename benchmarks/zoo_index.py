"""How fast does a zoo of a million runs open, is it filtered, looked at and resumed? A simulated index over simulated
files.

The index holds as many runs as a zoo of a million networks would have, drawn from a few factors; the files are there,
with names, sizes and times, but empty: a reader that believes its index opens none of them. Two shapes: 3,907 files of
256 networks, and 125,000 files of 8. The plan that they fulfil lies beside them, so that `collect status` and `collect
run` find all done. Besides, real files are indexed from nothing: what a lost index costs.

    python benchmarks/zoo_index.py --json zoo_index.json [--quick]

Prints a table and writes its figures as flat JSON with machine, versions and commit. Times are seconds of wall time on
one core, medians over rounds, with all files in the page cache.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

sys.path = [str(Path(__file__).parents[1]), *(place for place in sys.path if Path(place) != Path(__file__).parent)]

from benchmarks.measuring import show, store  # noqa: E402
from collect import cli, data, index, plan, zoo_file  # noqa: E402
from collect.index import Index  # noqa: E402
from collect.plan import Task  # noqa: E402
from collect.population import train  # noqa: E402
from collect.recipe import Recipe  # noqa: E402
from collect.runner import collect  # noqa: E402
from collect.runs import Coded  # noqa: E402
from collect.split import split_of  # noqa: E402
from collect.zoo import Zoo  # noqa: E402
from generators.commandline import run  # noqa: E402

RECIPE = Recipe(architecture="resnet-8-w4", epochs=1, batch_size=256)
FACTORS = {
    "architecture": tuple(f"resnet-{depth}-w{width}" for depth in (8, 14, 20) for width in (4, 8, 16)),
    "init": ("he", "xavier", "orthogonal", "he+lsuv"),
    "lr": (0.02, 0.05, 0.1, 0.2),
    "weight_decay": (0.0, 5e-4),
    "status": ("ok",) * 19 + ("diverged",),
}


@dataclass(frozen=True)
class Size:
    """How much is run: runs in the simulated zoo, rounds, and real files that are indexed from nothing."""

    runs: int = 1_000_000
    rounds: int = 5
    real: int = 64


QUICK = Size(runs=100_000, rounds=3, real=16)


def simulate(template: Index, folder: Path, tasks: list[Task]) -> Index:
    """An index of random runs in the populations of a plan, and files without bytes for it."""
    random = np.random.default_rng(0)
    names = sorted(task.id for task in tasks)
    files, together = len(tasks), len(tasks[0].seeds)
    runs = sum(len(task.seeds) for task in tasks)
    folder.mkdir(parents=True)
    plan.save(tasks, folder)
    stats = []
    for name in names:
        path = folder / f"{name}{zoo_file.SUFFIX}"
        path.touch()
        stats.append(path.stat())
    ids = [f"{number:016x}" for number in random.integers(2**63, size=runs).tolist()]
    number = np.arange(runs) // together
    table = template.runs.take(np.zeros(runs, dtype=int))
    table.columns |= {
        "id": np.array(ids, dtype=np.bytes_),
        "population": Coded(number.astype(np.min_scalar_type(files)), tuple(names)),
        "row": (np.arange(runs) % together).astype(np.int32),
        "split": Coded.of([split_of(each) for each in ids]),
        "seed": random.integers(2**62, size=runs),
    }
    for name, values in FACTORS.items():
        codes = random.integers(len(values), size=files)[number]
        table.columns[name] = Coded.of([values[code] for code in codes.tolist()])
    for name in table.columns:
        if name.endswith(("_accuracy", "_loss")):
            table.columns[name] = random.random(runs, dtype=np.float32)
    populations = {name: np.repeat(column, files) for name, column in template.populations.items()}
    populations |= {
        "id": np.array(names, dtype=np.bytes_),
        "file": np.array([f"{name}{zoo_file.SUFFIX}" for name in names], dtype=np.bytes_),
        "size": np.array([each.st_size for each in stats]),
        "mtime_ns": np.array([each.st_mtime_ns for each in stats]),
        "runs": np.bincount(number),
    }
    made = Index(table, populations, template.layouts, repeated=np.zeros(0, dtype=np.int64))
    index.save(made, folder / index.NAME)
    return made


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median wall time."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def question(zoo: Zoo) -> Zoo:
    """A filter as a user would write it."""
    return zoo.where(arch="resnet-8-w8", val_acc__gt=0.5, lr__le=0.1, status="ok", split="train")


def look(folder: Path) -> None:
    """`python -m collect status`, and nothing on the screen."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        cli.status(folder)


def resume(folder: Path) -> None:
    """`python -m collect run --plan`, where nothing is left to do."""
    (path,) = folder.glob("plan-*.json")
    tasks, _ = plan.read(path)
    plan.check(tasks)
    assert len(collect(tasks, folder, workers=0).found) == len(tasks)


def measure(folder: Path, size: Size) -> dict[str, float]:
    """All figures."""
    trained = train(RECIPE, (0,), data.load("digits"))
    header = zoo_file.read_header(zoo_file.write(trained, folder / "one"))
    template = index.of([header], folder / "one")
    assert template is not None
    figures: dict[str, float] = {"index_runs": size.runs}
    for suffix, together in (("", 256), ("_small_files", 8)):
        place = folder / f"simulated{suffix}"
        tasks = plan.plan([RECIPE], runs=size.runs, together=together)
        made = simulate(template, place, tasks)
        zoo = Zoo(place)
        chosen = question(zoo)
        columns = {
            name: made.runs.column(name) for name in ("architecture", "validation_accuracy", "lr", "status", "split")
        }
        expected = (
            (columns["architecture"] == "resnet-8-w8") & (columns["validation_accuracy"] > 0.5) & (columns["lr"] <= 0.1)
            & (columns["status"] == "ok") & (columns["split"] == "train")
        )  # fmt: skip
        assert not zoo.bad and chosen.column("id").tolist() == made.runs.column("id")[expected].tolist()
        figures |= {
            f"index_files{suffix}": len(made),
            f"index_open_s{suffix}": seconds(lambda place=place: Zoo(place), size.rounds),
            f"index_filter_s{suffix}": seconds(lambda zoo=zoo: question(zoo), size.rounds),
            f"index_bytes_per_run{suffix}": (place / index.NAME).stat().st_size / size.runs,
            f"status_s{suffix}": seconds(lambda place=place: look(place), size.rounds),
            f"resume_s{suffix}": seconds(lambda place=place: resume(place), size.rounds),
        }
    figures |= {f"rebuild_ms_per_file{suffix}": rebuild(trained, folder / f"real{suffix}", together, size)
                for suffix, together in (("", 256), ("_small_files", 8))}  # fmt: skip
    return figures


def rebuild(trained, folder: Path, together: int, size: Size) -> float:
    """Milliseconds per real file of `together` networks to open a zoo whose index is lost."""
    for number in range(size.real):
        seeds = tuple(range(number * together, (number + 1) * together))
        tile = {name: np.repeat(getattr(trained, name), together, axis=0) for name in ("weights", "buffers", "metrics")}
        zoo_file.write(replace(trained, seeds=seeds, status=("ok",) * together, **tile), folder)

    def lost() -> None:
        (folder / index.NAME).unlink(missing_ok=True)
        Zoo(folder)

    return 1000 * seconds(lost, size.rounds) / size.real


MEANING = {
    "index_runs": "runs in the simulated zoo",
    "index_files": "files of 256 networks",
    "index_open_s": "seconds to open it",
    "index_filter_s": "seconds for `where` with five conditions",
    "index_bytes_per_run": "bytes of the index per run",
    "status_s": "seconds for `collect status`, once imported",
    "resume_s": "seconds for `collect run --plan` to see that nothing is left to do, once imported",
    "rebuild_ms_per_file": "milliseconds per real file if the index is lost",
}


def meaning(figure: str) -> str:
    """What a figure is."""
    if figure.endswith("_small_files"):
        return MEANING[figure.removesuffix("_small_files")].replace("256", "8") + ", files of 8"
    return MEANING[figure]


def benchmark(*, json_file: Annotated[Path, tyro.conf.arg(name="json")], quick: bool = False) -> None:
    """Measure how fast an index opens and filters, and how fast `collect` sees what is done.

    Args:
        json_file: Where the figures go.
        quick: A tenth of the runs; ends within a minute.
    """
    json_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=json_file.parent, prefix="zoo_index-") as folder:
        figures = measure(Path(folder), QUICK if quick else Size())
    show(figures, meaning)
    store(json_file, figures)


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("collect").setLevel(logging.WARNING)
    raise SystemExit(run(lambda: tyro.cli(benchmark)))
