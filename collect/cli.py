"""`python -m collect run | status | verify | pack | card`."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from collect import packed
from collect.card import place_of
from collect.card import write as write_card
from collect.durable import durable
from collect.plan import TOGETHER, Task, plan, saved, sweep
from collect.provenance import provenance
from collect.recipe import Recipe
from collect.runner import collect
from collect.standing import Standing, standings
from collect.zoo import Zoo, scan
from collect.zoo_file import Header
from generators.commandline import progress
from generators.errors import ZooError

log = logging.getLogger(__name__)

DESCRIPTION = """Train many networks and keep their weights and learning curves in a zoo, a folder of HDF5 files.

Example, half a minute on two cores, nothing to download:
  python -m collect run --data digits --architectures resnet-8-w4 mlp-2-w32 --runs 8 --epochs 5 --out zoo/
  python -m collect status zoo/

A run that was interrupted or killed goes on where it was when the same command is given again."""


@dataclass(frozen=True)
class RunConfig:
    """What is trained: every architecture x every initialiser x every learning rate, `--runs` times each."""

    architectures: tuple[str, ...]
    """Networks as FAMILY-DEPTH-wWIDTH: resnet-20-w16, vgg-6-w16, mobilenet-6-w16, mlp-3-w64, vit-4-w32."""
    out: Path
    """Folder of the zoo; made if it is not there, added to if it is."""
    data: str = "digits"
    """digits (no download), a torchvision set like cifar10, or FILE.npz with x_train, y_train, x_test, y_test."""
    init: tuple[str, ...] = ("he",)
    """Initialisers; `python -m generators list` shows all. Runs with equal seeds under two of them are pairs."""
    lr: tuple[float, ...] = (0.1,)
    """Highest learning rates."""
    runs: int = 8
    """Networks for every combination."""
    first_seed: int = 0
    """Seed of the first run. To add 8 networks to a zoo of 8: --first-seed 8 --runs 8."""
    together: int = TOGETHER
    """Networks trained together in one process and stored in one file."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 64
    """Images per step."""
    optimiser: Literal["sgd", "adamw"] = "sgd"
    """Update rule."""
    momentum: float = 0.9
    """Of SGD; the first beta of AdamW."""
    nesterov: bool = False
    """Nesterov momentum for SGD."""
    weight_decay: float = 5e-4
    """On all parameters."""
    schedule: Literal["cosine", "step", "linear", "constant"] = "cosine"
    """Learning rate over time."""
    warmup_epochs: float = 0.0
    """Linear rise of the learning rate at the start, part of --epochs."""
    augmentation: Literal["none", "shift", "flip-crop"] = "none"
    """Random changes of training images."""
    label_smoothing: float = 0.0
    """Of the training loss."""
    clip_norm: float = 0.0
    """Largest gradient norm of a network, 0 for no clipping."""
    evaluations_per_epoch: int = 1
    """How often metrics are measured; once before any training comes on top."""
    saved: Literal["last", "all"] | tuple[int, ...] = "last"
    """Epochs whose weights are kept: last, all (0 included), or a list of epochs."""
    statistics: Literal["train", "running"] = "train"
    """Batch-norm statistics in evaluations: measured anew on training images, or the running averages."""
    workers: int | None = None
    """Processes; default one per usable core."""
    data_root: Path | None = None
    """Folder of downloaded data sets."""
    download: bool = False
    """Fetch the data set if it is not there."""

    def tasks(self) -> list[Task]:
        """The plan, checked; see `collect.plan.plan` for what it raises."""
        swept = {"architecture": self.architectures, "init": self.init, "lr": self.lr}
        single = {name: value for name, value in asdict(self).items() if name in Recipe.__dataclass_fields__}
        base = Recipe(**single | {name: values[0] for name, values in swept.items() if values})
        return plan(
            sweep(base, **swept), runs=self.runs, first_seed=self.first_seed, together=self.together,
            root=self.data_root, download=self.download,
        )  # fmt: skip


def run(config: Annotated[RunConfig, tyro.conf.arg(name="")]) -> None:
    """Train networks and store them; given again, it trains what is missing.

    Example: python -m collect run --data digits --architectures resnet-8-w8 resnet-14-w8 --init he --runs 8
    --epochs 20 --out zoo/
    """
    tasks = config.tasks()
    resolved = {"format": 1, "command": "collect run", "config": asdict(config), "provenance": provenance()}
    with durable(config.out / "config.json") as temporary:
        temporary.write_text(json.dumps(resolved, indent=1, sort_keys=True, default=str))
    networks = sum(len(task.seeds) for task in tasks)
    with progress(f"training {networks} networks", networks) as bar:
        collect(tasks, config.out, workers=config.workers, root=config.data_root, on_progress=bar.advance)
    status(config.out)


def _show(title: str, table: Table, bad: dict[Path, ZooError]) -> None:
    console = Console(soft_wrap=True)
    console.print(Text(title, style="bold"))
    if table.row_count:
        console.print(table, soft_wrap=False)
    for error in bad.values():
        console.print(Text(f"not usable: {error}", style="red"))


