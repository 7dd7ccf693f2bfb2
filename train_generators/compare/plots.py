"""The pictures of a comparison, as PNG bytes. Colours are those of Okabe and Ito (safe for colour-blind readers); the
baseline is always dark grey, and an initialiser keeps its colour through all pictures.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from generators.inventory import Role
from train_generators.compare.ensembles import METRICS, TITLES
from train_generators.compare.predictions import WHEN, checkpoint_index
from train_generators.compare.result import ComparisonResult, Row

NEUTRAL = "#4d4d4d"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", "--", "-.", ":")
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6,
    "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip
KERNELS_SHOWN = 64
LEGEND_CHARACTERS = 138  # that fit below a figure of full width, eight per entry for its line


def columns(names: Collection[str], most: int) -> int:
    """Of a legend below a figure: at most so many, and as many as have room for the longest name."""
    return max(1, min(len(names), most, LEGEND_CHARACTERS // (max(map(len, names)) + 8)))


def styles(result: ComparisonResult) -> dict[str, tuple[str, str]]:
    """Colour and dash per label: the baseline neutral, the others in alphabetical order."""
    others = sorted({row.label for row in result.rows if not row.is_baseline})
    found = {
        label: (COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]) for i, label in enumerate(others)
    }
    return {row.label: (NEUTRAL, "-") for row in result.rows if row.is_baseline} | found


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _step_axis(axes: Axes, steps: np.ndarray) -> None:
    """Training steps, logarithmic from the first evaluation on, with step 0 kept visible."""
    axes.set_xscale("symlog", linthresh=max(1, int(steps[min(1, len(steps) - 1)])), linscale=0.4)
    wanted = [base * 10**power for power in range(7) for base in (1, 2, 5)]
    between = [tick for tick in wanted if steps[min(1, len(steps) - 1)] <= tick <= 0.8 * steps[-1]]
    ticks = [0, *between, int(steps[-1])]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0, steps[-1])
    axes.set_xlabel("training step")


def curves(result: ComparisonResult, architecture: str) -> bytes:
    """Test accuracy over training steps (mean, band from the lowest to the highest run), and the difference to the
    baseline by seed (mean, pointwise 95 % interval).
    """
    look = styles(result)
    rows = result.of(architecture)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for row in rows:
            colour, dash = look[row.label]
            values = 100 * row.arm.curves
            alive = np.isfinite(values).any(axis=0)
            steps, values = row.arm.steps[alive], values[:, alive]
            left.fill_between(steps, np.nanmin(values, 0), np.nanmax(values, 0), color=colour, alpha=0.15, linewidth=0)
            left.plot(
                steps, np.nanmean(values, 0), color=colour, linestyle=dash, marker=".", markersize=4, clip_on=False
            )
            if row.differences:
                mean, low, high = (
                    100 * np.array([getattr(one, name) for one in row.differences]) for name in ("mean", "low", "high")
                )
                right.fill_between(row.arm.steps, low, high, color=colour, alpha=0.1, linewidth=0)
                right.plot(row.arm.steps, mean, color=colour, linestyle=dash, marker=".", markersize=4, clip_on=False)
        base = rows[0]
        left.axhline(100 * base.target, color=NEUTRAL, linewidth=0.8, linestyle=":")
        left.annotate(
            f"target {100 * base.target:.1f} %", (1, 100 * base.target), xycoords=("axes fraction", "data"),
            ha="right", va="bottom", color=NEUTRAL, fontsize=8,
        )  # fmt: skip
        right.axhline(0, color=NEUTRAL, linewidth=1)
        right.set_yscale("symlog", linthresh=1, linscale=0.6)
        right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
        right.yaxis.set_minor_locator(NullLocator())
        ticks = (-100, -50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100)
        low_limit, high_limit = right.get_ylim()
        right.set_yticks([tick for tick in ticks if low_limit <= tick <= high_limit])
        for axes in (left, right):
            _step_axis(axes, base.arm.steps)
        left.set_title(f"{architecture}: test accuracy in %, mean and range of the runs")
        right.set_title(f"difference to {base.label} in points, by seed, 95 % interval")
        names = [f"{row.label} (lr {row.arm.lr:g}, n = {len(row.arm.seeds)})" for row in rows]
        figure.legend(
            handles=[Line2D([], [], color=look[row.label][0], linestyle=look[row.label][1]) for row in rows],
            labels=names, loc="outside lower center", ncols=columns(names, 4),
        )  # fmt: skip
        return png(figure)


def box_plot(result: ComparisonResult) -> bytes:
    """Test accuracy at the end, every run a dot, one panel per architecture."""
    look = styles(result)
    with matplotlib.rc_context(STYLE):
        names = result.architectures
        height = 1.2 + 0.34 * max(len(result.of(name)) for name in names)
        figure = Figure(figsize=(1.5 + 3.2 * len(names), height), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            rows = result.of(name)[::-1]
            for place, row in enumerate(rows):
                colour, _ = look[row.label]
                values = 100 * row.arm.final[row.arm.finished]
                if len(values):
                    axes.boxplot(
                        values, positions=[place], widths=0.6, orientation="horizontal", whis=(0, 100),
                        showfliers=False, manage_ticks=False, boxprops={"color": colour},
                        whiskerprops={"color": colour}, capprops={"color": colour},
                        medianprops={"color": colour, "linewidth": 2},
                    )  # fmt: skip
                    axes.plot(values, np.full(len(values), place), ".", color=colour, alpha=0.7, markersize=5)
            axes.set_yticks(range(len(rows)), [f"{row.label} (n = {int(row.arm.finished.sum())})" for row in rows])
            axes.set_ylim(-0.6, len(rows) - 0.4)
            axes.set_title(name)
            axes.set_xlabel("test accuracy at the end in %")
        return png(figure)


def severity(result: ComparisonResult, when: str) -> bytes | None:
    """Quality of ensembles against the severity of the shift, averaged over the kinds of shift; None without any."""
    look = styles(result)
    names = [name for name in result.architectures if any(when in row.ensembles for row in result.of(name))]
    if not names:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.6 * len(METRICS), 0.7 + 2.2 * len(names)), layout="constrained")
        grid = figure.subplots(len(names), len(METRICS), squeeze=False, sharex=True)
        for number, (line, name) in enumerate(zip(grid, names, strict=True)):
            for axes, metric in zip(line, METRICS, strict=True):
                for row in result.of(name):
                    if when in row.ensembles:
                        colour, dash = look[row.label]
                        values = row.ensembles[when].by_severity(metric)
                        axes.plot(list(values), list(values.values()), color=colour, linestyle=dash, marker=".")
                axes.set_xticks(range(6))
                if number == 0:
                    axes.set_title(TITLES[metric])
                if number == len(names) - 1:
                    axes.set_xlabel("severity of the shift")
            line[0].set_ylabel(name)
        figure.legend(
            handles=[Line2D([], [], color=colour, linestyle=dash) for colour, dash in look.values()],
            labels=list(look), loc="outside lower center", ncols=columns(look, 6),
        )  # fmt: skip
        figure.suptitle(f"ensembles {when} training, mean over the kinds of shift", x=0.01, ha="left", fontsize=10)
        return png(figure)


def _shown_layer(population: Any) -> Any | None:
    """The layer whose kernels are shown: 3 x 3 (or the largest kernel there is), enough of them, nearest the middle."""
    layers = [
        spec
        for spec in population.layout
        if spec.role == Role.CONV_WEIGHT.value and len(spec.shape) == 4 and min(spec.shape[2:]) > 1
    ]
    if not layers:
        return None
    sized = [spec for spec in layers if tuple(spec.shape[2:]) == (3, 3)] or layers
    most = max(spec.shape[0] * spec.shape[1] for spec in sized)
    enough = [spec for spec in sized if spec.shape[0] * spec.shape[1] >= min(KERNELS_SHOWN, most)]
    return enough[len(enough) // 2]


def _kernels(row: Row, layer: str, when: str) -> np.ndarray | None:
    """Kernels of `layer` in the first finished run, `[O * I, h, w]`; None if those weights were not saved."""
    finished = np.flatnonzero(row.arm.finished)
    if not len(finished):
        return None
    population, member = row.arm.sources[int(finished[0])]
    checkpoint = checkpoint_index(population, when)
    if checkpoint is None:
        return None
    spec = next(spec for spec in population.layout if spec.name == layer)
    values = np.asarray(population.weights[member, checkpoint, spec.offset : spec.offset + spec.length])
    return values.reshape(-1, *spec.shape[2:])


def mosaic(kernels: np.ndarray) -> np.ndarray:
    """The first `KERNELS_SHOWN` kernels `[n, h, w]` in a square grid with gaps (NaN), each on its own scale."""
    side = int(np.ceil(np.sqrt(min(len(kernels), KERNELS_SHOWN))))
    height, width = kernels.shape[1:]
    canvas = np.full((side * (height + 1) - 1, side * (width + 1) - 1), np.nan)
    for index, kernel in enumerate(kernels[: side * side]):
        top, left = (index // side) * (height + 1), (index % side) * (width + 1)
        canvas[top : top + height, left : left + width] = kernel / max(float(np.abs(kernel).max()), 1e-12)
    return canvas


def leading_share(kernels: np.ndarray) -> float:
    """Share of the variance of kernels `[n, h, w]` in their first third of principal directions.

    White noise has little more than a third; smooth or repeated kernels have much more.
    """
    flat = kernels.reshape(len(kernels), -1).astype(float)
    power = np.linalg.svd(flat - flat.mean(0), compute_uv=False) ** 2
    return float(power[: max(1, flat.shape[1] // 3)].sum() / max(power.sum(), 1e-30))


def kernels(result: ComparisonResult, architecture: str) -> bytes | None:
    """Kernels of one layer, generated (before training) above trained (after); None without convolutions or weights."""
    rows = result.of(architecture)
    layer = _shown_layer(rows[0].arm.sources[0][0])
    if layer is None:
        return None
    found = {(row.label, when): _kernels(row, layer.name, when) for row in rows for when in WHEN}
    shown = [when for when in WHEN if any(found[row.label, when] is not None for row in rows)]
    if not shown:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.0 + 2.1 * len(rows), 0.6 + 2.5 * len(shown)), layout="constrained")
        for line, when in zip(figure.subplots(len(shown), len(rows), squeeze=False), shown, strict=True):
            for axes, row in zip(line, rows, strict=True):
                values = found[row.label, when]
                axes.set_axis_off()
                if values is not None:
                    axes.imshow(mosaic(values), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
                    title = f"{row.label}, {'initial' if when == 'before' else 'trained'}"
                    axes.set_title(
                        f"{title}\nstd {values.std():.3f}, leading {100 * leading_share(values):.0f} %", fontsize=8
                    )
        figure.suptitle(
            f"{architecture}, {layer.name}\n{tuple(layer.shape)}, first run, each kernel on its own scale",
            x=0.01, ha="left", fontsize=10,
        )  # fmt: skip
        return png(figure)


def all_pictures(result: ComparisonResult, architectures: Sequence[str] | None = None) -> dict[str, bytes]:
    """File name -> PNG bytes of every picture that the data allow."""
    pictures: dict[str, bytes | None] = {}
    for name in architectures or result.architectures:
        pictures[f"curves-{name}.png"] = curves(result, name)
        pictures[f"kernels-{name}.png"] = kernels(result, name)
    pictures["final-accuracy.png"] = box_plot(result)
    for when in WHEN:
        pictures[f"ensembles-{when}.png"] = severity(result, when)
    return {name: content for name, content in pictures.items() if content is not None}
