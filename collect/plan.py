"""What to collect: recipes times seeds, cut into tasks; and the plan file that says so.

A task is one population: up to `together` networks of one recipe, trained together and stored in one file. A plan is a
pure function of its arguments and the data's digest, so the same call names the same files on every machine. Everything
that can be wrong with it is found here, before anything is trained.

A plan file is JSON, with one line for every recipe and every task, so that plans can be searched and compared:

    {"format": 2, "spec": what `collect.spec` made it from or null, "recipes": [{...}, ...],
     "tasks": [{"id": ..., "recipe": index, "seeds": [...], "data_digest": ..., "cost": ..., "stack": 0}, ...]}
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from collect import data
from collect.cost import operations
from collect.durable import durable
from collect.recipe import Recipe, population_id, run_ids
from generators.errors import ConfigError, DataError, PowerhouseError, ZooError, unknown_name
from generators.initialiser import resolve
from generators.seeds import derive

FORMAT = 2  # of the plan file; format 1 had every recipe once per task
FEWEST, MOST = 8, 256  # networks per population, where nobody says how many: small files are slow to write and to open
LONGEST = 1e13  # operations of a population of more than FEWEST networks: some minutes of one core
MOST_PLANNED = 10_000_000  # networks in one plan
LARGEST_SEED = 2**53  # every reader of JSON and of float columns keeps the seeds below it


@dataclass(frozen=True)
class Task:
    """One population to train.

    Attributes:
        recipe: how.
        seeds: one per network.
        data_digest: of the data set that the plan was made for.
        cost: estimated floating-point operations, for balance only.
        stack: how many of the networks train as one stack, 0 for all; a matter of speed, so it is in no id.
    """

    recipe: Recipe
    seeds: tuple[int, ...]
    data_digest: str
    cost: float = field(default=0.0, compare=False)
    stack: int = field(default=0, compare=False)

    @functools.cached_property
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


def init_digest(spec: str) -> str:
    """`spec` with every checkpoint named by the digest of its content; "" if there is none in it.

    Raises:
        UnknownNameError: a step of the chain does not exist.
        CheckpointError: a checkpoint cannot be loaded.
    """
    chain = resolve(spec)
    digests = [getattr(step, "digest", "") for step in chain]
    return "+".join(digest or step.name for digest, step in zip(digests, chain, strict=True)) if any(digests) else ""


def _size(start: int, cost: float) -> int:
    """Networks in the file that begins with the run at position `start` of its recipe, if one costs `cost` operations.

    It doubles as the recipe grows, never to more than a fifth of the networks up to its end, so that there are files
    for several workers. It does not depend on how many runs are planned: a plan for more has the same first files.
    """
    size = FEWEST
    while 2 * size <= min(MOST, start // 4) and 2 * size * cost <= LONGEST:
        size *= 2
    return size


def _cut(seeds: Sequence[int], together: int | None, cost: float) -> Iterator[tuple[int, ...]]:
    """The seeds of one recipe, file by file."""
    start = 0
    while start < len(seeds):
        stop = start + (together or _size(start, cost))
        yield tuple(seeds[start:stop])
        start = stop


def _seeds(recipe: Recipe, data_digest: str, indices: Sequence[int], root_seed: int | None) -> Sequence[int]:
    """The indices, or numbers below `LARGEST_SEED` that no other recipe has."""
    if root_seed is None:
        return indices
    return [derive(root_seed, "run", name) % LARGEST_SEED for name in run_ids(recipe, data_digest, indices)]


def plan(
    recipes: Iterable[Recipe],
    *,
    runs: int,
    first_seed: int = 0,
    root_seed: int | None = None,
    together: int | None = None,
    root: str | Path | None = None,
    download: bool = False,
) -> list[Task]:
    """The tasks that train `runs` networks of every recipe.

    Runs have the seeds `first_seed, first_seed + 1, ...` under every recipe: those with equal seeds see the same
    batches and are pairs in a comparison of initialisers. With a `root_seed`, every run has a seed of its own instead,
    hashed from the root seed, the recipe and the run's number: seed and recipe are independent, there are no pairs.

    Args:
        recipes: what to train; a recipe that is named twice counts once.
        runs: networks per recipe.
        first_seed: seed, or number, of the first run; raise it by `runs` to add networks to a zoo.
        root_seed: of independent seeds, None for paired ones.
        together: most networks per population, None for a number that follows from the runs and what one costs.
        root: where data sets lie, see `collect.data.load`.
        download: fetch data sets that are not there.

    Raises:
        ConfigError: nothing to train, too much for one plan, or an architecture or batch size that does not fit the
            data.
        UnknownNameError: an unknown data set, architecture or initialiser.
        DataError: a data set that cannot be read.
        CheckpointError: a generator that cannot be loaded.
    """
    recipes = list(dict.fromkeys(recipes))
    for name, value, least in (("runs", runs, 1), ("together", together, 1), ("first_seed", first_seed, 0)):
        if value is not None and value < least:
            raise ConfigError(f"plan: {name} must be at least {least}, got {value}")
    if not recipes:
        raise ConfigError("plan: no recipe, so nothing to train; name at least one architecture")
    if first_seed + runs > LARGEST_SEED:
        raise ConfigError(f"plan: seeds must be below {LARGEST_SEED:,}, got first_seed {first_seed}")
    if len(recipes) * runs > MOST_PLANNED:
        raise ConfigError(
            f"plan: {len(recipes)} recipes with {runs} runs each are more than {MOST_PLANNED:,} networks, the most in "
            "one plan; make several, the next one with a first_seed higher by the runs of the last"
        )
    digests = {spec: init_digest(spec) for spec in dict.fromkeys(recipe.init for recipe in recipes)}
    recipes = [replace(recipe, init_digest=digests[recipe.init]) for recipe in recipes]
    loaded = {
        name: data.load(name, root=root, download=download) for name in dict.fromkeys(each.data for each in recipes)
    }
    # Two ways to write one recipe, such as "digits" and "Digits", are one.
    recipes = list({run_ids(each, loaded[each.data].digest, [0])[0]: each for each in recipes}.values())
    costs = [operations(recipe, loaded[recipe.data]) for recipe in recipes]
    indices = range(first_seed, first_seed + runs)
    return [
        Task(recipe, seeds, loaded[recipe.data].digest, float(cost * len(seeds)))
        for recipe, cost in zip(recipes, costs, strict=True)
        for seeds in _cut(_seeds(recipe, loaded[recipe.data].digest, indices, root_seed), together, cost)
    ]


def check(tasks: Iterable[Task], *, root: str | Path | None = None, download: bool = False) -> None:
    """Whether the data sets and checkpoints are still those that a plan was made for; arguments as of `plan`.

    Raises:
        DataError: a data set cannot be read, or has changed.
        ConfigError: a checkpoint has changed.
    """
    for name, expected in dict.fromkeys((task.recipe.data, task.data_digest) for task in tasks):
        found = data.load(name, root=root, download=download).digest
        if found != expected:
            raise DataError(
                f"data set {name!r} has the digest {found}, the plan was made for {expected}: the data have changed; "
                "bring the former data back, or plan again"
            )
    for init, expected in dict.fromkeys((task.recipe.init, task.recipe.init_digest) for task in tasks):
        if init_digest(init) != expected:
            raise ConfigError(f"the checkpoint in {init!r} has changed since the plan was made; plan again")


# --- plan files --------------------------------------------------------------------------------------------------


class NewerPlanError(ZooError):
    """A plan file that a newer version wrote: not damaged, but not for this one."""


def write(tasks: Sequence[Task], path: Path, *, spec: dict[str, Any] | None = None) -> Path:
    """Write a plan file, durably; `spec` is what the tasks follow from, see `collect.spec`."""
    places = {recipe: place for place, recipe in enumerate(dict.fromkeys(task.recipe for task in tasks))}
    rows = [
        {
            "id": task.id, "recipe": places[task.recipe], "seeds": task.seeds, "data_digest": task.data_digest,
            "cost": task.cost, "stack": task.stack,
        } for task in tasks
    ]  # fmt: skip
    recipes, planned = (
        ",\n".join(json.dumps(row, sort_keys=True) for row in part) for part in (map(asdict, places), rows)
    )
    with durable(path) as temporary:
        temporary.write_text(
            f'{{"format": {FORMAT},\n"spec": {json.dumps(spec)},\n'
            f'"recipes": [\n{recipes}\n],\n"tasks": [\n{planned}\n]}}\n'
        )
    return path


def _task(row: dict[str, Any], recipes: Sequence[Recipe], *, believe: bool) -> Task:
    """The task of one row; in format 1 every row has its recipe in full, and neither an id nor a stack."""
    recipe = Recipe(**row["recipe"]) if isinstance(row["recipe"], dict) else recipes[row["recipe"]]
    if not row["seeds"] or not all(type(seed) is int for seed in row["seeds"]):
        raise ValueError(f"seeds must be whole numbers, got {row['seeds']}")
    task = Task(recipe, tuple(row["seeds"]), row["data_digest"], row["cost"], row.get("stack", 0))
    if believe and "id" in row:
        vars(task)["id"] = str(row["id"])  # where a cached property keeps its value
    elif row.get("id", task.id) != task.id:
        raise ValueError(f"it calls a population {row['id']} that this version calls {task.id}")
    return task


def read(path: Path, *, believe: bool = False) -> tuple[list[Task], dict[str, Any] | None]:
    """The tasks of a plan file, and the spec that they were made from, if it is known.

    Args:
        path: the file.
        believe: take the ids that it gives, instead of hashing every run: enough to say what is there, not to train.

    Raises:
        ZooError: missing, damaged, or no plan file.
        NewerPlanError: a newer version wrote it.
    """
    try:
        stored = json.loads(path.read_text())
        if stored["format"] > FORMAT:
            raise NewerPlanError(
                f"{path} has format {stored['format']} and this version reads up to {FORMAT}: a newer version wrote "
                "it; upgrade powerhouse-init, or plan again"
            )
        recipes = [Recipe(**row) for row in stored.get("recipes", ())]
        tasks = [_task(row, recipes, believe=believe) for row in stored["tasks"]]
        if not tasks:
            raise ValueError("it has no task")
    except NewerPlanError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, PowerhouseError) as error:
        raise ZooError(
            f"{path} is no plan of this version ({error}); networks do not depend on it: make it again with "
            "`python -m collect plan`, or delete it"
        ) from error
    return tasks, stored.get("spec")


def digest(tasks: Sequence[Task]) -> str:
    """12 hex digits that name a plan."""
    return hashlib.blake2b("".join(task.id for task in tasks).encode(), digest_size=6).hexdigest()


def save(tasks: Sequence[Task], folder: Path) -> Path:
    """Write the tasks into the zoo, so that it says what it is meant to hold. Equal plans have one file."""
    return write(tasks, folder / f"plan-{digest(tasks)}.json")


def saved_plans(folder: Path) -> tuple[dict[str, list[Task]], dict[Path, ZooError]]:
    """Every plan that was saved in the zoo, by the name of its file, and the files that are not usable, each with its
    fault; none where the zoo is one packed file.
    """
    plans: dict[str, list[Task]] = {}
    bad: dict[Path, ZooError] = {}
    for path in sorted(folder.glob("plan-*.json")) if folder.is_dir() else ():
        try:
            tasks, _ = read(path, believe=True)
        except ZooError as error:
            bad[path] = error
            continue
        if tasks not in plans.values():  # earlier versions gave the file of an equal plan another name
            plans[path.name] = tasks
    return plans, bad
