"""The spec: what to sweep, as JSON. A plan is a function of it (and of the data's digest) and of nothing else.

    {"format": 1, "seed": 0, "runs": 8,
     "recipe": {"data": "digits", "epochs": 20},
     "grid":   {"family": ["resnet"], "depth": [8, 14], "width": [4, 8], "init": ["he", "orthogonal"]},
     "random": {"count": 100, "lr": {"log_uniform": [0.01, 0.3]}, "momentum": {"choice": [0.8, 0.9]}}}

`recipe` holds for all networks; `grid` is every combination of its lists; `random` draws `count` times one value for
each of its fields (`collect.distributions`), and every combination of the grid is trained under every draw. The fields
are those of `collect.recipe.Recipe`; `family`, `depth` and `width` may take the place of `architecture`.

A draw is a hash of (seed, its number, the name of the field): a larger count, or another field, moves no other draw.
"""

from __future__ import annotations

import itertools
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from collect import plan as plans
from collect.architectures import Architecture
from collect.distributions import checked, draw
from collect.plan import MOST_PLANNED, Task
from collect.recipe import Recipe
from collect.typed import keys, load, typed
from generators.errors import ConfigError, PowerhouseError, unknown_name
from generators.seeds import derive

FORMAT = 1
SEEDS = ("paired", "independent")
PARTS = ("family", "depth", "width")  # of an architecture
FIELDS: dict[str, Any] = {
    name: kind for name, kind in typing.get_type_hints(Recipe).items() if name != "init_digest"
} | {"family": str, "depth": int, "width": int}  # fmt: skip


def _recipe(value: Any) -> dict[str, Any]:
    found = keys(value, FIELDS, "recipe", "recipe field")
    return {name: typed(each, FIELDS[name], f"recipe.{name}") for name, each in found.items()}


def _grid(value: Any) -> dict[str, list]:
    found = keys(value, FIELDS, "grid", "recipe field")
    for name, values in found.items():
        if not typed(values, list, f"grid.{name}"):
            raise ConfigError(f"grid.{name} needs at least one value, got an empty list")
    return {
        name: [typed(each, FIELDS[name], f"grid.{name}[{place}]") for place, each in enumerate(values)]
        for name, values in found.items()
    }


def _random(value: Any) -> dict[str, Any]:
    """The part `random`, checked: the count and a distribution per field."""
    found = keys(value, ("count", *FIELDS), "random", "recipe field")
    if found and "count" not in found:
        raise ConfigError(
            f'random.count is missing: how often {", ".join(found)} shall be drawn, such as "count": 100; each draw is '
            "trained under every combination of the grid"
        )
    if found and (typed(found["count"], int, "random.count") < 1 or len(found) == 1):
        raise ConfigError("random needs a count of at least 1 and at least one field to draw; or leave it out")
    drawn = {name: checked(each, FIELDS[name], f"random.{name}") for name, each in found.items() if name != "count"}
    return {"count": found["count"]} | drawn if found else {}


