"""The data card of a zoo: what is in it, for those who may want to use it. Markdown, with one picture beside it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from collect import failures
from collect.durable import durable
from collect.packed import left_out, zoo_digest
from collect.recipe import Recipe
from collect.view import PopulationView
from collect.zoo import Zoo
from collect.zoo_file import path_of

PAPER = (
    "C. Harder, M. Fuchs, Y. Tolkach, A. Mukhopadhyay: From Pointwise to Powerhouse: Initialising Neural Networks with "
    "Generative Models. arXiv:2310.16695, 2023."
)
NO_LICENCE = "none stated: ask those who made this zoo (who make a card with `--licence NAME`)"
MOST_VALUES = 12  # values of a factor that are listed one by one


def place_of(zoo: Path) -> Path:
    """Where the card of a zoo lies if nobody says otherwise: `card.md` in its folder, or beside a packed file."""
    return zoo / "card.md" if zoo.is_dir() else zoo.with_suffix(".card.md")


def write(zoo: Zoo, path: Path, *, licence: str | None = None) -> Path:
    """Write the card and its picture (`path` with the suffix .png); earlier ones are replaced.

    Args:
        zoo: opened as a whole.
        path: of the card.
        licence: of the networks, such as "CC-BY-4.0".

    Raises:
        ZooError: the files cannot be written.
    """
    picture = path.with_suffix(".png")
    text = "\n".join(_sections(zoo, picture.name, licence or NO_LICENCE))
    with durable(picture) as temporary:
        _histogram(zoo, temporary)
    with durable(path) as temporary:
        temporary.write_text(text)
    return path


def _sections(zoo: Zoo, picture: str, licence: str) -> Iterable[str]:
    populations = zoo.populations
    runs, states = len(zoo), sum(len(each) * len(each.checkpoint_epochs) for each in populations)
    weights = sum(each.header.weights.shape[2] * len(each) * len(each.checkpoint_epochs) for each in populations)
    status = Counter(zoo.column("status").tolist())
    failed = [name for name in failures.read(zoo.folder) if not path_of(zoo.folder, name).exists()]
    unusable = zoo.bad if zoo.folder.is_dir() else {*zoo.bad, *left_out(zoo.folder)}
    yield f"# Zoo {zoo.folder.stem}\n\nTrained neural networks with their learning curves.\n"
    yield _table(
        ("what", "how many"),
        [
            ("runs (networks trained)", runs),
            ("states (runs x stored epochs)", states),
            ("numbers in all states", weights),
            ("populations (runs trained together)", len(populations)),
            *((f"runs of the {name} split", count) for name, count in sorted(Counter(zoo.column("split")).items())),
        ],
    )
    yield "## Factors\n\nWhat differs between runs; a run is one choice of each, and a seed.\n"
    swept, fixed = _factors(zoo)
    yield _table(("factor", "values", "range or list"), swept)
    yield "The same in all runs: " + ", ".join(f"{name} {value}" for name, value in fixed.items()) + ".\n"
    yield f"## Accuracy\n\nOf the last evaluation, on test images, runs that ended well.\n\n![histogram]({picture})\n"
    yield _table(("data", "architecture", "init", "runs", "mean", "std", "lowest", "highest"), _accuracies(zoo))
    yield "## Failures and duplicates\n"
    yield _table(
        ("what", "how many"),
        [
            ("runs that diverged (kept and flagged)", _share(status["diverged"], runs)),
            ("runs that were stopped (kept and flagged)", _share(status["stopped"], runs)),
            ("populations whose training ended in an error (not counted above)", len(failed)),
            ("populations that are damaged (not counted above)", len(unusable)),
            ("runs found in two populations (counted once)", zoo.repeated),
            ("states with the same weights as an earlier one", _share(_equal_states(populations), states)),
        ],
    )
    yield "Equal weights are expected at epoch 0 of runs that share seed, initialiser and architecture.\n"
    yield "## Where it comes from\n"
    yield _table(("what", "values"), _origins(populations))
    yield f"## Licence\n\nOf the networks: {licence}. The images have licences of their own.\n"
    digest = zoo_digest([each.header for each in populations])
    yield f"## How to cite\n\nCite the digest of this zoo, `{digest}`, and\n\n> {PAPER}\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _share(count: int, total: int) -> str:
    return f"{count} of {total} ({count / total:.2%})"


def _factors(zoo: Zoo) -> tuple[list[tuple[str, int, str]], dict[str, Any]]:
    """Fields of the recipe, and the seed, that differ: (name, number of values, range or list); and the others."""
    swept, fixed = [], {}
    for name in ("seed", *(field.name for field in fields(Recipe))):
        values = sorted(set(zoo.column(name).tolist()), key=lambda value: (isinstance(value, str), value))
        if len(values) == 1:
            fixed[name] = json.dumps(values[0])
        elif len(values) > MOST_VALUES:
            swept.append((name, len(values), f"{values[0]} to {values[-1]}"))
        else:
            swept.append((name, len(values), ", ".join(map(str, values))))
    return swept, fixed


def _accuracies(zoo: Zoo) -> list[tuple[Any, ...]]:
    groups: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for run in zoo.runs:
        if run["status"] == "ok":
            groups[run["data"], run["architecture"], run["init"]].append(run["test_accuracy"])
    return [
        (*key, len(all_), *(f"{value:.4f}" for value in (np.mean(all_), np.std(all_), min(all_), max(all_))))
        for key, all_ in sorted(groups.items())
    ]


def _equal_states(populations: Iterable[PopulationView]) -> int:
    """How many states have the weights, bit for bit, of one that came before."""
    seen, count = set(), 0
    for population in populations:
        for row in population.weights:
            for state in row:
                digest = hashlib.blake2b(np.ascontiguousarray(state).data, digest_size=16).digest()
                count += digest in seen
                seen.add(digest)
    return count


def _origins(populations: list[PopulationView]) -> list[tuple[str, str]]:
    names = (
        "data_digest",
        "package_version",
        "torch_version",
        "git_commit",
        "machine",
        "device",
        "precision",
        "created",
    )
    rows = []
    for name in names:
        values = sorted({str(each.header.attributes.get(name, "unknown")) for each in populations})
        rows.append((name, ", ".join(values) if len(values) <= 4 else f"{values[0]} to {values[-1]}"))
    rows.append(("minutes of training", f"{sum(each.header.attributes['seconds'] for each in populations) / 60:.1f}"))
    return rows


def _histogram(zoo: Zoo, path: Path) -> None:
    """Test accuracies, one colour per data set."""
    from matplotlib.figure import Figure  # heavy, and only for the picture

    groups: dict[str, list[float]] = defaultdict(list)
    for run in zoo.runs:
        if run["status"] == "ok":
            groups[run["data"]].append(run["test_accuracy"])
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(list(groups.values()), bins=np.linspace(0, 1, 51).tolist(), stacked=True, label=list(groups))
    axes.set(xlabel="test accuracy after training", ylabel="runs", xlim=(0, 1))
    if groups:
        axes.legend(title="data", frameon=False)
    figure.savefig(path, format="png", dpi=150)
