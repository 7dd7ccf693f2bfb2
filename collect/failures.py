"""What went wrong: `<zoo>/failed/<population id>.json`, the last failure of a population that is not stored yet.

    {"task": what was trained, "error": in one line, "detail": the traceback or "", "host": where,
     "created": when, "package_version": ..., "git_commit": ..., ...}

A record changes nothing: collecting again tries the population again, and removes the record when it is stored.
"""

from __future__ import annotations

import json
import logging
import socket
from dataclasses import dataclass
from pathlib import Path

from collect.durable import durable
from collect.plan import Task
from collect.provenance import provenance
from generators.errors import ZooError

log = logging.getLogger(__name__)

FOLDER, SUFFIX = "failed", ".json"


@dataclass(frozen=True)
class Failure:
    """Why a population is not there.

    Attributes:
        task: what was to be trained, in one line.
        error: in one line.
        host: where it was tried.
        time: when, in UTC.
    """

    task: str
    error: str
    host: str
    time: str

    def __str__(self) -> str:
        return f"{self.task} failed on {self.host} at {self.time}: {self.error}"


def path_of(folder: str | Path, population: str) -> Path:
    """Where the failure of the population with this id is recorded in the zoo `folder`."""
    return Path(folder) / FOLDER / f"{population}{SUFFIX}"


def record(folder: str | Path, task: Task, error: str, *, detail: str = "") -> None:
    """Replace what was recorded of `task`; where that fails, only a warning tells."""
    facts = {"task": str(task), "error": error, "detail": detail, "host": socket.gethostname(), **provenance()}
    try:
        with durable(path_of(folder, task.id)) as temporary:
            temporary.write_text(json.dumps(facts, indent=1))
    except ZooError as fault:
        log.warning("the failure of %s is not recorded: %s", task, fault)


def read(folder: str | Path) -> dict[str, Failure]:
    """Every failure that is recorded in the zoo `folder`, by the id of its population."""
    found = {}
    for path in sorted((Path(folder) / FOLDER).glob(f"[!.]*{SUFFIX}")):
        try:
            facts = json.loads(path.read_text())
            values = (" ".join(facts[name].split()) for name in ("task", "error", "host", "created"))
            found[path.stem] = Failure(*values)
        except FileNotFoundError:  # it has just succeeded
            continue
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            found[path.stem] = Failure(path.stem, f"{path} cannot be read ({error})", "a machine", "an unknown time")
    return found
