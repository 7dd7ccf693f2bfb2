"""Where attempts run: in this process, in worker processes, on a Ray cluster, in a SLURM array.

    collect(tasks, folder, executor=make("ray", address="auto"))

Which one it is decides how fast a zoo grows, never what is in it. All but the first two need a folder that every node
sees under the same path.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from collect.executors.base import Executor
from collect.executors.here import Here
from collect.executors.processes import Processes
from collect.executors.ray import Ray
from collect.executors.submitit import Submitit
from generators.errors import ConfigError, unknown_name

__all__ = ["EXECUTORS", "Executor", "make"]

EXECUTORS: dict[str, Callable[..., Executor]] = {
    "here": Here,
    "processes": Processes,
    "ray": Ray,
    "submitit": Submitit,
}


def make(name: str, **settings: Any) -> Executor:
    """The executor called `name`.

    Args:
        name: one of `EXECUTORS`.
        settings: what its class takes; those that are None count as not given.

    Raises:
        UnknownNameError: there is no such executor.
        ConfigError: it has no such setting, or a value makes no sense.
    """
    if name not in EXECUTORS:
        raise unknown_name("executor", name, EXECUTORS)
    given = {key: value for key, value in settings.items() if value is not None}
    known = inspect.signature(EXECUTORS[name]).parameters
    for key in given:
        if key not in known:
            raise ConfigError(f"executor {name!r} has no setting {key!r}; it has: {', '.join(known) or 'none'}")
    return EXECUTORS[name](**given)
