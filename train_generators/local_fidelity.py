"""How well samples of local generators match held-out networks: the figures of their cards, side by side.

Nothing is measured here; `train_generators.vae_group.judge` did that at the end of each fit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collect.durable import durable
from generators.checkpoint import load
from generators.errors import ConfigError
from generators.local.generator import LocalGenerator
from train_generators.training_state import load_state

log = logging.getLogger(__name__)

SHOWN = (
    "second_moment_ratio", "second_moment_ratio_raw", "covariance_error", "covariance_error_train",
    "covariance_error_white", "auroc", "auroc_normal", "auroc_he", "kurtosis_ratio", "active_units", "latent_units",
    "bound", "bound_white",
)  # fmt: skip
HEADINGS = (
    "generator", "second moment, generated / trained", "covariance error", "AUROC, told from trained",
    "kurtosis, generated / trained", "active units or codes", "bound", "fit, CPU s",
)  # fmt: skip
LEGEND = """
Least and greatest of the weight groups, on networks that had no part in the fit. A second moment ratio of 1 (in
brackets before calibration), a covariance error of 0, an AUROC of 0.5 and a kurtosis ratio of 1 are right; the bound is
on -log p in nats per weight, before calibration.
"""


def cpu_seconds(checkpoint: str) -> float | None:
    """What the fit took, over all its parts; None if the checkpoint has no `training` folder that says it."""
    state = Path(checkpoint) / "training" / "state.safetensors"
    return load_state(state)[1].get("cpu_seconds") if state.exists() else None


def recorded(checkpoints: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the cards say, by the names of the generators.

    Args:
        checkpoints: folders or published names of local generators that were fitted on the same networks.

    Returns:
        Per generator `metrics` (figures by weight group), `training` (how it was fitted), `zoo`, `versions` and
        `cpu_seconds`.

    Raises:
        ConfigError: there is no checkpoint, one is of another kind or lacks figures, two have the same name, or their
            networks differ.
    """
    if not checkpoints:
        raise ConfigError("no checkpoint to read: give at least one folder, --checkpoints runs/conv-vae")
    found: dict[str, dict[str, Any]] = {}
    for checkpoint in checkpoints:
        generator = load(checkpoint)
        if not isinstance(generator, LocalGenerator):
            raise ConfigError(f"{checkpoint} is a {generator.kind_name}: only local generators have these figures")
        if generator.name in found:
            raise ConfigError(f"{checkpoint}: two of the generators are called {generator.name}; fit one with --name")
        facts = {name: generator.card.get(name, {}) for name in ("metrics", "training", "zoo", "versions")}
        missing = {name for row in facts["metrics"].values() for name in SHOWN if name not in row}
        if missing or not facts["metrics"]:
            lacking = ", ".join(sorted(missing)) or "all figures"
            raise ConfigError(f"the card of {checkpoint} lacks {lacking}: fit it again, on at least two networks")
        known = next(iter(found.values()), facts)["zoo"]
        if facts["zoo"] != known:
            raise ConfigError(f"{checkpoint} was fitted on other networks than {next(iter(found))}: show them apart")
        found[generator.name] = {**facts, "cpu_seconds": cpu_seconds(checkpoint)}
    return found


def span(rows: Sequence[dict[str, Any]], figure: str, digits: int = 2) -> str:
    """The cell "0.49 to 0.52": least and greatest of a figure, or one number if they look the same."""
    values = [row[figure] for row in rows]
    least, greatest = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return least if least == greatest else f"{least} to {greatest}"


def table(found: dict[str, dict[str, Any]]) -> str:
    """The `recorded` figures in Markdown: a line for each generator, then what they are to be compared with."""
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    for name, facts in found.items():
        rows, seconds = list(facts["metrics"].values()), facts["cpu_seconds"]
        lines.append((
            f"`{name}`", f"{span(rows, 'second_moment_ratio')} ({span(rows, 'second_moment_ratio_raw')})",
            span(rows, "covariance_error", 3), span(rows, "auroc"), span(rows, "kurtosis_ratio"),
            ", ".join(f"{row['active_units']}/{row['latent_units']}" for row in rows), span(rows, "bound", 3),
            "" if seconds is None else f"{seconds:.0f}",
        ))  # fmt: skip
    every = [row for facts in found.values() for row in facts["metrics"].values()]
    normal = span(every, "covariance_error_train", 3), span(every, "auroc_normal")
    white = span(every, "covariance_error_white", 3), span(every, "auroc_he")
    lines.append(("a normal of mean and covariance of the training networks", "", *normal, "", "", "", ""))
    lines.append(("white noise (He)", "", *white, "", "", span(every, "bound_white", 3), ""))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(*, checkpoints: tuple[str, ...], out: Path) -> None:
    """Show how well samples of local generators match held-out networks, as their cards say.

    Writes `fidelity.json` (every figure of every weight group, and how the fits were made) and `fidelity.md` (a table
    of the least and greatest) into OUT. Nothing is measured again.

    Example: python -m train_generators fidelity --checkpoints runs/conv-vae runs/filter-vae --out runs/fidelity

    Args:
        checkpoints: Folders of local generators fitted on the same networks, or their published names.
        out: Folder for the two files.
    """
    found = recorded(checkpoints)
    texts = {
        "fidelity.json": json.dumps(found, indent=1) + "\n",
        "fidelity.md": f"# How samples match held-out networks\n{LEGEND}\n{table(found)}",
    }
    for name, text in texts.items():
        with durable(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        log.info("wrote %s", out / name)
