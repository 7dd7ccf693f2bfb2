"""`python -m collect plan | run | status | verify | pack | card`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated

import tyro

from collect import failures, index, packed, unfinished
from collect.card import place_of
from collect.card import write as write_card
from collect.flags import RunConfig
from collect.index import Index
from collect.plan import read, saved_plans, write
from collect.provenance import provenance
from collect.runner import collect
from collect.screens import counted, first_few, in_words, lasting, plan_table, show, swept, table_of, zoo_table
from collect.spec import tasks_of
from collect.standing import standings
from collect.zoo import Zoo, scan
from collect.zoo_file import SUFFIX, Header
from generators.commandline import progress
from generators.errors import ConfigError, ZooError

DESCRIPTION = """Train many networks and keep their weights and learning curves in a zoo, a folder of HDF5 files.

Example, half a minute on two cores, nothing to download:
  python -m collect run --data digits --architectures resnet-8-w4 mlp-2-w32 --runs 8 --epochs 5 --out zoo/
  python -m collect status zoo/

Larger sweeps are written down in a spec, from which a plan follows (`python -m collect plan --help`):
  python -m collect plan SPEC.json --out PLAN.json
  python -m collect run --plan PLAN.json --out zoo/

A run that was interrupted or killed goes on where it was when the same command is given again."""


# --- planning ----------------------------------------------------------------------------------------------------


def plan(
    spec: tyro.conf.Positional[Path], *, out: Path | None = None, data_root: Path | None = None, download: bool = False
) -> None:
    """Make a plan from a spec: which networks are trained, and in which files they will be. Nothing is trained.

    A spec is JSON. "recipe" holds for all networks, "grid" is every combination of its lists, and every combination is
    trained under each of the draws of "random" (uniform, log_uniform or integer from [low, high], integer also from
    [low, high, step], choice); "runs" times each:

      {"seed": 0, "runs": 8,
       "recipe": {"data": "digits", "epochs": 20, "saved": "all"},
       "grid": {"family": ["resnet"], "depth": [8, 14], "width": [4, 8], "init": ["he", "orthogonal"]},
       "random": {"count": 10, "lr": {"log_uniform": [0.01, 0.3]}, "momentum": {"choice": [0.8, 0.9]}}}

    Fields are those of collect.recipe.Recipe (the flags of `collect run`), with family, depth and width in place of
    architecture if you like. Optional: "first_seed"; "seeds": "paired" (0, 1, ... under every recipe, for comparisons)
    or "independent" (hashed, so that seed and recipe are not confounded); "together", the most networks in one file.

    Args:
        spec: the spec; or a plan, to look at it.
        out: the plan to write; without it, the plan is only shown.
        data_root: folder of downloaded data sets.
        download: fetch data sets that are not there.
    """
    tasks, made_from = tasks_of(spec, root=data_root, download=download)
    if out is not None:
        if out.exists():
            read(out)  # refuses to overwrite what is no plan
        write(tasks, out, spec=made_from)
    recipes = list(dict.fromkeys(task.recipe for task in tasks))
    networks, cost = sum(len(task.seeds) for task in tasks), sum(task.cost for task in tasks)
    counts = (
        f"{counted(len(recipes), 'recipe')}, {counted(networks, 'network')} in {counted(len(tasks), 'population')}, "
        f"{cost:.2g} operations"
    )
    differ = swept(recipes)
    show(f"{out or spec}: {counts}", table=plan_table(tasks), notes=[f"swept: {differ}"] if differ else [])


# --- training ----------------------------------------------------------------------------------------------------


# Flags that say where and how, not what.
NOT_PLANNED = ("out", "plan", "workers", "device", "executor", "address", "gpus", "slurm", "data_root", "download",
               "verify")  # fmt: skip


def _refuse_flags(path: Path) -> None:
    """Raise `ConfigError` if the command line says what to train beside the plan."""
    flags = {f"--{each.name}".replace("_", "-") for each in fields(RunConfig) if each.name not in NOT_PLANNED}
    given = {argument.split("=")[0].replace("_", "-").replace("--no-", "--") for argument in sys.argv[1:]}
    if both := sorted(flags & given):
        raise ConfigError(
            f"--plan {path} says all that is trained, so {', '.join(both)} cannot be given beside it; change the spec, "
            "or leave out --plan"
        )


def run(config: Annotated[RunConfig, tyro.conf.arg(name="")]) -> None:
    """Train networks and store them; given again, it trains what is missing.

    What is there is believed if the zoo's index knows a file of its size and time of change; other files are opened and
    their structure is checked. With --verify, every byte is compared with the digests. Damaged files are moved aside
    and their networks trained anew.

    Example: python -m collect run --data digits --architectures resnet-8-w8 resnet-14-w8 --init he --runs 8
    --epochs 20 --out zoo/, or, after python -m collect plan SPEC.json --out PLAN.json: python -m collect run --plan
    PLAN.json --out zoo/
    """
    if config.plan is not None:
        _refuse_flags(config.plan)
        tasks, spec = tasks_of(config.plan, root=config.data_root, download=config.download)
    elif config.architectures:
        made = config.spec()
        tasks, spec = made.plan(root=config.data_root, download=config.download), made.to_json()
    else:
        raise ConfigError("nothing to train: name --architectures, like resnet-8-w4, or a --plan")
    executor = config.made_executor()
    how = {name: value for name, value in asdict(config).items() if name in NOT_PLANNED}
    stored = {"format": 2, "command": "collect run", "spec": spec, "config": how, "provenance": provenance()}
    networks = sum(len(task.seeds) for task in tasks)
    with progress(f"training {networks} networks", networks) as bar:
        collect(
            tasks, config.out, executor=executor, root=config.data_root, device=config.device, verify=config.verify,
            config=stored, on_progress=bar.advance,
        )  # fmt: skip
    status(config.out)


# --- zoos --------------------------------------------------------------------------------------------------------


def _contents(folder: Path) -> tuple[Index | None, dict[Path, ZooError]]:
    """What lies in a zoo, None if nothing usable, and its bad files, each with its fault."""
    if folder.is_dir():
        return index.open_index(folder)
    headers, bad = scan(folder)
    return index.of(headers, folder), bad


def status(folder: tyro.conf.Positional[Path]) -> None:
    """Show what a zoo holds and what its plans still miss.

    Files that the zoo's index knows are not opened; for a look at every byte there is `python -m collect verify`.

    Example: python -m collect status zoo/

    Args:
        folder: the zoo.
    """
    found, bad = _contents(folder)
    plans, bad_plans = saved_plans(folder)
    planned = {task.id: task for tasks in plans.values() for task in tasks}
    there = {} if found is None else found.entries("runs")
    missing = [task for name, task in planned.items() if name not in there]
    failed = {name: each for name, each in failures.read(folder).items() if name not in there}
    broken = {path.name.removesuffix(SUFFIX) for path in bad}
    notes = _left_out(folder) if folder.is_file() else []
    notes += [in_words(each) for each in standings(folder, plans, found, failed.keys() | broken)]
    notes += first_few([str(each) for each in failed.values()], f"in {folder / failures.FOLDER}")
    if begun := unfinished.begun(folder) & {task.id for task in missing}:
        notes.append(f"the training of {len(begun)} of the missing files has begun: its state is saved")
    strangers = [size for name, size in there.items() if name not in planned] if plans else []
    if strangers:
        notes.append(f"{sum(strangers)} networks in {len(strangers)} files belong to no plan here")
    minutes = 0.0 if found is None else sum(found.entries("seconds").values()) / 60
    show(
        f"{folder}: {sum(there.values())} networks, {lasting(minutes)} of training",
        table=zoo_table(None if found is None else found.runs, missing),
        bad=[*bad.values(), *bad_plans.values()], notes=notes,
    )  # fmt: skip


def _unusable(folder: Path, bad: Collection[Path], good: Sequence[Header]) -> str:
    names = ", ".join(path.name for path in bad)
    return f"{len(bad)} of {len(bad) + len(good)} files in {folder} are not usable: {names}"


def _left_out(path: Path) -> list[str]:
    """Notes on what a packed zoo was made without."""
    names = packed.left_out(path)
    return [f"{path} was made without {len(names)} damaged files: {', '.join(names)}"] if names else []


def verify(folder: tyro.conf.Positional[Path]) -> None:
    """Compare every byte of weights and metrics in a zoo with its digests; exit code 2 if a file is damaged.

    Example: python -m collect verify zoo/

    Args:
        folder: the zoo.
    """
    headers, bad = scan(folder, verify=True)
    table = table_of("file", "networks", "digest", left=("file", "digest"))
    for header in headers:
        table.add_row(header.path.name, str(len(header.runs)), header.digest)
    show(f"{folder}: {len(headers)} files whole, {len(bad)} not usable", table=table, bad=bad.values())
    if bad:
        raise ZooError(_unusable(folder, bad, headers))


def pack(folder: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path], *, partial: bool = False) -> None:
    """Copy every whole population of a zoo into one HDF5 file, to publish; `Zoo(OUT.h5)` reads it where it lies.

    Example: python -m collect pack zoo/ zoo.h5

    Args:
        folder: the zoo.
        out: the file to make.
        partial: leave damaged populations out, and say so in the file; without it nothing is packed if there are any.
    """
    headers, bad = scan(folder, verify=True)
    if bad and not partial:
        show(f"{folder}: nothing is packed", bad=bad.values())
        raise ZooError(
            f"{_unusable(folder, bad, headers)}; train them again by the command that made the zoo, with --verify, or "
            "pack the others with --partial"
        )
    path = packed.write(headers, out, left_out={path.name: str(error) for path, error in bad.items()})
    networks = sum(len(header.runs) for header in headers)
    title = f"{path}: {networks} networks in {len(headers)} populations, {path.stat().st_size / 1e6:.1f} MB, digest "
    show(f"{title}{packed.zoo_digest(headers)}", bad=bad.values(), notes=_left_out(path))


def card(folder: tyro.conf.Positional[Path], *, out: Path | None = None, licence: str | None = None) -> None:
    """Write the data card of a zoo: counts, factors, accuracies with a picture, failures, duplicates, how to cite.

    Example: python -m collect card zoo/ --licence CC-BY-4.0

    Args:
        folder: the zoo, a folder or a packed file.
        out: the card, a Markdown file; card.md in the zoo's folder, or beside a packed file, if not given.
        licence: of the networks, such as CC-BY-4.0.
    """
    path = write_card(Zoo(folder), out or place_of(folder), licence=licence)
    show(f"{path} and {path.with_suffix('.png').name} are written")


def main() -> None:
    """Parse the command line and run the command."""
    commands: dict[str, Callable[..., None]] = {
        "plan": plan, "run": run, "status": status, "verify": verify, "pack": pack, "card": card
    }  # fmt: skip
    tyro.extras.subcommand_cli_from_dict(commands, prog="python -m collect", description=DESCRIPTION)