def _in_words(standing: Standing) -> str:
    """One line on where a plan stands."""
    states = ", ".join(f"{getattr(standing, name)} {name}" for name in ("done", "running", "failed", "open"))
    words = [f"{standing.plan}: {standing.networks} networks: {states}"]
    if standing.per_minute is not None:
        rate = f"{standing.per_minute:,.0f}" if standing.per_minute >= 100 else f"{standing.per_minute:.3g}"
        words.append(f"{rate} networks per minute and process")
    if standing.done < standing.networks and standing.minutes_left is not None:
        processes = f"the {standing.processes} at work" if standing.processes > 1 else "one process"
        words.append(f"{standing.minutes_left:.3g} minutes left with {processes}")
    return "; ".join(words)


def status(folder: tyro.conf.Positional[Path]) -> None:
    """Show what a zoo holds and what its plans still miss.

    Args:
        folder: the zoo.
    """
    headers, bad = scan(folder)
    there, planned = {header.id for header in headers}, saved(folder)
    columns = ("data", "architecture", "init", "lr", "epochs")
    rows: dict[tuple, list[Header]] = defaultdict(list)
    missing: dict[tuple, int] = defaultdict(int)
    for task in planned:
        if task.id not in there:
            missing[tuple(getattr(task.recipe, name) for name in columns)] += len(task.seeds)
    for header in headers:
        rows[tuple(header.runs[0][name] for name in columns)].append(header)
    minutes = sum(header.attributes["seconds"] for header in headers) / 60
    table = Table(box=SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    for name in (*columns, "networks", "diverged", "test accuracy"):
        table.add_column(name, justify="left" if name in columns[:3] else "right", no_wrap=name != "init")
    for key in sorted({*rows, *missing}, key=str):
        accuracies = [
            header.metrics[row, -1, header.metric_names.index("test_accuracy")]
            for header in rows[key] for row, run in enumerate(header.runs) if run["status"] == "ok"
        ]  # fmt: skip
        diverged = sum(run["status"] == "diverged" for header in rows[key] for run in header.runs)
        spread = f"{np.mean(accuracies):.3f} ± {np.std(accuracies):.3f}" if accuracies else ""
        networks = sum(len(header.runs) for header in rows[key])
        wanted = f" of {networks + missing[key]}" if missing[key] else ""
        table.add_row(*map(str, key), f"{networks}{wanted}", str(diverged), spread)
    networks = sum(len(header.runs) for header in headers)
    _show(f"{folder}: {networks} networks, {minutes:.1f} minutes of training", table, bad)
    console = Console(soft_wrap=True)
    for each in standings(folder, headers, bad):
        console.print(Text(_in_words(each)))


def verify(folder: tyro.conf.Positional[Path]) -> None:
    """Compare every byte of weights and metrics in a zoo with its digests; exit code 2 if a file is damaged.

    Args:
        folder: the zoo.
    """
    headers, bad = scan(folder, verify=True)
    table = Table("file", "networks", "digest", box=SIMPLE_HEAD, padding=(0, 0), pad_edge=False)
    for header in headers:
        table.add_row(header.path.name, str(len(header.runs)), header.digest)
    _show(f"{folder}: {len(headers)} files whole, {len(bad)} not usable", table, bad)
    if bad:
        names = ", ".join(path.name for path in bad)
        raise ZooError(f"{len(bad)} of {len(bad) + len(headers)} files in {folder} are not usable: {names}")


def pack(folder: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path]) -> None:
    """Copy every whole population of a zoo into one HDF5 file, to publish; `Zoo(OUT.h5)` reads it where it lies.

    Args:
        folder: the zoo.
        out: the file to make.
    """
    headers, bad = scan(folder, verify=True)
    path = packed.write(headers, out)
    networks = sum(len(header.runs) for header in headers)
    title = f"{path}: {networks} networks in {len(headers)} populations, {path.stat().st_size / 1e6:.1f} MB, digest "
    _show(f"{title}{packed.zoo_digest(headers)}", Table(), bad)


def card(folder: tyro.conf.Positional[Path], *, out: Path | None = None, licence: str | None = None) -> None:
    """Write the data card of a zoo: counts, factors, accuracies with a picture, failures, duplicates, how to cite.

    Args:
        folder: the zoo, a folder or a packed file.
        out: the card, a Markdown file; card.md in the zoo's folder, or beside a packed file, if not given.
        licence: of the networks, such as CC-BY-4.0.
    """
    path = write_card(Zoo(folder), out or place_of(folder), licence=licence)
    _show(f"{path} and {path.with_suffix('.png').name} are written", Table(), {})


def main() -> None:
    """Parse the command line and run the command."""
    commands: dict[str, Callable[..., None]] = {
        "run": run, "status": status, "verify": verify, "pack": pack, "card": card
    }  # fmt: skip
    tyro.extras.subcommand_cli_from_dict(commands, prog="python -m collect", description=DESCRIPTION)
