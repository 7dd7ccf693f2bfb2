"""The report as one Markdown text with its pictures, and the same as one self-contained HTML page.

Every sentence about who is better is made from the data; nothing is claimed in advance.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence

import numpy as np
from markdown_it import MarkdownIt

from train_generators.compare.predictions import WHEN
from train_generators.compare.result import ComparisonResult
from train_generators.compare.shifts import SHIFTS
from train_generators.compare.statistics import spread
from train_generators.compare.table import HEADINGS, difference, p_value, percent, plain, summary_cells, target_text

CSS = """
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; color: #222; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px; display: block; overflow-x: auto; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
th { border-bottom: 2px solid #888; }
code { background: #f4f4f4; padding: 0 0.2rem; }
"""

SUMMARY_LEGEND = """
Accuracies: mean ± standard deviation over runs, on test images. Target: {target}; steps are the median over runs of the
first evaluation at or above it, with how many runs got there. Difference: in points, paired by seed, with its 95 %
interval; p from the paired t-test, after Holm's correction over all {tests} tests of this report. The learning rate is
chosen per row on validation images; "edge" means that it is the smallest or largest of those tried, "only" that there
was no choice.
"""

HORIZONS_LEGEND = """
Test accuracy in % and test loss (mean ± standard deviation over runs) at the evaluations nearest to the chosen
horizons; difference of accuracy to {baseline} in points, paired by seed, with its 95 % interval; p raw and after Holm's
correction. Evaluations are {spacing} steps apart; step {last} is the end (epoch {epoch:g}).
"""

KERNELS_LEGEND = """
Kernels as they were generated and as they were trained. "Leading" is the share of variance in the first third of the
principal directions of the layer's kernels: little more than a third for white noise, more for structured kernels.
"""

ENSEMBLES_LEGEND = """
Ensembles of {sizes} runs without replacement, {counts} per initialiser; the prediction is the mean of the members'
probabilities. {spread} Brackets: 95 % interval of the difference to the baseline's ensembles, paired by test image: it
knows the chance in the choice of test images, not that in training.
"""

HOW_TO_READ = """
- Runs of equal seed share the order of the data and its augmentation; initialisers that only scale one and the same
  random draw (he, xavier, ...) may share the start of a run as well. The spread is over those seeds. A learned
  initialiser is one fitted checkpoint: p-values say nothing about fitting it again.
- "Clearly ahead" means that the pointwise 95 % interval does not hold 0: of 20 evaluations without any difference, one
  is expected to look so. A difference that is not clear with {runs} runs may well exist.
- NLL: mean of -log p(label), in nats. Brier: mean over images of the sum over classes of (p - [class = label])²,
  between 0 and 2. ECE: 15 equal bins of confidence. Disagreement: share of images on which two members predict
  different classes, averaged over pairs.
- Batch statistics: {statistics}.
- `records/` holds the curve of every run, chosen or not, and every ensemble on every shift; `results.json` the figures.
"""


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def _picture(pictures: dict[str, bytes], name: str, text: str) -> str:
    return f"\n![{text}](plots/{name})\n" if name in pictures else ""


def _or(values: Iterable[object]) -> str:
    """Different values as words: "5" or "3 or 5"."""
    return " or ".join(str(value) for value in sorted(set(values)))  # type: ignore[type-var]


def _horizons(result: ComparisonResult, architecture: str) -> str:
    rows = result.of(architecture)
    cells = []
    for horizons in zip(*(row.horizons for row in rows), strict=True):
        for row, horizon in zip(rows, horizons, strict=True):
            gap = horizon.difference
            pairs, p = (str(gap.n), p_value(gap.p)) if gap else ("", "")
            cells.append([
                str(horizon.step), row.label, percent(horizon.accuracy), difference(gap), pairs, p,
                p_value(horizon.p_holm), f"{horizon.loss.mean:.3f} ± {horizon.loss.std:.3f}",
            ])  # fmt: skip
    headings = ["step", "initialiser", "accuracy %", f"difference to {rows[0].label}", "pairs", "p", "p (Holm)", "loss"]
    end, spacing = rows[0].horizons[-1], np.diff(rows[0].arm.steps)
    legend = HORIZONS_LEGEND.format(
        baseline=rows[0].label, spacing=f"{np.median(spacing):.0f}", last=end.step, epoch=end.epoch
    )
    return f"{legend}\n{_table(headings, cells)}"


def _rates(result: ComparisonResult, architecture: str) -> str:
    cells = [
        [
            row.label,
            f"{arm.lr:g}",
            percent(validation),
            percent(spread(arm.final)),
            f"{int(arm.finished.sum())} of {len(arm.seeds)}",
            "**chosen**" if arm is row.arm else "",
        ]
        for row in result.of(architecture)
        for arm, validation in zip(row.choice.tried, row.choice.validation, strict=True)
    ]
    headings = ["initialiser", "lr", "validation % at the end", "test % at the end", "runs finished", ""]
    return (
        "Learning rates, chosen by the mean validation accuracy at the end (a run that did not finish counts as "
        f"chance):\n\n{_table(headings, cells)}"
    )


def _architecture(result: ComparisonResult, architecture: str, pictures: dict[str, bytes]) -> list[str]:
    kernels = _picture(pictures, f"kernels-{architecture}.png", f"kernels of {architecture}")
    return [
        f"## {architecture}\n",
        _picture(pictures, f"curves-{architecture}.png", f"curves of {architecture}"),
        *(f"- {row.story}" for row in result.of(architecture) if row.story),
        _horizons(result, architecture),
        _rates(result, architecture),
        f"{KERNELS_LEGEND}\n{kernels}" if kernels else "",
    ]


def _clean_ensembles(result: ComparisonResult, when: str) -> str:
    cells = []
    for row in result.rows:
        found = row.ensembles.get(when)
        if found is None:
            continue
        gaps = row.ensemble_differences.get(when, {})
        cells.append([
            row.arm.architecture, row.label, f"{found.members}",
            f"{100 * found.mean('member_accuracy'):.1f}",
            f"{100 * found.mean('accuracy'):.1f}", difference(gaps.get("accuracy")),
            f"{found.mean('nll'):.3f}", plain(gaps.get("nll")),
            f"{found.mean('brier'):.3f}", plain(gaps.get("brier")),
            f"{found.mean('ece'):.3f}", f"{found.mean('disagreement'):.3f}",
        ])  # fmt: skip
    gap = f"to {result.rows[0].label}"
    headings = ["architecture", "initialiser", "members", "members alone %", "ensemble %", gap]
    headings += ["NLL", gap, "Brier", gap, "ECE", "disagreement"]
    return _table(headings, cells)


def _ensembles(result: ComparisonResult, pictures: dict[str, bytes]) -> list[str]:
    found = [one for row in result.rows for one in row.ensembles.values()]
    if not found:
        return []
    single = {one.sets for one in found} == {1}
    text = [
        "## Ensembles\n",
        ENSEMBLES_LEGEND.format(
            sizes=_or(one.members for one in found),
            counts=_or(one.sets for one in found),
            spread="With one ensemble there is no spread over seeds." if single else "",
        ),
    ]
    for when in WHEN:
        if any(when in row.ensembles for row in result.rows):
            text += [
                f"### {when.capitalize()} training, clean test images\n",
                _clean_ensembles(result, when),
                _picture(pictures, f"ensembles-{when}.png", f"ensembles {when} training against severity"),
            ]
    if result.config.shifts:
        kinds = {name: SHIFTS[name] for name in result.config.shifts}
        rows = [[name, *(f"{one:g}" for one in kind.magnitudes), kind.unit] for name, kind in kinds.items()]
        headings = ["shift", "1", "2", "3", "4", "5", "what the number is"]
        text += ["Shifts, with their magnitudes at severities 1 to 5:\n", _table(headings, rows)]
    return text


def markdown(result: ComparisonResult, pictures: dict[str, bytes]) -> str:
    """The report; pictures are referred to as `plots/NAME`."""
    facts, baseline = result.facts, result.rows[0].label
    runs = _or(len(row.arm.seeds) for row in result.rows)
    count = len(result.architectures)
    text = [
        f"# Initialisers compared with {baseline} on {facts['data']}\n",
        f"{count} architecture{'s' if count > 1 else ''}, {runs} runs per initialiser, {facts['test_images']} test "
        f"images. Recipe: {facts['recipe']}.\n",
        _table([heading.format(baseline=baseline) for heading in HEADINGS], summary_cells(result)),
        SUMMARY_LEGEND.format(target=target_text(result), tests=result.tests),
        "**Mind these:**\n" if result.notes else "",
        *(f"- {note}" for note in result.notes),
        _picture(pictures, "final-accuracy.png", "accuracy at the end"),
    ]
    for architecture in result.architectures:
        text += _architecture(result, architecture, pictures)
    text += _ensembles(result, pictures)
    text += [
        "## How to read this",
        HOW_TO_READ.format(runs=runs, statistics=facts["statistics"]),
        "## Where this was made\n",
        _table(["what", "value"], [[key.replace("_", " "), str(value)] for key, value in facts.items()]),
    ]
    return "\n".join(part for part in text if part)


def html(text: str, pictures: dict[str, bytes], *, title: str) -> str:
    """`text` as one HTML page with the pictures inside it."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for name, content in pictures.items():
        body = body.replace(f'src="plots/{name}"', f'src="data:image/png;base64,{base64.b64encode(content).decode()}"')
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{CSS}</style></head>\n<body>\n{body}</body></html>\n"
    )
