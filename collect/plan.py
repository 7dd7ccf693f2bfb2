"""What to collect: recipes times seeds, cut into tasks.

A task is one population: up to `together` networks of one recipe, trained together and stored in one file. A plan is a
pure function of its arguments and the data's digest, so the same call names the same files on every machine. Everything
that can be wrong with it is found here, before anything is trained.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from collect import data
from collect.architectures import build
from collect.durable import durable
from collect.recipe import Recipe, population_id
from generators.errors import ConfigError, PowerhouseError, ZooError, unknown_name
from generators.initialiser import resolve

TOGETHER = 8  # networks per population: tiny ones train fastest in stacks of 4 to 32 on a CPU


@dataclass(frozen=True)
class Task:
    """One population to train.

    Attributes:
        recipe: how.
        seeds: one per network.
        data_digest: of the data set that the plan was made for.
        cost: estimated floating-point operations, for balance only.
    """

    recipe: Recipe
    seeds: tuple[int, ...]
    data_digest: str
    cost: float = field(default=0.0, compare=False)

    @property
    def id(self) -> str:
        """The id of the population, which is also the name of its file."""
        return population_id(self.recipe, self.data_digest, self.seeds)

    def __str__(self) -> str:
        return (
            f"{self.id} ({self.recipe.architecture}, {self.recipe.init}, lr {self.recipe.lr:g}, {len(self.seeds)} runs)"
        )


def sweep(base: Recipe, **choices: Sequence[Any]) -> list[Recipe]:
    """Every combination of `choices`, in the order they are written: `sweep(base, init=["he", "xavier"], lr=[0.1])`.

    Raises:
        UnknownNameError: a choice is no field of a recipe.
        ConfigError: a combination makes no sense, or a choice has no values.
    """
    known = [each.name for each in fields(Recipe)]
    for name, values in choices.items():
        if name not in known:
            raise unknown_name("recipe field", name, known)
        if isinstance(values, str) or not len(values):
            raise ConfigError(f"sweep: {name} needs a list with at least one value, got {values!r}")
    return [replace(base, **dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]


@functools.cache
def _forward_cost(architecture: str, shape: tuple[int, int, int], classes: int) -> int:
    """Floating-point operations for one image; the model runs on the meta device, so a misfit of shapes shows here."""
    from torch.utils.flop_counter import FlopCounterMode  # imports much

    with torch.device("meta"):
        model = build(architecture, shape=shape, classes=classes).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(1, *shape, device="meta"))
    return counter.get_total_flops()


def init_digest(spec: str) -> str:
    """`spec` with every checkpoint named by the digest of its content; "" if there is none in it.

    Raises:
        UnknownNameError: a step of the chain does not exist.
        CheckpointError: a checkpoint cannot be loaded.
    """
    chain = resolve(spec)
    digests = [getattr(step, "digest", "") for step in chain]
    return "+".join(digest or step.name for digest, step in zip(digests, chain, strict=True)) if any(digests) else ""


def plan(
    recipes: Iterable[Recipe],
    *,
    runs: int,
    first_seed: int = 0,
    together: int = TOGETHER,
    root: str | Path | None = None,
    download: bool = False,
) -> list[Task]:
    """The tasks that train `runs` networks of every recipe.

    Runs have the seeds `first_seed, first_seed + 1, ...` under every recipe: those with equal seeds see the same
    batches and are pairs in a comparison of initialisers.

    Args:
        recipes: what to train; a recipe that is named twice counts once.
        runs: networks per recipe.
        first_seed: seed of the first run; raise it by `runs` to add networks to a zoo.
        together: most networks per population.
        root: where data sets lie, see `collect.data.load`.
        download: fetch data sets that are not there.

    Raises:
        ConfigError: nothing to train, or an architecture or batch size that does not fit the data.
        UnknownNameError: an unknown data set, architecture or initialiser.
        DataError: a data set that cannot be read.
        CheckpointError: a generator that cannot be loaded.
    """
    recipes = list(dict.fromkeys(recipes))
    for name, value, least in (("runs", runs, 1), ("together", together, 1), ("first_seed", first_seed, 0)):
        if value < least:
            raise ConfigError(f"plan: {name} must be at least {least}, got {value}")
    if not recipes:
        raise ConfigError("plan: no recipe, so nothing to train; name at least one architecture")
    digests = {spec: init_digest(spec) for spec in dict.fromkeys(recipe.init for recipe in recipes)}
    recipes = [replace(recipe, init_digest=digests[recipe.init]) for recipe in recipes]
    loaded = {
        name: data.load(name, root=root, download=download) for name in dict.fromkeys(each.data for each in recipes)
    }
    tasks = []
    seeds = range(first_seed, first_seed + runs)
    for recipe in recipes:
        images = loaded[recipe.data]
        if len(images.train) // recipe.batch_size < recipe.evaluations_per_epoch:
            raise ConfigError(
                f"{recipe.data} has {len(images.train)} training images, too few for {recipe.evaluations_per_epoch} "
                f"evaluations per epoch with batches of {recipe.batch_size}; lower one of the two"
            )
        cost = _forward_cost(recipe.architecture, images.shape, len(images.classes))
        cost *= 3 * recipe.epochs * len(images.train)  # a backward pass costs two forward passes
        for start in range(0, runs, together):
            chosen = tuple(seeds[start : start + together])
            tasks.append(Task(recipe, chosen, images.digest, float(cost * len(chosen))))
    return tasks


def save(tasks: Sequence[Task], folder: Path) -> Path:
    """Write the tasks into the zoo, so that it says what it is meant to hold. Equal plans have one file."""
    text = json.dumps({"format": 1, "tasks": [asdict(task) for task in tasks]}, indent=1, sort_keys=True)
    path = folder / f"plan-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}.json"
    with durable(path) as temporary:
        temporary.write_text(text)
    return path


def saved_plans(folder: Path) -> dict[str, list[Task]]:
    """Every plan that was saved in the zoo: name of its file -> its tasks; none where the zoo is one packed file.

    Raises:
        ZooError: a plan file is damaged.
    """
    plans: dict[str, list[Task]] = {}
    for path in sorted(folder.glob("plan-*.json")) if folder.is_dir() else ():
        try:
            plans[path.name] = [
                Task(**row | {"recipe": Recipe(**row["recipe"]), "seeds": tuple(row["seeds"])})
                for row in json.loads(path.read_text())["tasks"]
            ]
        except (OSError, ValueError, LookupError, TypeError, PowerhouseError) as error:
            raise ZooError(
                f"{path} is no plan of this version ({error}); networks do not depend on it: delete it"
            ) from error
    return plans


def saved(folder: Path) -> list[Task]:
    """Every task of every plan that was saved in the zoo, each once, in the order of the plans' file names.

    Raises:
        ZooError: a plan file is damaged.
    """
    return list({task.id: task for tasks in saved_plans(folder).values() for task in tasks}.values())
