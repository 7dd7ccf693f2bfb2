"""What is written: the report, the pictures, flat figures (results.json) and raw records (CSV)."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from collect.durable import durable
from collect.provenance import provenance
from collect.stacked import CALIBRATION_IMAGES
from train_generators.compare import document, plots
from train_generators.compare.ensembles import METRICS
from train_generators.compare.result import ComparisonResult, Row

PACKAGES = ("torch", "torchvision", "torchmetrics", "scipy", "matplotlib", "numpy")


def facts(rows: Sequence[Row], images: Any) -> dict[str, Any]:
    """What was compared, with which software, on which machine."""
    hidden = {"data", "architecture", "init", "init_digest", "lr", "saved", "statistics"}
    recipes: dict[str, list[str]] = {}
    for row in rows:
        recipe = dataclasses.asdict(row.arm.sources[0][0].recipe)
        text = ", ".join(f"{name} {value}" for name, value in recipe.items() if name not in hidden)
        recipes.setdefault(text, []).append(row.arm.architecture)
    texts = [text if len(recipes) == 1 else f"{'/'.join(dict.fromkeys(who))}: {text}" for text, who in recipes.items()]
    statistics = {
        "train": f"re-estimated on the first {CALIBRATION_IMAGES} training images, for every initialiser alike",
        "running": "the running averages of training",
    }
    ways = sorted({row.arm.sources[0][0].recipe.statistics for row in rows})
    made = provenance()
    return {
        "data": images.name,
        "data_digest": images.digest,
        "test_images": len(images.test.labels),
        "recipe": "; ".join(texts),
        "statistics": "; ".join(statistics[way] for way in ways),
        "git_commit": made["git_commit"],
        "package_version": made["package_version"],
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} logical processors",
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "created": made["created"],
    }


def _number(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {str(key): _number(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_number(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(headings)
    writer.writerows(rows)
    return buffer.getvalue().encode()


def curve_records(result: ComparisonResult) -> bytes:
    """CSV: one line per run and evaluation, runs with learning rates that were not chosen included."""
    arms = [(row, arm) for row in result.rows for arm in row.choice.tried]
    names = list(arms[0][1].metrics)
    lines = []
    for row, arm in arms:
        who = [arm.architecture, arm.label, arm.lr, int(arm is row.arm)]
        for run, seed in enumerate(arm.seeds):
            for at, (step, epoch) in enumerate(zip(arm.steps, arm.epochs, strict=True)):
                values = [f"{arm.metrics[name][run, at]:.6g}" if name in arm.metrics else "" for name in names]
                lines.append([*who, seed, arm.status[run], int(step), float(epoch), *values])
    return _csv(
        ["architecture", "initialiser", "lr", "chosen", "seed", "status", "step", "epoch", *names], lines
    )  # fmt: skip


def ensemble_records(result: ComparisonResult) -> bytes:
    """CSV: one line per ensemble, moment, shift and severity."""
    names = [*METRICS, "member_accuracy"]
    lines = []
    for row in result.rows:
        for when, found in row.ensembles.items():
            for (shift, severity), qualities in found.cells.items():
                where = [row.arm.architecture, row.arm.label, row.arm.lr, when, shift or "clean", severity]
                for number, one in enumerate(qualities):
                    lines.append([*where, number, found.members, *(f"{getattr(one, name):.6g}" for name in names)])
    return _csv(
        ["architecture", "initialiser", "lr", "when", "shift", "severity", "ensemble", "members", *names], lines
    )  # fmt: skip


def write(result: ComparisonResult, *, seconds: float) -> None:
    """Write everything under `result.folder`, results.json last; each file is whole or not there."""
    pictures = plots.all_pictures(result)
    text = document.markdown(result, pictures)
    title = f"Initialisers compared on {result.facts['data']}"
    results = {
        **result.facts, "seconds": seconds, "config": dataclasses.asdict(result.config), "notes": list(result.notes),
        "stories": {f"{row.arm.architecture}/{row.label}": row.story for row in result.rows if row.story},
        "figures": result.figures,
    }  # fmt: skip
    files = {
        **{f"plots/{name}": content for name, content in pictures.items()},
        "records/curves.csv": curve_records(result),
        "records/ensembles.csv": ensemble_records(result),
        "report.md": text.encode(),
        "report.html": document.html(text, pictures, title=title).encode(),
        "results.json": json.dumps(_number(results), indent=1, ensure_ascii=False).encode(),
    }
    for name, content in files.items():
        with durable(result.folder / name) as temporary:
            temporary.write_bytes(content)