# --- the spec ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """What to sweep; the fields are the keys of the JSON.

    Attributes:
        format: of the JSON.
        seed: the root of all draws, and of independent seeds.
        runs: networks for every recipe of the sweep.
        first_seed: seed, or number, of the first run; raise it by `runs` to add networks to a zoo.
        seeds: "paired", the same ones under every recipe, for comparisons; or "independent", hashed from root seed,
            recipe and number, so that seed and recipe are not confounded. See `collect.plan.plan`.
        together: most networks per file; None leaves it to the plan.
        recipe: field -> value, for all.
        grid: field -> values; every combination.
        random: field -> distribution, and `count`.

    Raises:
        ConfigError: a value of the wrong kind, a sweep of nothing, or a field that is named twice or missing.
        UnknownNameError: a field or a distribution that does not exist.
    """

    format: int = FORMAT
    seed: int = 0
    runs: int = 8
    first_seed: int = 0
    seeds: str = "paired"
    together: int | None = None
    recipe: dict = field(default_factory=dict)
    grid: dict = field(default_factory=dict)
    random: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ConfigError(f"format must be {FORMAT}, the one that this version reads, got {self.format}")
        if self.seeds not in SEEDS:
            raise unknown_name("kind of seeds", self.seeds, SEEDS)
        for name, check in (("recipe", _recipe), ("grid", _grid), ("random", _random)):
            object.__setattr__(self, name, check(getattr(self, name)))
        self._check_names()

    def _check_names(self) -> None:
        """Every field in one place, and an architecture in full."""
        places: dict[str, str] = {}
        for place in ("recipe", "grid", "random"):
            for name in getattr(self, place):
                if name in places:
                    raise ConfigError(f"{name} stands in {places[name]} and in {place}; name it once")
                places[name] = place
        parts = [name for name in PARTS if name in places]
        if "architecture" in places and parts:
            raise ConfigError(f"architecture says {parts[0]} too; name either architecture or {', '.join(PARTS)}")
        if "architecture" not in places and len(parts) < len(PARTS):
            lacking = ", ".join(name for name in PARTS if name not in parts)
            raise ConfigError(
                f"no architecture, so nothing to train: {lacking} missing; name architecture (like resnet-8-w4), or "
                f"all of {', '.join(PARTS)}"
            )
        recipes = math.prod(map(len, self.grid.values())) * self.random.get("count", 1)
        if recipes > MOST_PLANNED:
            raise ConfigError(f"a sweep of {recipes:,} recipes; a plan has at most {MOST_PLANNED:,} networks")

    def recipes(self) -> list[Recipe]:
        """Every recipe of the sweep, in the order of the draws, then of the grid as it is written.

        Raises:
            ConfigError: a combination makes no sense.
        """
        found = []
        for number in range(self.random.get("count", 1)):
            drawn = {name: self._draw(number, name) for name in self.random if name != "count"}
            for values in itertools.product(*self.grid.values()):
                swept = drawn | dict(zip(self.grid, values, strict=True))
                found.append(_resolved(self.recipe | swept, swept))
        return found

    def _draw(self, number: int, name: str) -> Any:
        place = (derive(self.seed, "sweep", number, name) >> 10) / 2**53  # in [0, 1)
        return typed(draw(self.random[name], place), FIELDS[name], name)

    def plan(self, *, root: str | Path | None = None, download: bool = False) -> list[Task]:
        """The tasks; see `collect.plan.plan` for the arguments and for what it raises."""
        return plans.plan(
            self.recipes(), runs=self.runs, first_seed=self.first_seed, together=self.together, root=root,
            root_seed=self.seed if self.seeds == "independent" else None, download=download,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The JSON that `from_json` reads, without what is empty."""
        return {name: value for name, value in vars(self).items() if value not in ({}, None)}


def _resolved(choices: dict[str, Any], swept: dict[str, Any]) -> Recipe:
    """The recipe of one combination. `swept` is for the error."""
    try:
        parts = {name: choices.pop(name) for name in PARTS if name in choices}
        return Recipe(**choices | ({"architecture": str(Architecture(**parts))} if parts else {}))
    except PowerhouseError as error:
        combination = ", ".join(f"{name} {value}" for name, value in swept.items())
        raise type(error)(f"{error} (the combination: {combination})" if swept else str(error)) from error


# --- files -------------------------------------------------------------------------------------------------------


def from_json(value: Any) -> Spec:
    """The spec that JSON describes. Raises what `Spec` raises."""
    kinds = typing.get_type_hints(Spec)
    if isinstance(value, dict) and type(value.get("format")) is int and value["format"] > FORMAT:
        raise ConfigError(
            f"format {value['format']} is of a newer version, this one reads {FORMAT}; upgrade powerhouse-init"
        )
    for name, each in keys(value, kinds, "the spec", "key").items():
        if typed(each, kinds[name], name) == {}:
            raise ConfigError(f"{name} is empty; name a field of the recipe in it, or leave it out")
    return Spec(**value)


def tasks_of(
    path: Path, *, root: str | Path | None = None, download: bool = False
) -> tuple[list[Task], dict[str, Any] | None]:
    """The tasks of a plan file, whose data must be as they were, or those that follow from a spec; and the spec.

    Raises:
        ConfigError, UnknownNameError: the file is missing, no JSON, or says what makes no sense.
        ZooError: a plan file that is damaged.
        PowerhouseError: as `collect.plan.plan` and `collect.plan.check`.
    """
    value = load(path)
    if isinstance(value, dict) and "tasks" in value:
        tasks, made_from = plans.read(path)
        plans.check(tasks, root=root, download=download)
        return tasks, made_from
    try:
        spec = from_json(value)
        return spec.plan(root=root, download=download), spec.to_json()
    except PowerhouseError as error:
        raise type(error)(f"{path}: {error}") from error
