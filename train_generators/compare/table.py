"""Numbers as words, and the final table on the screen."""

from __future__ import annotations

import math
from typing import Any

from train_generators.compare.curves import format_steps
from train_generators.compare.result import ComparisonResult, Row
from train_generators.compare.statistics import Paired, Spread


def percent(one: Spread) -> str:
    """The cell "97.2 ± 0.4": mean and standard deviation in percent."""
    if not one.n:
        return "none"
    return f"{100 * one.mean:.1f}" + (f" ± {100 * one.std:.1f}" if math.isfinite(one.std) else "")


def difference(one: Paired | None) -> str:
    """The cell "+1.2 [-0.3, +2.7]": mean paired difference with its 95 % interval, in points."""
    if one is None or not one.n:
        return ""
    interval = f" [{100 * one.low:+.1f}, {100 * one.high:+.1f}]" if math.isfinite(one.low) else ""
    return f"{100 * one.mean:+.1f}{interval}"


def p_value(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "" if value is None else "n/a"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def rate(row: Row) -> str:
    """The chosen learning rate, marked if it was the only one or lies at the edge of those tried."""
    return f"{row.arm.lr:g}" + (" (edge)" if row.choice.at_edge else " (only)" if len(row.choice.tried) == 1 else "")


def finished(row: Row) -> str:
    """The cell "5" runs, or "3 of 5 (2 diverged)"."""
    total, lost = len(row.arm.seeds), row.unfinished
    if not lost:
        return str(total)
    reasons = ", ".join(f"{count} {status}" for status, count in lost.items())
    return f"{total - sum(lost.values())} of {total} ({reasons})"


HEADINGS = (
    "architecture", "initialiser", "lr", "runs", "before training %", "steps to target", "at the end %",
    "difference to {baseline}", "p (Holm)", "ensemble acc %", "NLL", "disagreement",
)  # fmt: skip


def summary_cells(result: ComparisonResult) -> list[list[str]]:
    """The cells of the final table, one row per (architecture, initialiser), under `HEADINGS`."""
    cells = []
    for row in result.rows:
        start, end, after = row.horizons[0], row.horizons[-1], row.ensembles.get("after")
        cells.append([
            row.arm.architecture, row.label, rate(row), finished(row), percent(start.accuracy),
            format_steps(row.steps_to_target), percent(end.accuracy),
            "baseline" if row.is_baseline else difference(end.difference), p_value(end.p_holm),
            f"{100 * after.mean('accuracy'):.1f}" if after else "",
            f"{after.mean('nll'):.3f}" if after else "",
            f"{after.mean('disagreement'):.3f}" if after else "",
        ])  # fmt: skip
    return cells


def plain(one: Paired | None) -> str:
    if one is None or not one.n:
        return ""
    return f"{one.mean:+.3f}" + (f" [{one.low:+.3f}, {one.high:+.3f}]" if math.isfinite(one.low) else "")


def target_text(result: ComparisonResult) -> str:
    if result.config.target is not None:
        return f"{100 * result.config.target:.1f} %"
    targets = ", ".join(f"{100 * result.of(name)[0].target:.1f} % for {name}" for name in result.architectures)
    return f"{100 * result.config.target_share:g} % of {result.rows[0].label}'s mean accuracy at the end ({targets})"


SCREEN = ("", "lr", "start", "to target", "end", "gap", "p", "ens.", "NLL", "dis.")
"""Headings on the screen, chosen to fit 80 columns."""

SCREEN_LEGEND = (
    "start, end: test accuracy in %, before and after training · to target: steps to {target}, median (runs that got "
    "there) · gap: points at the end to {baseline}, paired by seed; p: of that gap, after Holm's correction over "
    "{tests} tests · ens., NLL, dis.: accuracy, loss and pairwise disagreement of trained ensembles{edge}"
)
LOG_WIDTH = 110  # columns where the output is no terminal


def _screen_cells(row: Row) -> list[str]:
    """The cells of one row under `SCREEN`: as in the report, without the intervals."""
    start, end, after = row.horizons[0], row.horizons[-1], row.ensembles.get("after")
    lost = f" ({finished(row)} runs)" if row.unfinished else ""
    gap = "" if end.difference is None or not end.difference.n else f"{100 * end.difference.mean:+.1f}"
    cells = [
        f"  {row.label}{lost}",
        f"{row.arm.lr:g}{'*' if row.choice.at_edge else ''}",
        f"{100 * start.accuracy.mean:.1f}",
        format_steps(row.steps_to_target),
        percent(end.accuracy),
        gap,
        p_value(end.p_holm),
    ]
    if after is None:
        return [*cells, "", "", ""]
    return [
        *cells,
        f"{100 * after.mean('accuracy'):.1f}",
        f"{after.mean('nll'):.3f}",
        f"{after.mean('disagreement'):.3f}",
    ]


def show(result: ComparisonResult, *, console: Any = None) -> None:
    """The final table, how long a clear head start lasts, and the notes on `console` (default: standard output)."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if console is None:
        console = Console()
        console = console if console.is_terminal else Console(width=LOG_WIDTH)
    base = result.rows[0].label
    runs = " or ".join(map(str, sorted({len(row.arm.seeds) for row in result.rows})))
    table = Table(
        title=f"{result.facts['data']}: initialisers against {base}, {runs} runs each, mean ± std",
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0,
    )  # fmt: skip
    for heading in SCREEN:
        table.add_column(heading, no_wrap=True, justify="right" if heading else "left")
    for architecture in result.architectures:
        table.add_row(Text(architecture, style="bold"))
        for row in result.of(architecture):
            table.add_row(*(Text(cell, style="dim" if row.is_baseline else "") for cell in _screen_cells(row)))
    console.print(table)
    edge = " · *: smallest or largest learning rate tried" if any(row.choice.at_edge for row in result.rows) else ""
    legend = SCREEN_LEGEND.format(target=target_text(result), baseline=base, tests=result.tests, edge=edge)
    console.print(Text(legend, style="dim"))
    for row in result.rows:
        if row.differences and row.differences[0].low > 0:  # a head start: does it last?
            console.print(Text.assemble((f"{row.arm.architecture}: ", "bold"), row.story))
    for note in result.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    console.print(Text(f"report: {result.folder / 'report.html'}", overflow="fold"))
